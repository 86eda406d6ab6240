"""Activation locality: neighbouring tokens should activate the same experts (arXiv 2507.08771, eq. 4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blockffn.objectives.counts import check_layout, full_precision, masked_mean, neighbour_pairs


def activation_locality(
    logits: Tensor,
    *,
    document_ids: Tensor | None = None,
    sharpness: float = 100.0,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Binary cross entropy between the softened activation patterns of neighbours.

    For tokens t and t + 1 of a document: `BCE(sigmoid(a·logits[t]), target=sigmoid(a·logits[t + 1]))` with sharpness
    `a`, averaged over experts and pairs. Both neighbours receive gradient. Its minimum, at equal patterns, is the
    entropy of `sigmoid(a·logits)` and not 0, so the objective also pushes logits away from 0.

    The paper leaves the sharpness open and the published training code takes 100. That code also counts pairs inside
    the padding that aligns documents to chunks; here padding never counts.

    Args:
        logits: `[B, T, E]`, before the router's activation.
        document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
        sharpness: slope of the sigmoid.
        normalizer: number of pairs of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 logits); 0 if there is no pair.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(logits, document_ids)
    # Recomputing in the backward pass keeps nothing but the logits, which the model holds anyway.
    losses = checkpoint(_pair_losses, logits, sharpness, use_reentrant=False, preserve_rng_state=False)
    return masked_mean(losses, None if document_ids is None else neighbour_pairs(document_ids), normalizer)


def _pair_losses(logits: Tensor, sharpness: float) -> Tensor:
    """`[B, T, E]` to the mean over experts of each pair of neighbours, `[B, T - 1]`."""
    scaled = sharpness * full_precision(logits)
    losses = F.binary_cross_entropy_with_logits(scaled[:, :-1], scaled[:, 1:].sigmoid(), reduction="none")
    return losses.mean(dim=-1)
