"""Where speculative and plain decoding part, and whether rounding can explain it.

A target that computes a token differently alone and among others (another order of sums) may choose differently where
two logits nearly tie. The margin tells such a case from a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """The first position at which two decodings differ.

    Attributes:
        position: counted in new tokens.
        speculative, plain: tokens there; `None` where that text had ended.
        margin: plain logit of the plain token minus that of the speculative one.
        scale: largest plain logit minus the mean; the margin's measure.
    """

    position: int
    speculative: int | None
    plain: int | None
    margin: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        text = (
            f"speculative and plain decoding differ first at new token {self.position}: "
            f"{self.speculative} instead of {self.plain}"
        )
        if self.margin is not None and self.scale is not None:
            text += f"; the plain logits are {self.margin:.3g} apart, at a scale of {self.scale:.3g}"
        return text


def first_difference(speculative: list[int], plain: list[int], plain_logits: list[Tensor]) -> Difference | None:
    """Compare two decodings; `plain_logits[i]` `[V]` are those that plain token `i` was chosen by."""
    for position, (ours, theirs) in enumerate(zip(speculative, plain)):
        if ours != theirs:
            logits = plain_logits[position].float()
            margin = float(logits[theirs] - logits[ours])
            return Difference(position, ours, theirs, margin, float(logits.max() - logits.mean()))
    if len(speculative) == len(plain):
        return None
    position = min(len(speculative), len(plain))
    return Difference(position, *(text[position] if position < len(text) else None for text in (speculative, plain)))
