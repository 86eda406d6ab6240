"""How the published training code of BlockFFN counts windows, for comparison with its numbers only.

It lays the counted tokens of a batch end to end and cuts that line into windows, so a window may span two documents.
Counted are all tokens but the first of each document, together with the padding that aligns a document to a multiple of
the chunk length; the padding at the end of a row is not.

A batch says with -1 where padding is, not what it is for. Padding between two documents is taken as alignment of the
first, and all padding at the end of a row as tail, also the few positions that may have aligned its last document.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_line(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The line of counted tokens of a batch `[B, T]`.

    Returns:
        `order [1, B·T]`: positions of the flattened batch, counted ones first, in their order.
        `line_ids [1, B·T]`: 0 for the counted ones and -1 for the rest, as `document_ids` of that line.
    """
    valid = document_ids >= 0
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    latest = torch.where(valid, position, -1).cummax(dim=1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the latest token before each position
    first = valid & ((before < 0) | (document_ids.gather(1, before.clamp(min=0)) != document_ids))
    tail = ~valid.flip(1).cummax(dim=1).values.flip(1)
    counted = ((latest >= 0) & ~tail & ~first).reshape(1, -1)
    order = counted.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return order, torch.where(counted.gather(1, order), 0, -1)
