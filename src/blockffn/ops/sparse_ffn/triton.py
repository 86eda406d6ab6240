"""The GPU backend: one token, a chunk of up to 64, or grouped products for more; the same op for inference and training.

Needs a CUDA device of compute capability 8.0 or newer, or the Triton interpreter (`TRITON_INTERPRET=1`, set before this module
is imported; bf16 products are wrong there). No launch synchronises with the host and every path can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from blockffn.ops.sparse_ffn.triton_chunk import MAX_CHUNK, chunk_tokens
from blockffn.ops.sparse_ffn.triton_decode import decode_token
from blockffn.ops.sparse_ffn.triton_grouped import PairList, grouped_backward, grouped_forward, list_pairs

MAX_EXPERTS = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse_ffn_triton(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """The sparse FFN on the GPU; shapes as in the op's contract, gradients in all four tensors.

    Only weights of active experts are read, each once for a chunk of up to 64 tokens. Gradients of inactive routing weights
    are 0, as in the reference. Results are bit-equal between runs for up to 64 tokens; beyond, and in gradients of `x`,
    float32 atomics leave the last bits free.

    Raises:
        ValueError: the device, a dtype, a width or a layout is not supported; the message names the remedy.
    """
    refuse_unsupported(x_TD, up_proj_EFD, down_proj_EFD, weights_TE, gate_proj_EFD)
    x_TD, weights_TE = x_TD.contiguous(), weights_TE.contiguous()
    tensors = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _GroupedFFN.apply(*tensors)
    T = x_TD.shape[0]
    if T == 0:
        return torch.empty_like(x_TD)
    pdl = _has_dependent_launch(x_TD.device)
    if T == 1:
        return decode_token(*tensors, pdl=pdl)
    if T <= MAX_CHUNK:
        return chunk_tokens(*tensors, pdl=pdl)
    return grouped_forward(*tensors, list_pairs(weights_TE), save=False)[0]


def refuse_unsupported(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, gate_proj_EFD: Tensor | None
) -> None:
    """Raise `ValueError` for what these kernels do not take."""
    E, F, D = up_proj_EFD.shape
    if gate_proj_EFD is not None:
        raise ValueError("sparse_ffn backend 'triton' has no gated experts; use backend='dense' with gate_proj")
    if x_TD.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"sparse_ffn backend 'triton' needs tensors on a CUDA device, got {x_TD.device}; use 'cpu' or 'dense'"
        )
    if x_TD.dtype not in DTYPES:
        raise ValueError(f"sparse_ffn backend 'triton' takes bfloat16, float16 or float32, got {x_TD.dtype}; convert x")
    for name, proj in (("up_proj", up_proj_EFD), ("down_proj", down_proj_EFD)):
        if proj.dtype != x_TD.dtype:
            raise ValueError(f"sparse_ffn: {name} is {proj.dtype} and x is {x_TD.dtype}; convert one to the other")
        if not proj.is_contiguous():
            raise ValueError(
                f"sparse_ffn: {name} is not contiguous; call .contiguous() once when the weights are loaded"
            )
    if D % 16 or F % 16:
        raise ValueError(
            f"sparse_ffn backend 'triton' needs D and F to be multiples of 16, got {D} and {F}; use 'dense'"
        )
    if E > MAX_EXPERTS:
        raise ValueError(f"sparse_ffn backend 'triton' takes up to {MAX_EXPERTS} experts, got {E}; use 'dense'")


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class _GroupedFFN(torch.autograd.Function):
    """Forward and backward through the grouped products; recomputes nothing, saves two rows of width F per active pair."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor) -> Tensor:
        pairs = list_pairs(weights_TE)
        y_TD, preact, hidden = grouped_forward(x_TD, up_proj_EFD, down_proj_EFD, weights_TE, pairs, save=True)
        ctx.save_for_backward(
            x_TD, up_proj_EFD, down_proj_EFD, weights_TE, preact, hidden, pairs.tokens_ET, pairs.counts_E
        )
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        *inputs, preact, hidden, tokens_ET, counts_E = ctx.saved_tensors
        return grouped_backward(dy_TD.contiguous(), *inputs, PairList(tokens_ET, counts_E), preact, hidden)
