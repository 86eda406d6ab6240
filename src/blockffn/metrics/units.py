"""What sparsity counts: windows and neighbouring pairs of tokens of one document, and what is active in them.

`document_ids [B, T]` marks documents and, with -1, padding. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def documents_of(weights: Tensor, document_ids: Tensor | None) -> Tensor:
    """`document_ids`, or zeros for rows that are one document each. Raises `ValueError` on wrong shapes."""
    if weights.ndim != 3:
        raise ValueError(
            f"routing weights must have shape [B, T, E], got {list(weights.shape)}; add the missing dimension"
        )
    if document_ids is None:
        return torch.zeros(weights.shape[:2], dtype=torch.long, device=weights.device)
    if document_ids.shape != weights.shape[:2]:
        raise ValueError(f"document_ids must have shape {list(weights.shape[:2])}, got {list(document_ids.shape)}")
    return document_ids


def check_window(window: int) -> None:
    """Raises `ValueError` unless `window` is positive."""
    if window < 1:
        raise ValueError(f"a window must hold at least 1 position, got {window}")


def complete_windows(document_ids: Tensor, window: int) -> Tensor:
    """`[B, T // window]` bool: all positions of the window hold tokens of one document."""
    ids = _grouped(document_ids, window)
    first = ids[..., :1]
    return ((ids == first) & (first >= 0)).all(dim=-1)


def window_unions(active: Tensor, window: int) -> Tensor:
    """`[B, T, E]` bool to `[B, T // window, E]`: experts active for any token of the window."""
    return active if window == 1 else _grouped(active, window).any(dim=2)


def neighbour_reuse(active: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair of neighbours `[B, T - 1]`: the reused share (float64, 0 if not counted), and whether it counts."""
    left, right = active[:, :-1], active[:, 1:]
    num_active = left.sum(dim=-1)
    one_document = (document_ids[:, :-1] == document_ids[:, 1:]) & (document_ids[:, 1:] >= 0)
    counted = one_document & (num_active > 0)
    ratios = (left & right).sum(dim=-1).double() / num_active.clamp(min=1)
    return torch.where(counted, ratios, 0), counted


def _grouped(x: Tensor, window: int) -> Tensor:
    """`[B, T, ...]` to `[B, T // window, window, ...]`; positions that fill no window are cut off."""
    num_windows = x.shape[1] // window
    return x[:, : num_windows * window].unflatten(1, (num_windows, window))
