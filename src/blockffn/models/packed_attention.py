"""Attention over packed rows without a mask, as an implementation that Hugging Face's attention table knows under the
name `packed`.

A mask of document boundaries keeps SDPA from its fast kernels. Rows that are one document each need none, and for
others there are kernels that take the boundaries themselves. For training in 16 bits on a GPU: no cache, no padding
mask, no dropout.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"
HAS_KERNELS = importlib.util.find_spec("torch.nn.attention.varlen") is not None


def suits_packed_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run for tensors of this device and dtype, with gradients."""
    half = dtype in (torch.bfloat16, torch.float16)
    return HAS_KERNELS and half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def document_offsets(document_ids: Tensor) -> Tensor:
    """Where documents begin in rows `[B, T]` laid end to end: `[N + 1]` int32; the last entry is `B * T`.

    A stretch of padding counts as a document of its own. If each row is one document, and only then, there are `B + 1`
    entries: whoever takes them can tell by the shape. Otherwise the last one is repeated up to a multiple of 64 (such
    documents are empty), so that shapes rarely change. Waits for the device: call it on the CPU, before the rows move.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    begin = starts.flatten().nonzero().squeeze(-1)
    rows, entries = len(document_ids), len(begin) + 1
    if entries > rows + 1:
        entries += -entries % 64
        entries += 64 if entries == rows + 1 else 0
    return torch.cat((begin, begin.new_full((entries - len(begin),), document_ids.numel()))).int()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_offsets: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents.

    Args:
        query: `[B, H, T, K]`; key `[B, H', T, K]`; value `[B, H', T, W]` with `W <= K`.
        document_offsets: `[N + 1]` int32, of the function of this name.

    Returns:
        `[B, T, H, W]` in the dtype of `value`, and no probabilities.
    """
    if len(document_offsets) == len(query) + 1:
        return _attend_to_rows(query, key, value), None
    from torch.nn.attention.varlen import varlen_attn

    batch, length, width = value.shape[0], value.shape[2], value.shape[3]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # The kernels want one width; zero columns of the values change nothing and are cut off again.
    value = F.pad(value, (0, query.shape[-1] - width))
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    causal: dict[str, Any] = {"is_causal": True} if _TAKES_IS_CAUSAL else {"window_size": (-1, 0)}
    attend: Any = varlen_attn  # its signature changes between versions
    out = attend(query, key, value, document_offsets, document_offsets, length, length, **causal)
    return out.unflatten(0, (batch, length))[..., :width], None


def _attend_to_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = query.to(value.dtype), key.to(value.dtype)
    # cuDNN's kernels are the fastest on Hopper, and take values narrower than the keys.
    with sdpa_kernel(
        [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        set_priority=True,
    ):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out.transpose(1, 2)


def _takes_is_causal() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "is_causal" in inspect.signature(varlen_attn).parameters


_TAKES_IS_CAUSAL = HAS_KERNELS and _takes_is_causal()  # torch 2.10 and 2.11; newer ones say it by the window

ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
