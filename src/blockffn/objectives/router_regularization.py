"""Penalties on single tokens: the L1 norm of the routing weights and the entropy of the shares."""

from __future__ import annotations

from torch import Tensor

from blockffn.objectives.counts import check_layout, full_precision, masked_mean, valid_tokens


def l1(weights: Tensor, *, document_ids: Tensor | None = None, normalizer: Tensor | float | None = None) -> Tensor:
    """Mean over tokens of `sum_i |weights_i|`.

    The published training code sums over tokens and layers and multiplies by 1e-8; fold that into the coefficient.

    Args:
        weights: `[B, T, E]`, what multiplies the experts.
        document_ids: `[B, T]`, -1 for padding; `None`: no padding.
        normalizer: number of tokens of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 weights); 0 if there is no token.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(weights, document_ids)
    norms = full_precision(weights).abs().sum(dim=-1)
    return masked_mean(norms, None if document_ids is None else valid_tokens(document_ids), normalizer)


def router_entropy(
    shares: Tensor, *, document_ids: Tensor | None = None, normalizer: Tensor | float | None = None
) -> Tensor:
    """Mean over tokens of `-sum_i shares_i · ln(shares_i + 1e-5)`, in nats: how widely a token spreads over experts.

    The constant, as in the published training code, keeps the gradient of an unused expert finite.

    Args:
        shares: `[B, T, E]` in [0, 1].
        document_ids: `[B, T]`, -1 for padding; `None`: no padding.
        normalizer: number of tokens of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 shares); 0 if there is no token.

    Raises:
        ValueError: wrong shapes.
    """
    check_layout(shares, document_ids)
    shares = full_precision(shares)
    entropies = -(shares * (shares + 1e-5).log()).sum(dim=-1)
    return masked_mean(entropies, None if document_ids is None else valid_tokens(document_ids), normalizer)
