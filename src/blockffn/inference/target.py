"""What speculation asks of a model: a cache that can be extended tentatively by a chain or a tree of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Target(Protocol):
    """A model with a cache that can be extended tentatively by a chain or a tree of tokens. Batch 1."""

    vocab_size: int

    @property
    def length(self) -> int:
        """Committed tokens in the cache."""
        ...

    @property
    def capacity(self) -> int:
        """How many fit."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Step:
        """Run tokens `[T]` (int64) behind the committed ones, tentatively.

        Args:
            parents: `[T]` int64 indices into this call, `parents[i] < i` (-1: the last committed token); `None`: a
                chain. The position of a token is `length` plus its depth. A token attends to all committed tokens,
                itself and its ancestors.

        Nothing is committed yet; a second `extend` without `commit` is an error.
        """
        ...

    def commit(self, kept: Tensor) -> None:
        """Keep indices `[K]` into the last `extend`, a path from a root in order; the other rows vanish."""
        ...


@dataclass(frozen=True)
class Step:
    """What one `extend` of `T` tokens gave.

    Attributes:
        logits: `[T, V]` float32.
        hidden: `[T, D]` final hidden states after the last norm (what the head's input is made of).
        union: `[L]` int64, experts that the tokens activate together, per sparse layer; `None` for dense models.
        active: `[L, T]` experts active per token.
    """

    logits: Tensor
    hidden: Tensor
    union: Tensor | None = None
    active: Tensor | None = None
