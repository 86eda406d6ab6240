"""The loop of speculative decoding, and the plain loop that it must equal.

Each round drafts a tree behind the text, runs its root and nodes through the target in one call, keeps the accepted
path in the cache and adds the target's own token, which is the next root.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.lossless import Difference, first_difference
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree, no_tree
from blockffn.inference.speculative.verify import Probabilities, Verdict, verify_greedy, verify_sampling
from blockffn.inference.target import Step, Target

PREFILL_CHUNK = 512


class Shaper(Protocol):
    """Says how much to draft, cuts the tree to what pays, and learns from what was accepted."""

    def budget(self, most: Budget) -> Budget: ...

    def shape(self, tree: DraftTree) -> DraftTree: ...

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None: ...


@dataclass(frozen=True)
class Settings:
    """How to decode.

    Attributes:
        max_new_tokens: exactly so many, unless an end token comes first.
        end_tokens: the text ends with the first of these.
        probabilities: logits `[V]` and the text `[N]` so far to probabilities `[V]` for sampling; `None` is greedy.
        seed: of sampling.
        max_nodes, max_depth: of a draft tree.
        check_lossless: decode plainly as well and compare.
    """

    max_new_tokens: int = 128
    end_tokens: Collection[int] = ()
    probabilities: Probabilities | None = None
    seed: int = 0
    max_nodes: int = 63
    max_depth: int = 16
    check_lossless: bool = False


@dataclass(frozen=True)
class Decoded:
    """New tokens, why they end (`end` or `length`), statistics, and with `check_lossless` the first difference.

    `difference` is `None` where the plain loop gave the same, and where it was not asked for (`checked`).
    """

    tokens: list[int]
    reason: str
    statistics: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    checked: bool = False
    difference: Difference | None = None


OnTokens = Callable[[list[int]], None]


@torch.inference_mode()
def speculative_generate(
    target: Target,
    drafter: Drafter,
    prompt: Tensor,
    settings: Settings,
    *,
    shaper: Shaper | None = None,
    on_tokens: OnTokens | None = None,
) -> Decoded:
    """Continue a prompt `[T]` (int64), a block of tokens a round.

    Args:
        shaper: cuts each drafted tree before it is verified, such as `shaping.CostAwareShaper`.
        on_tokens: called with the new tokens of each round, at once.

    Raises:
        ValueError: the prompt is empty or does not fit with the new tokens; `check_lossless` or a shaper is asked of a
            drafter that draws at random.
    """
    _check(target, prompt, settings)
    if not drafter.deterministic and settings.check_lossless and settings.probabilities is not None:
        raise ValueError(
            "check_lossless compares token by token, which sampling with a drafter that draws at random does not "
            "promise; use a drafter without chance (growth BestNodes) or greedy decoding"
        )
    if not drafter.deterministic and shaper is not None:
        raise ValueError("a tree drawn at random cannot be cut; use a drafter without chance (growth BestNodes)")
    text = _Text(target, prompt, settings, on_tokens)
    drafter.start(prompt)
    with text.statistics.time("prefill"):
        logits, hidden = _prefill(target, prompt)
        drafter.observe(prompt, hidden)
        text.take([text.verdict(no_tree(), logits[None]).bonus])
    while text.reason is None:
        with text.statistics.time("draft"):
            budget = text.budget() if shaper is None else shaper.budget(text.budget())
            tree = drafter.propose(text.context, budget)
            if shaper is not None and len(tree):
                tree = shaper.shape(tree)
        tokens, parents = tree.behind(int(text.context[-1]))
        with text.statistics.time("target"):
            step = target.extend(tokens, parents)
        with text.statistics.time("accept"):
            verdict = text.verdict(tree, step.logits)
            text.statistics.count(tree, verdict, step)
            taken = text.take([*tree.tokens[verdict.path].tolist(), verdict.bonus])
            kept = torch.tensor([0, *(node + 1 for node in verdict.path)])[:taken]
            target.commit(kept)
            drafter.observe(tokens[kept], step.hidden[kept.to(step.hidden.device)])
            if shaper is not None:
                shaper.observe(tree, verdict, step)
    decoded = Decoded(text.new, text.reason, text.statistics)
    if not settings.check_lossless:
        return decoded
    plain, logits_of = _plain(target, prompt, settings)
    return replace(decoded, checked=True, difference=first_difference(decoded.tokens, plain.tokens, logits_of))


def plain_generate(target: Target, prompt: Tensor, settings: Settings, *, on_tokens: OnTokens | None = None) -> Decoded:
    """Continue a prompt one token a call: what every faster way is held to. Arguments as above."""
    _check(target, prompt, settings)
    return _plain(target, prompt, settings, on_tokens)[0]


@torch.inference_mode()
def _plain(
    target: Target, prompt: Tensor, settings: Settings, on_tokens: OnTokens | None = None
) -> tuple[Decoded, list[Tensor]]:
    """Also the logits `[V]` that each new token was chosen by."""
    text = _Text(target, prompt, settings, on_tokens)
    with text.statistics.time("prefill"):
        logits_of = [_prefill(target, prompt)[0]]
        text.take([text.verdict(no_tree(), logits_of[-1][None]).bonus])
    while text.reason is None:
        with text.statistics.time("target"):
            step = target.extend(text.context[-1:])
        with text.statistics.time("accept"):
            target.commit(torch.tensor([0]))
            logits_of.append(step.logits[0])
            verdict = text.verdict(no_tree(), step.logits)
            text.statistics.count(no_tree(), verdict, step)
            text.take([verdict.bonus])
    return Decoded(text.new, text.reason, text.statistics), logits_of


class _Text:
    """The text so far, its end, and what is left to decode."""

    def __init__(self, target: Target, prompt: Tensor, settings: Settings, on_tokens: OnTokens | None) -> None:
        self._target, self._settings, self._on_tokens = target, settings, on_tokens
        self._ends = frozenset(settings.end_tokens)
        self.context = prompt.cpu()
        self.new: list[int] = []
        self.reason: str | None = None
        self.statistics = SpeculationStatistics(prompt_tokens=len(prompt))
        self._generator = torch.Generator().manual_seed(settings.seed)
        target.reset()

    def budget(self) -> Budget:
        """A tree one level short of what is left, because the target adds a token; and no more than the cache takes."""
        left = self._settings.max_new_tokens - len(self.new) - 1
        room = self._target.capacity - self._target.length - 1
        depth = min(self._settings.max_depth, left)
        return Budget(nodes=min(self._settings.max_nodes, room) if depth > 0 else 0, depth=depth)

    def verdict(self, tree: DraftTree, logits: Tensor) -> Verdict:
        if self._settings.probabilities is None:
            return verify_greedy(tree, logits)
        return verify_sampling(
            tree, logits, self._settings.probabilities, context=self.context, generator=self._generator
        )

    def take(self, tokens: list[int]) -> int:
        """Add tokens up to an end token or the limit; returns how many."""
        tokens = tokens[: self._settings.max_new_tokens - len(self.new)]
        for i, token in enumerate(tokens):
            if token in self._ends:
                tokens, self.reason = tokens[: i + 1], "end"
                break
        self.new += tokens
        self.statistics.new_tokens = len(self.new)
        self.context = torch.cat((self.context, torch.tensor(tokens, dtype=torch.int64)))
        if self.reason is None and len(self.new) == self._settings.max_new_tokens:
            self.reason = "length"
        if self._on_tokens is not None:
            self._on_tokens(tokens)
        return len(tokens)


def _check(target: Target, prompt: Tensor, settings: Settings) -> None:
    if not len(prompt):
        raise ValueError("the prompt is empty; give at least one token, such as the beginning of a text")
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {settings.max_new_tokens}")
    # The last new token is never run through the target.
    if len(prompt) + settings.max_new_tokens - 1 > target.capacity:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {settings.max_new_tokens} new ones do not fit into a cache of "
            f"{target.capacity}; ask for at most {max(target.capacity - len(prompt) + 1, 0)} new tokens or enlarge it"
        )


def _prefill(target: Target, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Commit a prompt; logits `[V]` behind it and hidden states `[T, D]` of it.

    A target with a `prefill` of its own, which leaves out the logits of all tokens but the last, does the work itself.
    """
    own = getattr(target, "prefill", None)
    if own is not None:
        step = own(prompt)
        return step.logits[-1], step.hidden
    hidden = []
    for chunk in prompt.cpu().split(PREFILL_CHUNK):
        step = target.extend(chunk)
        target.commit(torch.arange(len(chunk)))
        hidden.append(step.hidden)
    return step.logits[-1], torch.cat(hidden)
