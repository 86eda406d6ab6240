"""Balance: of load between experts, and of activity between neighbouring tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.objectives.counts import check_layout, full_precision, masked_mean, neighbour_pairs, valid_tokens


def load_balancing(
    shares: Tensor,
    weights: Tensor,
    *,
    document_ids: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Mean over rows of `E · sum_i mean_tokens(shares_i) · load_i`: 1 if the load is even, E if one expert has it all.

    `load_i` is expert i's part of the row's activations (`weights != 0`) and carries no gradient. The published
    training code takes both means over the whole micro-batch, and their product changes with the split into
    micro-batches. One product per row does not, and asks for balance within each sequence.

    Args:
        shares, weights: `[B, T, E]` of one router.
        document_ids: `[B, T]`, -1 for padding; `None`: no padding.
        normalizer: number of rows (with a token) of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 shares); 0 if there is no token.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(shares, document_ids)
    if weights.shape != shares.shape:
        raise ValueError(f"weights and shares must have one shape, got {list(weights.shape)} and {list(shares.shape)}")
    active, shares = weights != 0, full_precision(shares)
    rows = None
    if document_ids is None:
        mean_shares_BE = shares.sum(dim=1) / max(shares.shape[1], 1)
    else:
        valid = valid_tokens(document_ids)
        rows = valid.any(dim=1)
        active = active & valid.unsqueeze(-1)
        num_tokens = valid.sum(dim=1, keepdim=True).clamp(min=1)
        mean_shares_BE = torch.where(valid.unsqueeze(-1), shares, 0).sum(dim=1) / num_tokens
    num_active_BE = active.sum(dim=1)
    load_BE = num_active_BE / num_active_BE.sum(dim=1, keepdim=True).clamp(min=1)
    losses = shares.shape[-1] * (mean_shares_BE * load_BE).sum(dim=-1)
    return masked_mean(losses, rows, normalizer)


def token_balance(
    logits: Tensor,
    *,
    document_ids: Tensor | None = None,
    sharpness: float = 100.0,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Mean over neighbouring tokens of the squared difference of their activity `mean_i sigmoid(sharpness·logits_i)`.

    Args:
        logits: `[B, T, E]`, before the router's activation.
        document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
        sharpness: slope of the sigmoid that softens "active".
        normalizer: number of pairs of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 logits); 0 if there is no pair.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(logits, document_ids)
    activity = (sharpness * full_precision(logits)).sigmoid().mean(dim=-1)
    losses = (activity[:, 1:] - activity[:, :-1]).square()
    return masked_mean(losses, None if document_ids is None else neighbour_pairs(document_ids), normalizer)
