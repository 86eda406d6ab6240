"""A lift for experts that nothing activates: ReLU gives them no gradient, so they never come back by themselves."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockffn.objectives.counts import check_layout, full_precision, masked_mean, valid_tokens


def dead_experts(
    logits: Tensor,
    *,
    margin: float = 0.1,
    document_ids: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Mean over rows and experts of `max(0, margin - max_tokens(logits))`: 0 once a token of the row is that active.

    Of an expert that no token of a row activates, the nearest token is drawn to it; experts in use receive nothing.
    For routers with a ReLU, where a logit above 0 means active. Our own; the paper has no remedy for dead experts.

    Args:
        logits: `[B, T, E]`, before the router's activation.
        margin: how active the nearest token shall be; the sigmoid of activation locality calls 0.1 active.
        document_ids: `[B, T]`, -1 for padding; `None`: no padding.
        normalizer: number of rows (with a token) of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 logits); 0 if there is no token.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(logits, document_ids)
    if not logits.shape[1]:
        return full_precision(logits).sum()
    logits, rows = full_precision(logits), None
    if document_ids is not None:
        valid = valid_tokens(document_ids)
        logits, rows = logits.masked_fill(~valid.unsqueeze(-1), float("-inf")), valid.any(dim=1)
        # A row without a token has no maximum; it is not counted, and its gradient must not be NaN.
        logits = logits.masked_fill(~rows[:, None, None], 0.0)
    losses = F.relu(margin - logits.amax(dim=1)).mean(dim=-1)
    return masked_mean(losses, rows, normalizer)
