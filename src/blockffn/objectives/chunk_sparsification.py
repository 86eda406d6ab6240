"""Chunk sparsification: few experts should serve a whole chunk of tokens (arXiv 2507.08771, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blockffn.objectives.counts import (
    check_chunk_length,
    check_layout,
    chunk_starts,
    full_precision,
    masked_mean,
    valid_tokens,
)

# A share of 1 counts as 1 - 1e-6: ln(1 - p) and its gradient stay finite, and an unused expert still gives exactly 0.
_SATURATION = 1e-6


def chunk_sparsification(
    shares: Tensor,
    *,
    chunk_length: int = 64,
    document_ids: Tensor | None = None,
    aligned: bool = False,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Mean over chunks and experts of `1 - prod_k(1 - shares[k])`, k running over the tokens of a chunk.

    Read as a probability it says that the chunk needs the expert. A chunk is a window of `chunk_length` positions of a
    row. Where documents meet inside a window, each part is a chunk of its own.

    The published training code adds 1e-5 inside the logarithm, works in bf16 and averages over windows of pure padding
    too, which dilutes its value; here only chunks with a token count.

    Args:
        shares: `[B, T, E]` in [0, 1].
        chunk_length: positions per window.
        document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
        aligned: promises that no window holds two documents (each is padded to a multiple of `chunk_length`); cheaper.
        normalizer: number of chunks of the whole optimisation step; `None`: of this batch.

    Returns:
        0-d float32 (float64 for float64 shares); 0 if there is no chunk.

    Raises:
        ValueError: wrong shapes, or T is not a multiple of `chunk_length`.
    """
    check_layout(shares, document_ids)
    check_chunk_length(shares.shape[1], chunk_length)
    # Recomputing in the backward pass keeps nothing but the shares, which the model holds anyway.
    losses = checkpoint(
        _chunk_losses, shares, chunk_length, document_ids, aligned, use_reentrant=False, preserve_rng_state=False
    )
    if document_ids is None:
        mask = None
    elif aligned:
        mask = _windows(valid_tokens(document_ids), chunk_length).any(dim=2)
    else:
        mask = _windows(chunk_starts(document_ids, chunk_length), chunk_length)
    return masked_mean(losses, mask, normalizer)


def _chunk_losses(shares: Tensor, chunk_length: int, document_ids: Tensor | None, aligned: bool) -> Tensor:
    """Mean over experts: of each window `[B, W]`, or, where documents may meet, of each token's part `[B, W, L]`."""
    log_unused = torch.log1p(full_precision(shares) * (_SATURATION - 1))
    if document_ids is None:
        sums = _windows(log_unused, chunk_length).sum(dim=2)
    elif aligned:
        kept = torch.where(valid_tokens(document_ids).unsqueeze(-1), log_unused, 0)
        sums = _windows(kept, chunk_length).sum(dim=2)
    else:
        sums = _sums_over_document(_windows(log_unused, chunk_length), _windows(document_ids, chunk_length))
    return -torch.expm1(sums).mean(dim=-1)


def _windows(x: Tensor, chunk_length: int) -> Tensor:
    """`[B, T, ...]` to `[B, W, L, ...]`."""
    return x.unflatten(1, (x.shape[1] // chunk_length, chunk_length))


def _sums_over_document(values_BWLE: Tensor, document_ids_BWL: Tensor) -> Tensor:
    """At each position the sum over all positions of its document in its window, `[B, W, L, E]`.

    A product with the same-document matrix: deterministic, unlike a scatter, and exactly 0 for an expert that a part
    does not use, unlike differences of running sums.
    """
    same = document_ids_BWL.unsqueeze(-1) == document_ids_BWL.unsqueeze(-2)
    with torch.autocast(values_BWLE.device.type, enabled=False):
        return same.to(values_BWLE.dtype) @ values_BWLE
