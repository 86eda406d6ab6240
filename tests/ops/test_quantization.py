"""Packing is exactly invertible, survives a file, and costs the accuracy that each format promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import (
    MatrixLayout,
    PackedExperts,
    PackedMatrix,
    pack_experts,
    pack_linear,
    pack_matrix,
    quantize,
    relative_error,
    unpack_matrix,
)

from .layers import Layer


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("shape", [(32, 64), (1, 1), (70, 100), (33, 129)])
@pytest.mark.parametrize("format", FORMATS)
def test_repacking_what_was_unpacked_changes_nothing(format: str, shape: tuple[int, int]) -> None:
    layout = MatrixLayout.choose(format, *shape)
    packed = pack_matrix(gaussian(*shape), layout)
    assert packed.numel() == layout.num_bytes
    stored = unpack_matrix(packed, layout)
    assert stored.shape == shape
    if format != "int4":  # int4 searches its scale, and may find another one for values that are already rounded
        assert torch.equal(unpack_matrix(pack_matrix(stored, layout), layout), stored)


# Relative error of Gaussian weights, measured, plus 2 %.
@pytest.mark.parametrize(
    ("format", "group_size", "bound"),
    [("f32", 64, 0), ("bf16", 64, 1.7e-3), ("int8", 32, 5.4e-3), ("int8", 64, 6.0e-3), ("int8", 128, 6.6e-3),
     ("int4", 32, 0.083), ("int4", 64, 0.092), ("int4", 128, 0.100)],
)  # fmt: skip
def test_error_of_each_format_is_as_measured(format: str, group_size: int, bound: float) -> None:
    weight = gaussian(256, 1024)
    error = relative_error(weight, pack_linear(weight, format=format, group_size=group_size).unpack())
    assert error <= bound
    assert error >= 0.95 * bound, "the format got better: tighten the bound"


def test_int4_beats_plain_rounding_to_the_largest_magnitude() -> None:
    groups = gaussian(64, 64)
    codes, scales = quantize(groups, bits=4, group_size=64)
    searched = relative_error(groups, (codes.float() - 8) * scales.float())
    scale = groups.abs().amax(dim=-1, keepdim=True) / 7
    assert searched < 0.95 * relative_error(groups, (groups / scale).round() * scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_tiny_weights_quantise_to_zero(bits: int) -> None:
    codes, scales = quantize(torch.tensor([[0.0] * 64, [1e-12] * 64]), bits=bits, group_size=64)
    assert (codes.float() - 2 ** (bits - 1)).mul(scales.float()).eq(0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_survive_a_file(tmp_path: Path, format: str, gated: bool) -> None:
    layer = Layer.random(1, 3, 40, 72)
    gate = layer.gate_proj_EFD if gated else None
    experts = pack_experts(layer.up_proj_EFD, layer.down_proj_EFD, gate_proj_EFD=gate, format=format, group_size=32)
    # A one-byte tensor first, so that the next one starts at an odd address.
    save_file({"first": torch.zeros(1, dtype=torch.uint8), **experts.tensors()}, tmp_path / "layer.safetensors")
    loaded = PackedExperts.from_tensors(load_file(tmp_path / "layer.safetensors"))
    assert (loaded.up, loaded.down, loaded.gated) == (experts.up, experts.down, experts.gated)
    assert torch.equal(loaded.data, experts.data)
    assert loaded.data.data_ptr() % 64 == 0
    for before, after in zip(experts.unpack(), loaded.unpack()):
        assert (before is None and after is None) or torch.equal(before, after)


def test_matrix_survives_a_file(tmp_path: Path) -> None:
    matrix = pack_linear(gaussian(50, 70), format="int4", group_size=128)
    save_file(matrix.tensors(), tmp_path / "matrix.safetensors")
    loaded = PackedMatrix.from_tensors(load_file(tmp_path / "matrix.safetensors"))
    assert torch.equal(loaded.unpack(), matrix.unpack())


def test_stored_bytes_that_do_not_fit_the_layout_are_refused() -> None:
    tensors = pack_linear(gaussian(32, 64), format="int8").tensors()
    with pytest.raises(ValueError, match="their layout needs uint8"):
        PackedMatrix.from_tensors({**tensors, "data": tensors["data"][:-1]})


@pytest.mark.parametrize(("format", "group_size", "named"), [("int3", 64, "'int3'"), ("int8", 48, "48")])
def test_unknown_formats_and_groups_are_refused(format: str, group_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack_linear(gaussian(32, 64), format=format, group_size=group_size)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"down_proj has shape \(2, 8, 4\)"):
        pack_experts(torch.zeros(2, 8, 5), torch.zeros(2, 8, 4))
    with pytest.raises(ValueError, match="outputs, inputs"):
        pack_linear(torch.zeros(3))


@pytest.mark.parametrize(
    ("format", "shape", "padding"),
    [
        ("int8", (64, 128), 0),
        ("int4", (64, 128), 0),
        ("int4", (16, 128), 16 * (128 // 2 + 2 * 2)),  # half a strip of rows, with their scales
        ("int8", (32, 16), 32 * 16),  # a group of 32 columns is half full; its scale is needed
        ("bf16", (40, 128), 24 * 128 * 2),
    ],
)
def test_padding_is_what_is_neither_weight_nor_scale(format: str, shape: tuple[int, int], padding: int) -> None:
    assert MatrixLayout.choose(format, *shape).padding_bytes == padding


def test_padding_of_experts_is_that_of_all_their_matrices() -> None:
    experts = pack_experts(gaussian(3, 16, 64), gaussian(3, 16, 64), gate_proj_EFD=gaussian(3, 16, 64), format="int4")
    up, down = MatrixLayout.choose("int4", 16, 64), MatrixLayout.choose("int4", 64, 16)
    assert experts.padding_bytes == 3 * (2 * up.padding_bytes + down.padding_bytes) > 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e6])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_weights_that_have_no_code_are_counted_and_refused(format: str, value: float) -> None:
    weight = gaussian(32, 64)
    weight[3, 4] = weight[5, 6] = value
    with pytest.raises(ValueError, match=f"2 weights of 2,048 cannot be stored in {format}.*leave {format} out"):
        pack_linear(weight, format=format)
