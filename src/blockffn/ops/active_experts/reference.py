"""The index of active experts in plain torch operations of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor


def active_experts_reference(weights_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(union_E, num_union, num_tokens_E, tokens_ET)` of `ActiveExperts`; runs on any device without a host sync."""
    active_TE = ~(weights_TE.abs() <= threshold)  # negated, so that NaN counts as active
    num_tokens_E = active_TE.sum(dim=0, dtype=torch.int32)
    in_union_E = num_tokens_E > 0
    num_union = in_union_E.sum(dtype=torch.int32)
    return (
        _compact(in_union_E, num_union),
        num_union,
        num_tokens_E,
        _compact(active_TE.T, num_tokens_E),
    )


def _compact(mask: Tensor, count: Tensor) -> Tensor:
    """Indices of the true entries along the last dimension, ascending, filled up with its length."""
    length = mask.shape[-1]
    indices = torch.argsort(mask.logical_not().to(torch.int8), dim=-1, stable=True).to(torch.int32)
    slots = torch.arange(length, device=mask.device, dtype=torch.int32)
    return indices.masked_fill(slots >= count.unsqueeze(-1), length)
