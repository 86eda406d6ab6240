"""The sparse FFN on the CPU: native kernels over plain or packed experts.

A token's result does not depend on the other tokens of the call nor on the number of threads: both ops are
batch-invariant. They compute in float32 (packed int8 and int4: integer products within a group) and are not
differentiable.
"""

from __future__ import annotations

import functools
import math
from ctypes import pointer

import torch
from torch import Tensor

from blockffn.ops import native
from blockffn.ops.native import DTYPES, FORMATS
from blockffn.ops.quantization import PackedExperts
from blockffn.ops.registration import define

# (most tokens, share of active pairs) up to which the kernels over plain experts are not slower than torch's dense
# product, measured by `benchmarks/ops.py --crossing` on processors without bf16 products, whose dense bf16 product is
# slower at any number of tokens; float32 beyond 512 tokens is not measured.
SPARSE_SHARE_LIMITS = {
    torch.float32: ((8, 0.8), (16, 0.55), (64, 0.4), (512, 0.3)),
    torch.bfloat16: ((math.inf, 1.0),),
}
# Not measured: where torch has bf16 products, the dense product is soon limited by memory alone, and the kernels keep
# only what reading fewer bytes must win.
FAST_BF16_LIMITS = ((2, 0.8), (4, 0.25), (8, 0.1))


def refuses_plain(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> str | None:
    """Why the native kernels cannot take these plain tensors, or `None`."""
    tensors = [x_TD, up_proj_EFD, down_proj_EFD, weights_TE, *([] if gate_proj_EFD is None else [gate_proj_EFD])]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it needs tensors on the CPU"
    projections = [tensor for tensor in (up_proj_EFD, down_proj_EFD, gate_proj_EFD) if tensor is not None]
    if x_TD.dtype not in DTYPES or any(tensor.dtype != x_TD.dtype for tensor in projections):
        return f"it needs x and experts of one dtype, float32 or bfloat16; got {x_TD.dtype} and {up_proj_EFD.dtype}"
    if not all(tensor.is_contiguous() for tensor in projections):
        return "it needs contiguous expert weights"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient; use backend='dense', or torch.inference_mode()"
    return native.unavailable()


def pays_plain(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> bool:
    """Whether few enough (token, expert) pairs are active for the native kernels to beat the dense product."""
    if torch.compiler.is_compiling():
        return False  # the answer depends on data, which a traced graph cannot see
    num_tokens = x_TD.shape[0]
    limits = SPARSE_SHARE_LIMITS[x_TD.dtype]
    if x_TD.dtype == torch.bfloat16 and _torch_multiplies_bf16():
        limits = FAST_BF16_LIMITS
    limit = next((share for most_tokens, share in limits if num_tokens <= most_tokens), 0.0)
    return int(torch.count_nonzero(weights_TE)) <= limit * weights_TE.numel()


@functools.cache
def _torch_multiplies_bf16() -> bool:
    """Whether the processor has bf16 products, which make the dense product several times faster."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())


def sparse_ffn_cpu(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """Read the active rows of plain `[E, F, D]` experts."""
    result: Tensor = torch.ops.blockffn.sparse_ffn_plain(x_TD, up_proj_EFD, down_proj_EFD, weights_TE, gate_proj_EFD)
    return result


def refuses_packed(x_TD: Tensor, experts: PackedExperts, weights_TE: Tensor, threshold: float) -> str | None:
    """Why the native kernels cannot take these packed experts, or `None`."""
    if not (x_TD.is_cpu and experts.data.is_cpu):
        return "it needs tensors on the CPU"
    if x_TD.dtype not in DTYPES:
        return f"it needs float32 or bfloat16 tokens, got {x_TD.dtype}"
    if torch.is_grad_enabled() and (x_TD.requires_grad or weights_TE.requires_grad):
        return "packed experts have no gradient; use torch.inference_mode()"
    return native.unavailable()


def sparse_ffn_packed_cpu(x_TD: Tensor, experts: PackedExperts, weights_TE: Tensor, threshold: float) -> Tensor:
    """Read the active experts of a packed layer."""
    up, down = experts.up, experts.down
    result: Tensor = torch.ops.blockffn.sparse_ffn_packed.default(  # the overload by name: 2 µs less
        x_TD,
        experts.data,
        weights_TE,
        FORMATS[up.format],
        up.outputs,
        experts.gated,
        up.group_size,
        down.group_size,
        threshold,
    )
    return result


class PackedStep:
    """One packed layer bound to its buffers: what a decode loop calls for every token.

    Fill `x [T, D]` (float32 or bfloat16) and `weights [T, E]` (float32), call the step, read `y [T, D]`. A call costs
    about 3 µs besides the kernel, where the checked op costs about 20.

    Raises:
        ValueError: the dtype is not float32 or bfloat16, `threshold` is negative, or there are no native kernels.
    """

    def __init__(
        self, experts: PackedExperts, num_tokens: int, *, dtype: torch.dtype = torch.bfloat16, threshold: float = 0.0
    ) -> None:
        if dtype not in DTYPES or not threshold >= 0 or native.unavailable() is not None:
            problem = native.unavailable() or f"dtype {dtype} or threshold {threshold} is not supported"
            raise ValueError(f"PackedStep: {problem}")
        E, D = experts.num_experts, experts.hidden_size
        self.x = torch.zeros(num_tokens, D, dtype=dtype)
        self.weights = torch.zeros(num_tokens, E)
        self.y = torch.zeros(num_tokens, D, dtype=dtype)
        self._experts = experts  # keeps the memory that `_arguments` points to
        self._function = native.function("sparse_ffn")
        self._arguments = (
            _describe(*_description(experts)), num_tokens, DTYPES[dtype], self.x.data_ptr(), D,
            self.weights.data_ptr(), E, threshold, self.y.data_ptr(),
        )  # fmt: skip

    def __call__(self) -> None:
        native.check(self._function(*self._arguments), "sparse_ffn")


def _description(experts: PackedExperts) -> tuple[int, int, int, int, int, int, bool, int, int]:
    data, up, down = experts.data, experts.up, experts.down
    return (
        data.data_ptr(), data.shape[1], data.shape[0], up.outputs, up.inputs, FORMATS[up.format], experts.gated,
        up.group_size, down.group_size,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _describe(
    data: int, expert_bytes: int, num_experts: int, width: int, hidden_size: int, format: int, gated: bool,
    group_in: int, group_hidden: int,
) -> object:  # fmt: skip
    """The C description of packed experts; cached, because building it costs more than the call."""
    return pointer(
        native.Experts(data, expert_bytes, num_experts, width, hidden_size, format, gated, group_in, group_hidden)
    )


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The same matrix with each row contiguous, and the distance of its rows."""
    stride, inner = tensor.stride()
    return (tensor, stride) if inner == 1 else (tensor.contiguous(), tensor.shape[1])


def _run_packed(
    x_TD: Tensor,
    data: Tensor,
    weights_TE: Tensor,
    format: int,
    width: int,
    gated: bool,
    group_in: int,
    group_hidden: int,
    threshold: float,
) -> Tensor:
    T, D = x_TD.shape
    E, expert_bytes = data.shape
    weights_TE = weights_TE if weights_TE.dtype == torch.float32 else weights_TE.float()
    (x_TD, x_stride), (weights_TE, weights_stride) = _rows(x_TD), _rows(weights_TE)
    y_TD = x_TD.new_empty(T, D)
    experts = _describe(data.data_ptr(), expert_bytes, E, width, D, format, gated, group_in, group_hidden)
    status = native.function("sparse_ffn")(
        experts, T, DTYPES[x_TD.dtype], x_TD.data_ptr(), x_stride, weights_TE.data_ptr(), weights_stride,
        threshold, y_TD.data_ptr(),
    )  # fmt: skip
    if status:
        native.check(status, "sparse_ffn")
    return y_TD


def _run_plain(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, gate_proj_EFD: Tensor | None
) -> Tensor:
    E, width, D = up_proj_EFD.shape
    (x_TD, x_stride), (weights_TE, weights_stride) = _rows(x_TD), _rows(weights_TE.float())
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    gate = None if gate_proj_EFD is None else gate_proj_EFD.data_ptr()
    status = native.function("sparse_ffn_plain")(
        up_proj_EFD.data_ptr(), gate, down_proj_EFD.data_ptr(), E, width, D, x_TD.shape[0], DTYPES[x_TD.dtype],
        x_TD.data_ptr(), x_stride, weights_TE.data_ptr(), weights_stride, 0.0, y_TD.data_ptr(),
    )  # fmt: skip
    native.check(status, "sparse_ffn")
    return y_TD


define(
    "sparse_ffn_packed(Tensor x_TD, Tensor experts, Tensor weights_TE, int format, int width, bool gated, "
    "int group_in, int group_hidden, float threshold) -> Tensor",
    {"CPU": _run_packed},
    fake=lambda x_TD, *_: x_TD.new_empty(x_TD.shape),
)
define(
    "sparse_ffn_plain(Tensor x_TD, Tensor up_proj_EFD, Tensor down_proj_EFD, Tensor weights_TE, Tensor? gate_proj_EFD) "
    "-> Tensor",
    {"CPU": _run_plain},
    fake=lambda x_TD, *_: x_TD.new_empty(x_TD.shape),
)
