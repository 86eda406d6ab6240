"""What proposes draft tokens: n-grams of the context, a small model, an EAGLE head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import DraftTree


class Drafter(Protocol):
    """Proposes what may follow a context. It may be wrong; it cannot change what is decoded.

    `deterministic`: its trees are chosen without chance, given the context.
    """

    @property
    def deterministic(self) -> bool: ...

    def start(self, prompt: Sequence[int]) -> None:
        """Begin a new text with these tokens; everything before is forgotten.

        The list may grow afterwards, here and below: copy what is kept.
        """
        ...

    def propose(self, context: Sequence[int], budget: Budget) -> DraftTree:
        """A tree behind `context`, whose last token the target has not seen yet."""
        ...

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Tokens that the target has committed since the last call (first the prompt), with their final hidden
        states `[T, D]`."""
        ...
