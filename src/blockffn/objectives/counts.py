"""What an objective counts: tokens, neighbouring pairs, chunks and rows of a packed batch.

`document_ids [B, T]` says which document each position of a row belongs to: equal ids are one document and lie side by
side, -1 is padding. `None` stands for rows that are one document each, without padding. Pairs and chunks never cross
documents, and padding is never counted.

Every objective is a sum over such units divided by their number. The number may be that of the whole optimisation step
(all micro-batches, all ranks), so that the terms of its parts add up to the term of the whole. Nothing here waits for
the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def objective_counts(document_ids: Tensor, *, chunk_length: int | None = None) -> dict[str, Tensor]:
    """Numbers of units in a batch, to be summed over the micro-batches and ranks of an optimisation step.

    Args:
        document_ids: `[B, T]` integers, -1 for padding.
        chunk_length: positions per chunk; `None` leaves `num_chunks` out. T need not be a multiple: only the objective
            that uses chunks insists on it.

    Returns:
        0-d int64 tensors `num_tokens`, `num_pairs` (neighbours in one document), `num_rows` (rows with a token) and
        `num_chunks` (parts of a window of `chunk_length` positions that belong to one document).

    Raises:
        ValueError: `document_ids` is not a matrix, or `chunk_length` is below 1.
    """
    if document_ids.ndim != 2:
        raise ValueError(f"document_ids must have shape [B, T], got {list(document_ids.shape)}")
    valid = valid_tokens(document_ids)
    counts = {
        "num_tokens": valid.sum(),
        "num_pairs": neighbour_pairs(document_ids).sum(),
        "num_rows": valid.any(dim=1).sum(),
    }
    if chunk_length is not None:
        if chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1, got {chunk_length}")
        counts["num_chunks"] = chunk_starts(document_ids, chunk_length).sum()
    return counts


def valid_tokens(document_ids: Tensor) -> Tensor:
    """`[B, T]` bool: not padding."""
    return document_ids >= 0


def neighbour_pairs(document_ids: Tensor) -> Tensor:
    """`[B, T - 1]` bool: positions t and t + 1 are tokens of one document."""
    return (document_ids[:, :-1] == document_ids[:, 1:]) & valid_tokens(document_ids[:, 1:])


def chunk_starts(document_ids: Tensor, chunk_length: int) -> Tensor:
    """`[B, T]` bool: first token of its document within its window of `chunk_length` positions."""
    first_in_document = torch.ones_like(document_ids, dtype=torch.bool)
    first_in_document[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    return valid_tokens(document_ids) & (first_in_document | (position % chunk_length == 0))


def masked_mean(values: Tensor, mask: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """Sum of `values` where `mask` holds, over the number of those places or over `normalizer`; 0 if there are none."""
    counted = values if mask is None else torch.where(mask, values, 0)
    if normalizer is None:
        normalizer = values.numel() if mask is None else mask.sum()
    if isinstance(normalizer, Tensor):
        return counted.sum() / normalizer.to(values.dtype).clamp(min=1)
    return counted.sum() / max(normalizer, 1)


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if float64."""
    return x if x.dtype == torch.float64 else x.float()


def check_layout(x: Tensor, document_ids: Tensor | None) -> None:
    """Raises `ValueError` unless `x` is `[B, T, E]` and `document_ids`, if given, is `[B, T]`."""
    if x.ndim != 3:
        raise ValueError(f"routing tensors must have shape [B, T, E], got {list(x.shape)}; add the missing dimension")
    if document_ids is not None and document_ids.shape != x.shape[:2]:
        raise ValueError(
            f"document_ids must have shape {list(x.shape[:2])} as the tokens, got {list(document_ids.shape)}"
        )


def check_chunk_length(num_positions: int, chunk_length: int) -> None:
    """Raises `ValueError` unless rows of `num_positions` divide into chunks."""
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}")
    if num_positions % chunk_length:
        raise ValueError(
            f"rows of {num_positions} positions do not divide into chunks of {chunk_length}; "
            f"choose a sequence length that is a multiple of {chunk_length}, or another chunk_length"
        )
