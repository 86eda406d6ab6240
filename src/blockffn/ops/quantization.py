"""Packing weights for the CPU kernels: bf16, or int8 and int4 with a float16 scale for each group of inputs.

A packed matrix is one plain `uint8` tensor in the layout of `native/blockffn.h`, so safetensors stores it as it is and
a memory-mapped file is ready to compute from. `unpack_matrix` is the exact inverse: it returns the values that the
kernels multiply with, and so defines what a format costs in accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops.native import FORMATS, empty_huge
from blockffn.wording import counted

STRIP = 32  # outputs that lie side by side
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
LARGEST_WEIGHT = 65504  # weight whose group has a scale in float16


@dataclass(frozen=True)
class MatrixLayout:
    """How a matrix of `outputs` rows and `inputs` columns is packed. `group_size` is 0 for f32 and bf16."""

    format: str
    outputs: int
    inputs: int
    group_size: int

    @classmethod
    def choose(cls, format: str, outputs: int, inputs: int, group_size: int = DEFAULT_GROUP_SIZE) -> MatrixLayout:
        """Raises `ValueError` for an unknown format or group. A group never exceeds the padded number of inputs."""
        if format not in FORMATS:
            raise ValueError(f"unknown weight format {format!r}; choose one of {', '.join(FORMATS)}")
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
        group = 0 if format in ("f32", "bf16") else min(group_size, 1 << max(5, (inputs - 1).bit_length()))
        return cls(format, outputs, inputs, group)

    @property
    def strips(self) -> int:
        return math.ceil(self.outputs / STRIP)

    @property
    def padded_inputs(self) -> int:
        multiple = self.group_size or 32
        return math.ceil(self.inputs / multiple) * multiple

    @property
    def num_bytes(self) -> int:
        """Bytes of one packed matrix."""
        bits = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}[self.format]
        scales = self.padded_inputs // self.group_size * 2 if self.group_size else 0
        return self.strips * STRIP * (self.padded_inputs * bits // 8 + scales)

    @property
    def padding_bytes(self) -> int:
        """Those of `num_bytes` that fill up strips and groups: neither a weight nor a scale of one."""
        bits = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}[self.format]
        scales = math.ceil(self.inputs / self.group_size) * 2 if self.group_size else 0
        return self.num_bytes - self.outputs * (math.ceil(self.inputs * bits / 8) + scales)


def pack_matrix(weight: Tensor, layout: MatrixLayout) -> Tensor:
    """Pack `[N, K]` of any float dtype into `uint8 [layout.num_bytes]`.

    Raises:
        ValueError: the shape is not the layout's, or a weight to be quantised is NaN or infinite.
    """
    if tuple(weight.shape) != (layout.outputs, layout.inputs):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(layout.outputs, layout.inputs)}")
    S, K = layout.strips, layout.padded_inputs
    padded = F.pad(weight.detach(), (0, K - layout.inputs, 0, S * STRIP - layout.outputs)).view(S, STRIP, K)
    if layout.format == "f32":
        return padded.float().transpose(1, 2).contiguous().view(torch.uint8).flatten()
    if layout.format == "bf16":
        return padded.bfloat16().view(S, STRIP, K // 2, 2).transpose(1, 2).contiguous().view(torch.uint8).flatten()
    codes, scales = quantize(padded, bits=int(layout.format[3:]), group_size=layout.group_size)
    groups = codes.view(S, STRIP, K // layout.group_size, layout.group_size)
    if layout.format == "int4":
        nibbles = groups.view(*groups.shape[:-1], -1, 2, 4)
        groups = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(-2)
    bytes_ = groups.view(*groups.shape[:-1], -1, 4).permute(0, 2, 3, 1, 4).flatten(2)  # [S, groups, bytes]
    scale_bytes = scales.transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([scale_bytes, bytes_], dim=-1).flatten()


def unpack_matrix(packed: Tensor, layout: MatrixLayout) -> Tensor:
    """The float32 `[N, K]` that a packed matrix stands for."""
    S, K = layout.strips, layout.padded_inputs
    if layout.format == "f32":
        values = packed.view(torch.float32).view(S, K, STRIP).transpose(1, 2)
    elif layout.format == "bf16":
        values = packed.view(torch.bfloat16).view(S, K // 2, STRIP, 2).transpose(1, 2).float()
    else:
        blocks = packed.view(S, K // layout.group_size, -1)
        scales = blocks[..., : STRIP * 2].contiguous().view(torch.float16).transpose(1, 2).float()
        bytes_ = blocks[..., STRIP * 2 :].reshape(*blocks.shape[:2], -1, STRIP, 4).permute(0, 3, 1, 2, 4)
        if layout.format == "int4":
            codes, offset = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-2), 8
        else:
            codes, offset = bytes_, 128
        values = (codes.flatten(3).float() - offset) * scales.unsqueeze(-1)
    return values.reshape(S * STRIP, K)[: layout.outputs, : layout.inputs]


def unpack_rows(packed: Tensor, layout: MatrixLayout, rows: Tensor) -> Tensor:
    """Rows `[..., K]` in float32 of a packed int8 or int4 matrix, for indices `[...]`: what an embedding looks up.

    Equal to `unpack_matrix(packed, layout)[rows]`, but reads those rows alone.
    """
    flat = rows.flatten()
    strip, lane = flat // STRIP, flat % STRIP
    blocks = packed.view(layout.strips, layout.padded_inputs // layout.group_size, -1)
    scales = blocks[..., : STRIP * 2].unflatten(-1, (STRIP, 2))[strip, :, lane].contiguous().view(torch.float16)
    bytes_ = blocks[..., STRIP * 2 :].unflatten(-1, (-1, STRIP, 4))[strip, :, :, lane]
    if layout.format == "int4":
        codes, offset = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-2), 8
    else:
        codes, offset = bytes_, 128
    values = (codes.flatten(2).float() - offset) * scales.float()
    return values.flatten(1)[:, : layout.inputs].view(*rows.shape, layout.inputs)


def take_rows(matrix: PackedMatrix, rows: Tensor) -> PackedMatrix:
    """Rows `[N]` (indices) of a packed matrix of any format as one of its own, with the same codes and scales."""
    layout = matrix.layout
    taken = MatrixLayout(layout.format, len(rows), layout.inputs, layout.group_size)
    padded = F.pad(rows, (0, taken.strips * STRIP - len(rows)))  # what fills the last strip is never read

    def take(lanes: Tensor) -> Tensor:
        """`[S, M, 32, bytes]` of all strips to `[S', M * 32 * bytes]` of these rows."""
        chosen = lanes.transpose(1, 2).flatten(0, 1)[padded]
        return chosen.unflatten(0, (taken.strips, STRIP)).transpose(1, 2).flatten(1)

    if layout.group_size == 0:
        return PackedMatrix(take(matrix.data.view(layout.strips, -1, STRIP, 4)).flatten(), taken)
    blocks = matrix.data.view(layout.strips, layout.padded_inputs // layout.group_size, -1)
    groups = blocks.shape[1]
    scales = take(blocks[..., : STRIP * 2].unflatten(-1, (STRIP, 2))).view(taken.strips, groups, -1)
    codes = take(blocks[..., STRIP * 2 :].reshape(layout.strips, -1, STRIP, 4)).view(taken.strips, groups, -1)
    return PackedMatrix(torch.cat([scales, codes], dim=-1).flatten(), taken)


def quantize(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round `[..., K]` to `scale * (code - 2**(bits - 1))`, one scale for each group along the last dimension.

    int8 spans the largest magnitude of the group. int4 tries several scales and keeps the one with the least squared
    error.

    Returns:
        Codes `uint8 [..., K]` (1..255 or 0..15) and scales `float16 [..., K / group_size]`.

    Raises:
        ValueError: a weight is NaN or infinite, or too large for a float16 scale.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(dim=-1)
    if not torch.isfinite(largest).all() or largest.max() > LARGEST_WEIGHT:
        count = int((~(groups.abs() <= LARGEST_WEIGHT)).sum())
        raise ValueError(
            f"{counted(count, 'weight')} of {groups.numel():,} cannot be stored in int{bits}: NaN, infinite or above "
            f"{LARGEST_WEIGHT}; leave int{bits} out to keep them as they are"
        )
    if bits == 8:
        scales = (largest / 127).half()
        return _codes(groups, scales, -127, 127).flatten(-2), scales
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    best_error = torch.full_like(largest, math.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(largest, dtype=torch.float16)
    # Codes reach -8 but only 7: a negative scale lets the largest weight, whatever its sign, take the -8.
    for steps in (-8.8, -8.4, -8.0, -7.6, 7.0, 7.4, 7.8):
        candidate = (extreme / steps).half()
        attempt = _codes(groups, candidate, -8, 7)
        error = ((attempt.float() - 8) * candidate.float().unsqueeze(-1) - groups).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scales = torch.where(better, candidate, scales)
        codes = torch.where(better.unsqueeze(-1), attempt, codes)
    return codes.flatten(-2), scales


def _codes(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The nearest codes under these scales, shifted to be unsigned; the code of 0 where the scale underflowed to 0."""
    scale = scales.float().unsqueeze(-1)
    steps = torch.where(scale == 0, 0.0, groups / scale)
    return (steps.round().clamp(low, high) + (128 if low < -8 else 8)).to(torch.uint8)


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix of a linear map `y = W x`; `data` is `uint8 [layout.num_bytes]`."""

    data: Tensor
    layout: MatrixLayout

    def unpack(self) -> Tensor:
        """The float32 `[N, K]` that the kernels multiply with."""
        return unpack_matrix(self.data, self.layout)

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store; `from_tensors` takes them back."""
        o = self.layout
        return {"data": self.data, "layout": torch.tensor([FORMATS[o.format], o.outputs, o.inputs, o.group_size])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PackedMatrix:
        """Raises `ValueError` when the stored bytes do not fit the stored layout."""
        format, outputs, inputs, group_size = tensors["layout"].tolist()
        layout = MatrixLayout(list(FORMATS)[format], outputs, inputs, group_size)
        return cls(checked_storage(tensors["data"], (layout.num_bytes,)), layout)


def pack_linear(weight: Tensor, *, format: str = "bf16", group_size: int = DEFAULT_GROUP_SIZE) -> PackedMatrix:
    """Pack the weight `[outputs, inputs]` of a linear map. Raises `ValueError` for an unknown format or group size."""
    if weight.ndim != 2:
        raise ValueError(f"a linear weight is [outputs, inputs], got shape {tuple(weight.shape)}")
    layout = MatrixLayout.choose(format, weight.shape[0], weight.shape[1], group_size)
    data = empty_huge(layout.num_bytes)
    return PackedMatrix(data.copy_(pack_matrix(weight, layout)), layout)


@dataclass(frozen=True)
class PackedExperts:
    """All experts of a layer; `data` is `uint8 [E, bytes]`: each expert's up, (gate) and down matrix in a row."""

    data: Tensor
    up: MatrixLayout
    down: MatrixLayout
    gated: bool

    @property
    def num_experts(self) -> int:
        return self.data.shape[0]

    @property
    def width(self) -> int:
        return self.up.outputs

    @property
    def hidden_size(self) -> int:
        return self.up.inputs

    @property
    def padding_bytes(self) -> int:
        """Bytes of `data` that are neither a weight nor a scale of one."""
        return self.num_experts * (self.up.padding_bytes * (2 if self.gated else 1) + self.down.padding_bytes)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(up, down, gate)` as float32 `[E, F, D]`: the values that the kernels multiply with."""
        size = self.up.num_bytes
        up = torch.stack([unpack_matrix(row[:size], self.up) for row in self.data])
        down = torch.stack([unpack_matrix(row[-self.down.num_bytes :], self.down).T for row in self.data])
        if not self.gated:
            return up, down, None
        return up, down, torch.stack([unpack_matrix(row[size : 2 * size], self.up) for row in self.data])

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store; `from_tensors` takes them back."""
        up, down = self.up, self.down
        layout = [FORMATS[up.format], up.outputs, up.inputs, up.group_size, down.group_size, int(self.gated)]
        return {"data": self.data, "layout": torch.tensor(layout)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PackedExperts:
        """Raises `ValueError` when the stored bytes do not fit the stored layout."""
        format, width, hidden_size, group_in, group_hidden, gated = tensors["layout"].tolist()
        name = list(FORMATS)[format]
        up = MatrixLayout(name, width, hidden_size, group_in)
        down = MatrixLayout(name, hidden_size, width, group_hidden)
        size = up.num_bytes * (2 if gated else 1) + down.num_bytes
        return cls(checked_storage(tensors["data"], (tensors["data"].shape[0], size)), up, down, bool(gated))


def pack_experts(
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
    format: str = "bf16",
    group_size: int = DEFAULT_GROUP_SIZE,
) -> PackedExperts:
    """Pack expert weights `[E, F, D]` (see `blockffn.ops.sparse_ffn`) for the CPU kernels.

    Raises:
        ValueError: shapes differ, `format` is not f32, bf16, int8 or int4, or `group_size` is not 32, 64 or 128.
    """
    E, width, hidden_size = up_proj_EFD.shape
    for name, tensor in (("down_proj", down_proj_EFD), ("gate_proj", gate_proj_EFD)):
        if tensor is not None and tensor.shape != up_proj_EFD.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(E, width, hidden_size)}")
    up = MatrixLayout.choose(format, width, hidden_size, group_size)
    down = MatrixLayout.choose(format, hidden_size, width, group_size)
    size = up.num_bytes * (1 if gate_proj_EFD is None else 2) + down.num_bytes
    data = empty_huge(E * size).view(E, size)
    for e in range(E):
        inputs = [up_proj_EFD[e]] if gate_proj_EFD is None else [up_proj_EFD[e], gate_proj_EFD[e]]
        torch.cat([*(pack_matrix(w, up) for w in inputs), pack_matrix(down_proj_EFD[e].T, down)], out=data[e])
    return PackedExperts(data, up, down, gate_proj_EFD is not None)


def checked_storage(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`data` if it is what the layout says, moved to an aligned address if a file mapped it to an odd one.

    Raises:
        ValueError: another dtype or shape, or not contiguous.
    """
    if data.dtype != torch.uint8 or tuple(data.shape) != shape or not data.is_contiguous():
        raise ValueError(f"packed weights are {data.dtype} {tuple(data.shape)}, their layout needs uint8 {shape}")
    if data.data_ptr() % 64 == 0:
        return data
    return empty_huge(data.numel()).view(shape).copy_(data)


def relative_error(weight: Tensor, stored: Tensor) -> float:
    """`|weight - stored| / |weight|` in the Frobenius norm."""
    return float((weight.double() - stored.double()).norm() / weight.double().norm())


@dataclass(frozen=True)
class StoredWeight:
    """A tensor, the format it is stored in and what that costs in accuracy.

    Attributes:
        num_bytes: as stored, with scales and padding.
        error: relative, in the Frobenius norm.
        padding_bytes: those of `num_bytes` that fill up strips and groups of a packed matrix.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    num_bytes: int
    error: float
    padding_bytes: int = 0
