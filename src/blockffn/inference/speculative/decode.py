"""The loop of speculative decoding.

Each round drafts a tree behind the text, runs its root and nodes through the target in one call, keeps the accepted
path in the cache and adds the target's own token, which is the next root.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, OnToken, Request, begin, next_token
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree, no_tree
from blockffn.inference.speculative.verify import Verdict, verify, verify_greedy
from blockffn.inference.target import Step, Target, check_request

MOST = Budget(nodes=63, depth=16)


@dataclass(frozen=True)
class Routine:
    """Rounds that are all alike: between them the shaper is not asked, and no tree is cut.

    Attributes:
        rounds: at most so many.
        budget: what each may draft; no nodes: they decode plainly.
    """

    rounds: int
    budget: Budget


class Round(NamedTuple):
    """One of a routine with drafts, as it was.

    Attributes:
        tree: that was verified, maybe an empty one. accepted: nodes of it.
        draft_seconds: of drafting. seconds: of the whole round.
    """

    tree: DraftTree
    accepted: int
    draft_seconds: float
    seconds: float


class Shaper:
    """Says how much to draft, cuts the tree to what pays, and learns from what was accepted. This one leaves all as it
    is."""

    def start(self, tokens: int) -> None:
        """A text of so many tokens begins."""

    def routine(self, most: Budget) -> Routine | None:
        """Rounds to come, whatever they bring, of which `passed` or `rested` tells at the end; `None`: none are known.

        Asking and telling in every round would take a good part of a small model's step.

        Args:
            most: that is possible in any round.
        """
        return None

    def passed(self, rounds: Sequence[Round]) -> None:
        """Those of `routine`, or fewer where the text ended or nobody wants more."""

    def rested(self, seconds: Sequence[float]) -> None:
        """As `passed`, of rounds without drafts, what each took."""

    def budget(self, most: Budget) -> Budget:
        """What may be drafted in a round, of the most that is possible."""
        return most

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of a drafted tree that is verified."""
        return tree

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """What a verification of root and tree gave."""


UNSHAPED = Shaper()


@dataclass(frozen=True)
class Speculation:
    """How drafts are made.

    Attributes:
        shaper: cuts each drafted tree before it is verified, such as `shaping.CostAwareShaper`.
        most: what a tree may have.

    Raises:
        ValueError: a shaper for a drafter that draws at random.
    """

    drafter: Drafter
    shaper: Shaper = UNSHAPED
    most: Budget = MOST

    def __post_init__(self) -> None:
        if not self.drafter.deterministic and self.shaper is not UNSHAPED:
            raise ValueError("a tree drawn at random cannot be cut; use a drafter without chance (growth BestNodes)")


def speculative_generate(
    target: Target,
    speculation: Speculation,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    on_token: OnToken | None = None,
) -> Generation:
    """As `decode.generate`, with drafts. Arguments and errors are the same."""
    check_request(target, prompt_ids, settings.max_new_tokens)
    request = Request(prompt_ids, settings, on_token=on_token)
    for _ in speculate(target, speculation, request):
        pass
    return request.generation()


def speculate(target: Target, speculation: Speculation, request: Request) -> Iterator[list[int]]:
    """Continue a request to its end; gives its new tokens in blocks, one a round, as they come."""
    drafter, shaper, recorder = speculation.drafter, speculation.shaper, request.recorder
    recorder.speculation = SpeculationStatistics()
    context = request.tokens  # as it grows
    drafter.start(context)
    shaper.start(len(context))
    step = begin(target, request)
    generator = torch.Generator(step.logits.device).manual_seed(request.settings.seed)
    recorder.start()
    drafter.observe(context, step.hidden)
    token = next_token(step, request, generator)
    request.take([token])
    recorder.lap("sampling")
    yield [token]
    while request.finish_reason is None:
        recorder.start()
        routine = shaper.routine(speculation.most)
        if routine is not None:
            run = _draft_alike if routine.budget.nodes else _rest
            yield from run(target, speculation, request, routine, generator)
            continue
        tree = _draft(target, speculation, request)
        block, verdict, step = _verify(target, drafter, request, tree, generator)
        shaper.observe(tree, verdict, step)
        recorder.lap("sampling")
        yield block


def _verify(
    target: Target, drafter: Drafter, request: Request, tree: DraftTree, generator: torch.Generator
) -> tuple[list[int], Verdict, Step]:
    """The end of a round, from its tree on: what it adds to the text, and why. The caller ends its time."""
    recorder = request.recorder
    tokens, parents = tree.behind(request.tokens[-1])
    recorder.lap("draft")
    step = target.extend(tokens, parents)
    recorder.lap("decode")
    verdict = _verdict(tree, step, request, generator)
    block = [*(tree.token_list[node] for node in verdict.path), verdict.bonus]
    taken = request.take(block)
    kept = [0, *(node + 1 for node in verdict.path)][:taken]
    target.commit(kept)
    drafter.observe([tokens[row] for row in kept], _rows(step.hidden, kept))
    recorder.add(step)
    assert recorder.speculation is not None
    recorder.speculation.count(tree, verdict)
    return block[:taken], verdict, step


def _draft_alike(
    target: Target, speculation: Speculation, request: Request, routine: Routine, generator: torch.Generator
) -> Iterator[list[int]]:
    """Rounds with drafts of one budget, fewer where the request ends; gives their tokens."""
    recorder, drafter, rounds = request.recorder, speculation.drafter, list[Round]()
    try:
        while True:
            began = time.perf_counter()
            possible = _budget(target, speculation, request)
            nodes, depth = min(routine.budget.nodes, possible.nodes), min(routine.budget.depth, possible.depth)
            budget = routine.budget._replace(nodes=nodes, depth=depth)
            tree = drafter.propose(request.tokens, budget) if nodes else no_tree()
            drafted = time.perf_counter()
            block, verdict, _ = _verify(target, drafter, request, tree, generator)
            rounds.append(Round(tree, len(verdict.path), drafted - began, time.perf_counter() - began))
            if len(rounds) == routine.rounds or request.finish_reason is not None:
                break
            recorder.lap("sampling")
            yield block
            recorder.start()
    finally:
        if rounds:
            speculation.shaper.passed(rounds)
    recorder.lap("sampling")
    yield block


def _rest(
    target: Target, speculation: Speculation, request: Request, routine: Routine, generator: torch.Generator
) -> Iterator[list[int]]:
    """Rounds without drafts, fewer where the request ends; gives their tokens. What the reader does between them takes
    no part of their time."""
    recorder = request.recorder
    roots, states, seconds, root = list[int](), list[Tensor](), list[float](), request.tokens[-1]
    try:
        while True:
            roots.append(root)
            step = target.extend([root])
            target.commit([0])
            spent = recorder.lap("decode")
            root = next_token(step, request, generator)
            request.take([root])
            seconds.append(spent + recorder.lap("sampling"))
            recorder.add(step)
            states.append(step.hidden)
            if len(roots) == routine.rounds or request.finish_reason is not None:
                break
            yield [root]
            recorder.start()
        speculation.drafter.observe(roots, torch.cat(states))
    finally:
        if seconds:
            speculation.shaper.rested(seconds)
            if recorder.speculation is not None:
                recorder.speculation.count_plain(len(seconds))
    recorder.lap("sampling")
    yield [root]


def _draft(target: Target, speculation: Speculation, request: Request) -> DraftTree:
    """A tree behind the request's tokens, maybe an empty one."""
    shaper = speculation.shaper
    budget = shaper.budget(_budget(target, speculation, request))
    if not budget.nodes:
        return no_tree()
    tree = speculation.drafter.propose(request.tokens, budget)
    return shaper.shape(tree) if len(tree) else tree


def _verdict(tree: DraftTree, step: Step, request: Request, generator: torch.Generator) -> Verdict:
    if not len(tree):
        return Verdict([], next_token(step, request, generator))
    if step.choices is not None and request.settings.takes_best:
        return verify_greedy(tree, step.choices)
    return verify(tree, step.logits, request.settings, context=request.tokens, generator=generator)


def _rows(values: Tensor, kept: list[int]) -> Tensor:
    """The rows of these numbers; a view where they are the first ones, as in a chain."""
    count = len(kept)
    if kept[-1] == count - 1:
        return values if count == values.shape[0] else values[:count]
    return values[torch.tensor(kept, device=values.device)]


def _budget(target: Target, speculation: Speculation, request: Request) -> Budget:
    """A tree one level short of what is left, because the target adds a token; and no more than the cache takes."""
    depth = min(speculation.most.depth, request.left - 1)
    nodes = min(speculation.most.nodes, target.capacity - target.length - 1)
    return Budget(nodes=nodes if depth > 0 else 0, depth=depth)
