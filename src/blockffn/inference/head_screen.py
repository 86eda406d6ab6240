"""A coarse copy of the language-model head, by which a native step finds the largest logits without reading the whole.

Every row of the copy carries the norm of its error. That bounds how far a coarse logit is from the true one, so rows
which cannot be among the largest are told for certain, and only the others are computed as the head stores them
(`native/screening.h`). The largest logits are bit for bit those of the whole head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.ops.native import MAX_BEST, empty_huge
from blockffn.ops.quantization import STRIP, MatrixLayout, PackedMatrix, pack_matrix, unpack_matrix

# Formats of a screen for each of a head: those that are smaller.
SCREEN_FORMATS = ("int8", "int4")
SCREENS = {"f32": SCREEN_FORMATS, "bf16": SCREEN_FORMATS, "int8": ("int4",), "int4": ()}
ROWS = 4096  # packed at a time
REST = 64  # steps with the whole head, where screening did not pay
RECENT = 8  # screened steps that count


@dataclass(frozen=True)
class HeadScreen:
    """The copy, and `errors` `[strips, 2, 32]`: norms of `head - copy` and of the head's rows, rounded up."""

    matrix: PackedMatrix
    errors: Tensor

    @classmethod
    def of(cls, head: PackedMatrix, format: str, *, group_size: int) -> HeadScreen:
        """Of a packed head; the group is the head's own if it has one.

        Raises:
            ValueError: the format is not smaller than the head's, or the head cannot be quantised.
        """
        layout = head.layout
        if format not in SCREENS[layout.format]:
            smaller = ", ".join(SCREENS[layout.format]) or "no format"
            raise ValueError(
                f"a head in {layout.format} cannot be screened in {format!r}: of the formats of a screen {smaller} is "
                "smaller; leave screen_head out, or store the head in more bits"
            )
        packed = MatrixLayout.choose(format, layout.outputs, layout.inputs, layout.group_size or group_size)
        data = empty_huge(packed.num_bytes)
        errors = torch.empty(layout.strips, 2, STRIP)
        bytes_per_strip = (layout.num_bytes // layout.strips, packed.num_bytes // packed.strips)
        for first in range(0, layout.strips, ROWS // STRIP):
            last = min(first + ROWS // STRIP, layout.strips)
            rows = min(last * STRIP, layout.outputs) - first * STRIP
            own, coarse = (MatrixLayout(o.format, rows, o.inputs, o.group_size) for o in (layout, packed))
            weight = unpack_matrix(head.data[first * bytes_per_strip[0] : last * bytes_per_strip[0]], own)
            piece = data[first * bytes_per_strip[1] : last * bytes_per_strip[1]].copy_(pack_matrix(weight, coarse))
            norms = torch.zeros(2, (last - first) * STRIP)
            norms[0, :rows] = (weight - unpack_matrix(piece, coarse)).double().norm(dim=-1)
            norms[1, :rows] = weight.double().norm(dim=-1)
            errors[first:last] = norms.view(2, -1, STRIP).transpose(0, 1) * (1 + 1e-6)
        return cls(PackedMatrix(data, packed), errors)


class Screening:
    """When a target screens: in steps of which few logits are needed, while it reads less than the whole head would.

    Args:
        coarse_share: bytes of the screen in those of the head.
    """

    def __init__(self, coarse_share: float) -> None:
        self._most = 1 - coarse_share
        self._share = 0.0  # of the head that recent steps read beside its screen
        self._rest = 0
        self.best: int | None = None

    def ask(self, best: int | None) -> None:
        """So many of the largest logits are needed from here on; `None`: all of them."""
        self.best = best if best is not None and best <= MAX_BEST else None

    def num_exact(self) -> int:
        """What the next step is asked for; 0: all logits."""
        if self.best is None:
            return 0
        if self._rest:
            self._rest -= 1
            return 0
        return self.best

    def observe(self, share: float) -> None:
        """A screened step read this share of the head."""
        self._share += (share - self._share) / RECENT
        if self._share > self._most:
            self._share, self._rest = self._most, REST
