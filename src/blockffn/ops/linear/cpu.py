"""The packed linear map on the CPU. Not differentiable; a token's result does not depend on the other tokens."""

from __future__ import annotations

import functools
from ctypes import pointer

import torch
from torch import Tensor

from blockffn.ops import native
from blockffn.ops.native import DTYPES, FORMATS
from blockffn.ops.quantization import PackedMatrix
from blockffn.ops.registration import define


def refuses(x_TK: Tensor, weight: PackedMatrix) -> str | None:
    """Why the native kernels cannot take these arguments, or `None`."""
    if x_TK.device.type != "cpu" or weight.data.device.type != "cpu":
        return "it needs tensors on the CPU"
    if x_TK.dtype not in DTYPES:
        return f"it needs float32 or bfloat16 tokens, got {x_TK.dtype}"
    if torch.is_grad_enabled() and x_TK.requires_grad:
        return "packed weights have no gradient; use torch.inference_mode()"
    return native.unavailable()


def linear_cpu(x_TK: Tensor, weight: PackedMatrix) -> Tensor:
    """Stream the packed matrix once for all tokens."""
    layout = weight.layout
    result: Tensor = torch.ops.blockffn.linear_packed(
        x_TK, weight.data, FORMATS[layout.format], layout.outputs, layout.group_size
    )
    return result


@functools.lru_cache(maxsize=4096)
def _describe(data: int, outputs: int, inputs: int, format: int, group: int) -> object:
    """The C description of a packed matrix; cached, because building it costs more than the call."""
    return pointer(native.Matrix(data, outputs, inputs, format, group))


def _run(x_TK: Tensor, data: Tensor, format: int, outputs: int, group: int) -> Tensor:
    T, K = x_TK.shape
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    y_TN = torch.empty((T, outputs), dtype=x_TK.dtype)
    matrix = _describe(data.data_ptr(), outputs, K, format, group)
    status = native.function("linear")(matrix, T, DTYPES[x_TK.dtype], x_TK.data_ptr(), x_TK.stride(0), y_TN.data_ptr())
    native.check(status, "linear")
    return y_TN


define(
    "linear_packed(Tensor x_TK, Tensor matrix, int format, int outputs, int group) -> Tensor",
    {"CPU": _run},
    fake=lambda x_TK, matrix, format, outputs, group: x_TK.new_empty((x_TK.shape[0], outputs)),
)
