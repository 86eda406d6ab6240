"""Balance: of load between experts, alone or within an L1 penalty, and of activity between neighbouring tokens."""

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
    mean_shares_BE, active_BE, rows = _row_means(full_precision(shares), weights != 0, document_ids)
    load_BE = active_BE / active_BE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(active_BE.dtype).tiny)
    losses = shares.shape[-1] * (mean_shares_BE * load_BE).sum(dim=-1)
    return masked_mean(losses, rows, normalizer)


def balanced_l1(
    weights: Tensor,
    *,
    num_experts_per_tok: int,
    document_ids: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """ReMoE's L1 penalty with load balancing (arXiv 2412.14711): busy experts pay more for their weight.

    Mean over rows of `(E / k) · sum_i mean_tokens(|weights_i|) · mean_tokens(weights_i != 0)`. With k active experts a
    token and an even load this is the mean over tokens of `sum_i |weights_i|`, the plain L1 penalty. The second factor
    carries no gradient. As in `load_balancing`, the product is taken per row and not per micro-batch.

    Args:
        weights: `[B, T, E]`, what multiplies the experts.
        num_experts_per_tok: k, the number of active experts that is aimed at.
        document_ids: `[B, T]`, -1 for padding; `None`: no padding.
        normalizer: number of rows (with a token) of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 weights); 0 if there is no token.

    Raises:
        ValueError: wrong shapes, or k below 1.
    """
    check_layout(weights, document_ids)
    if num_experts_per_tok < 1:
        raise ValueError(f"num_experts_per_tok must be at least 1, got {num_experts_per_tok}")
    mean_weights_BE, active_BE, rows = _row_means(full_precision(weights).abs(), weights != 0, document_ids)
    losses = weights.shape[-1] / num_experts_per_tok * (mean_weights_BE * active_BE).sum(dim=-1)
    return masked_mean(losses, rows, normalizer)


def _row_means(values: Tensor, active: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means over the tokens of each row, `[B, E]`, of `values` and of `active`, and `[B]` which rows have a token."""
    if document_ids is None:
        num_tokens = max(values.shape[1], 1)
        return values.sum(dim=1) / num_tokens, active.sum(dim=1).to(values.dtype) / num_tokens, None
    valid = valid_tokens(document_ids)
    num_tokens_B1 = valid.sum(dim=1, keepdim=True).clamp(min=1)
    valid_BT1 = valid.unsqueeze(-1)
    mean_values = torch.where(valid_BT1, values, 0).sum(dim=1) / num_tokens_B1
    mean_active = (active & valid_BT1).sum(dim=1).to(values.dtype) / num_tokens_B1
    return mean_values, mean_active, valid.any(dim=1)


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
