"""`Batch`: packed rows of tokens as the model, the objectives and the metrics take them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows. A segment is (a piece of) one document; several lie in a row, each padded to the alignment.

    Attributes:
        input_ids: `[B, T]` int64 token ids; the pad token at padding.
        labels: `[B, T]` int64, `input_ids` where the token is to be predicted and -100 elsewhere: at padding and at the
            first token of every segment. Not shifted, the loss shifts (Hugging Face's convention).
        position_ids: `[B, T]` int64; restart at every segment and count on through padding.
        document_ids: `[B, T]` int32; 0, 1, 2, … for the segments of a row, -1 at every padding token.
        source_ids: `[B, T]` int16; index into the manifest's source names, -1 at padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    source_ids: Tensor

    @property
    def num_target_tokens(self) -> int:
        """Number of tokens that the loss counts. On a GPU this waits for the device."""
        return int((self.labels != IGNORED_LABEL).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(to_device(getattr(self, f.name), device) for f in fields(self)))

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` (exclusive) as a view, for micro-batches."""
        return Batch(*(getattr(self, f.name)[start:stop] for f in fields(self)))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on another device; to a GPU through pinned memory, since from other memory a copy waits for the GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
