"""What every decoding loop asks of a model: a cache that is extended tentatively and committed in part.

Plain decoding extends by one token and commits it. Speculation extends by a tree of drafts and commits the path that
was accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from blockffn.wording import counted


class Target(Protocol):
    """A model with a cache that can be extended tentatively by a chain or a tree of tokens. Batch 1."""

    vocab_size: int

    @property
    def length(self) -> int:
        """Committed tokens in the cache."""
        ...

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def extend(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Step:
        """Run tokens without committing any. A second extend without commit is an error.

        The position of a token is `length` plus its depth. It attends to all committed tokens, itself and its
        ancestors.

        Args:
            parents: of each token an index into this call with `parents[i] < i`, -1 for the last committed token;
                `None`: a chain.
        """
        ...

    def commit(self, kept: Sequence[int]) -> None:
        """Commit tokens of the last extend; the others vanish.

        Args:
            kept: indices into the last extend: a path from a root, in order.
        """
        ...


class Step:
    """What running `T` tokens gave.

    Args:
        vocab_size: where the rows of `logits` are wider, as kernels write them: what lies behind is left out when they
            are asked for. Greedy decoding knows `choices` and never asks.

    Attributes:
        logits: `[T, V]` float32.
        hidden: `[T, D]`, final hidden states after the last norm: what the head's input is made of; in float32 or the
            dtype of the model.
        union: `[L]` int64, experts that the tokens activate together, per layer with experts; `None` for dense models.
        active: `[L, T]` int64, experts active per token; `None` for dense models.
        head_share: share of the head that was read as it is stored; `None`: the target always reads it whole.
        choices: the first token with the largest logit behind each of the `T`, where the target was asked for the best
            one alone (`ask_best`, `expect_choices`) and knows it; `None`: see `logits`.
    """

    __slots__ = ("_logits", "_vocab_size", "active", "choices", "head_share", "hidden", "union")

    def __init__(
        self,
        logits: Tensor,
        hidden: Tensor,
        union: Tensor | None = None,
        active: Tensor | None = None,
        *,
        head_share: float | None = None,
        choices: list[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._logits, self._vocab_size = logits, vocab_size
        self.hidden, self.union, self.active = hidden, union, active
        self.head_share, self.choices = head_share, choices

    @property
    def logits(self) -> Tensor:
        return self._logits if self._vocab_size is None else self._logits[:, : self._vocab_size]


def prefill(target: Target, tokens: Sequence[int]) -> Step:
    """Commit a prompt. The step has the logits of the last token only, `[1, V]`, and the hidden states of all.

    A target that can do this in less memory has a method `prefill` of its own, which is called instead.
    """
    own = getattr(target, "prefill", None)
    if own is not None:
        step: Step = own(tokens)
        return step
    step = target.extend(tokens)
    target.commit(range(len(tokens)))
    return Step(step.logits[-1:], step.hidden, step.union, step.active)


def ask_best(target: Target, count: int | None) -> None:
    """Say that until the next reset only so many of the largest logits matter, and those that equal the least of them.

    A target that gains by this has a method `ask_best` of its own. It may then give others as -inf.
    """
    own = getattr(target, "ask_best", None)
    if own is not None:
        own(count)


def expect_choices(target: Target) -> None:
    """Say that until the next reset each step will be of one token, the best one behind the step before.

    A target that gains by this has a method `expect_choices` of its own. Other steps give what they always give.
    """
    own = getattr(target, "expect_choices", None)
    if own is not None:
        own()


def check_request(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raise `ValueError` if a request cannot be served: before any work, naming the numbers and the remedy."""
    check_prompt(prompt_ids, vocab_size=target.vocab_size)
    check_fits(len(prompt_ids), max_new_tokens, capacity=target.capacity)


def check_prompt(prompt_ids: Sequence[int], *, vocab_size: int) -> None:
    """Raise `ValueError` for an empty prompt, or one with a token that the model does not know."""
    if not len(prompt_ids):
        raise ValueError("the prompt has no tokens; give at least one, such as the beginning-of-sequence token")
    wrong = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"token {wrong[0]} of the prompt is outside the vocabulary of {vocab_size}; is it this model's?"
        )


def check_fits(prompt_tokens: int, max_new_tokens: int, *, capacity: int) -> None:
    """Raise `ValueError` if prompt and new tokens exceed a cache of `capacity` tokens.

    The last new token is never run, so it needs no room.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if prompt_tokens > capacity:
        raise ValueError(
            f"a prompt of {counted(prompt_tokens, 'token')} exceeds the cache's capacity of {capacity}; shorten it, or "
            "where the model's context is longer, make the engine with that capacity"
        )
    if prompt_tokens + max_new_tokens - 1 > capacity:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the cache's capacity of {capacity}; "
            f"ask for at most {counted(capacity - prompt_tokens + 1, 'new token')}, shorten the prompt, or "
            "where the model's context is longer, make the engine with that capacity"
        )
