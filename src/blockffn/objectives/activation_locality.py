"""Activation locality: neighbouring tokens should activate the same experts (arXiv 2507.08771, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    losses: Tensor = _PairLosses.apply(logits, sharpness)
    return masked_mean(losses, None if document_ids is None else neighbour_pairs(document_ids), normalizer)


class _PairLosses(torch.autograd.Function):
    """`[B, T, E]` logits to each pair's mean over experts `[B, T - 1]`.

    Plain autograd would keep several float32 copies of the logits per layer. This keeps the logits alone, which the
    model holds anyway, and one sigmoid of them serves both sides of all pairs:
    with `z = a·logits`, `y = sigmoid(z)` the loss is `softplus(z_t) - z_t·y_{t+1}`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.sharpness = sharpness
        scaled = sharpness * full_precision(logits)
        left, target = scaled[:, :-1], scaled[:, 1:].sigmoid()
        # Below -40 softplus is 0 in any precision that matters, and its exponential is denormal: slow on CPUs.
        return (F.softplus(left.clamp(min=-40)) - left * target).mean(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        scaled = ctx.sharpness * full_precision(logits)
        soft = scaled.sigmoid()
        target = soft[:, 1:]
        grad_left = soft[:, :-1] - target
        grad_target = scaled[:, :-1] * target * (target - 1)
        factor = (grad_losses * (ctx.sharpness / logits.shape[-1])).unsqueeze(-1)
        grad = F.pad(factor * grad_left, (0, 0, 0, 1)) + F.pad(factor * grad_target, (0, 0, 1, 0))
        return grad.to(logits.dtype), None
