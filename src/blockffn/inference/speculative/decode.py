"""The loop of speculative decoding.

Each round drafts a tree behind the text, runs its root and nodes through the target in one call, keeps the accepted
path in the cache and adds the target's own token, which is the next root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


class Shaper:
    """Says how much to draft, cuts the tree to what pays, and learns from what was accepted. This one leaves all as it
    is."""

    def start(self, tokens: int) -> None:
        """A text of so many tokens begins."""

    def rest(self) -> int:
        """Rounds to come without drafts, whatever they bring, of which `rested` tells at their end; 0: none are known.

        Asking and telling in every round would take a good part of a small model's step.
        """
        return 0

    def rested(self, rounds: int, seconds: float) -> None:
        """So many have passed in this time: those of `rest`, or fewer where the text ended or nobody wants more."""

    def budget(self, most: Budget) -> Budget:
        """What may be drafted in a round, of the most that is possible."""
        return most

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of a drafted tree that is verified."""
        return tree

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """What a verification of root and tree gave."""


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
    shaper: Shaper | None = None
    most: Budget = MOST

    def __post_init__(self) -> None:
        if not self.drafter.deterministic and self.shaper is not None:
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
    counts = recorder.speculation = SpeculationStatistics()
    context = request.tokens  # as it grows
    drafter.start(context)
    if shaper is not None:
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
        rest = 0 if shaper is None else shaper.rest()
        if shaper is not None and rest:
            yield from _rest(target, drafter, shaper, request, rest, generator)
            continue
        tree = _draft(target, speculation, request)
        tokens, parents = tree.behind(context[-1])
        recorder.lap("draft")
        step = target.extend(tokens, parents)
        recorder.lap("decode")
        verdict = _verdict(tree, step, request, generator)
        block = [*(tree.token_list[node] for node in verdict.path), verdict.bonus]
        taken = request.take(block)
        kept = [0, *(node + 1 for node in verdict.path)][:taken]
        target.commit(kept)
        drafter.observe([tokens[row] for row in kept], _rows(step.hidden, kept))
        if shaper is not None:
            shaper.observe(tree, verdict, step)
        recorder.lap("sampling")
        recorder.add(step)
        counts.count(tree, verdict)
        yield block[:taken]


def _rest(
    target: Target, drafter: Drafter, shaper: Shaper, request: Request, rounds: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Rounds without drafts, fewer where the request ends; gives their tokens. What the reader does between them takes
    no part of their time."""
    recorder, roots, states, seconds = request.recorder, list[int](), list[Tensor](), 0.0
    try:
        while True:
            roots.append(request.tokens[-1])
            step = target.extend(roots[-1:])
            target.commit([0])
            seconds += recorder.lap("decode")
            token = next_token(step, request, generator)
            request.take([token])
            seconds += recorder.lap("sampling")
            recorder.add(step)
            states.append(step.hidden)
            if len(states) == rounds or request.finish_reason is not None:
                break
            yield [token]
            recorder.start()
        drafter.observe(roots, torch.cat(states))
    finally:
        if states:
            shaper.rested(len(states), seconds)
            if recorder.speculation is not None:
                recorder.speculation.count_plain(len(states))
    recorder.lap("sampling")
    yield [token]


def _draft(target: Target, speculation: Speculation, request: Request) -> DraftTree:
    """A tree behind the request's tokens, maybe an empty one."""
    budget, shaper = _budget(target, speculation, request), speculation.shaper
    if shaper is not None:
        budget = shaper.budget(budget)
    if not budget.nodes:
        return no_tree()
    tree = speculation.drafter.propose(request.tokens, budget)
    return shaper.shape(tree) if shaper is not None and len(tree) else tree


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
