"""The loop of speculative decoding.

Each round drafts a tree behind the text, runs its root and nodes through the target in one call, keeps the accepted
path in the cache and adds the target's own token, which is the next root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, OnToken, Request, begin, next_token
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree, no_tree
from blockffn.inference.speculative.verify import Verdict, verify
from blockffn.inference.target import Step, Target, check_request

MOST = Budget(nodes=63, depth=16)


class Shaper(Protocol):
    """Says how much to draft, cuts the tree to what pays, and learns from what was accepted."""

    def start(self, tokens: int) -> None:
        """A text of so many tokens begins."""
        ...

    def budget(self, most: Budget) -> Budget: ...

    def shape(self, tree: DraftTree) -> DraftTree: ...

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None: ...


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


@torch.no_grad()
def speculate(target: Target, speculation: Speculation, request: Request) -> Iterator[list[int]]:
    """Continue a request to its end; gives its new tokens in blocks, one a round, as they come."""
    drafter, shaper, recorder = speculation.drafter, speculation.shaper, request.recorder
    counts = recorder.speculation = SpeculationStatistics()
    context = _Context(request.tokens)
    drafter.start(context.tensor())
    if shaper is not None:
        shaper.start(len(request.tokens))
    step = begin(target, request)
    generator = torch.Generator(step.logits.device).manual_seed(request.settings.seed)
    with recorder.time("sampling"):
        drafter.observe(context.tensor(), step.hidden)
        token = next_token(step, request, generator)
        request.take([token])
    yield [token]
    while request.finish_reason is None:
        with recorder.time("draft"):
            budget = _budget(target, speculation, request)
            if shaper is not None:
                budget = shaper.budget(budget)
            tree = drafter.propose(context.tensor(), budget) if budget.nodes else no_tree()
            if shaper is not None and len(tree):
                tree = shaper.shape(tree)
        tokens, parents = tree.behind(request.tokens[-1])
        with recorder.time("decode"):
            step = target.extend(tokens, parents)
        with recorder.time("sampling"):
            if len(tree):
                verdict = verify(
                    tree, step.logits, request.settings, context=context.tensor(), generator=generator,
                    choices=step.choices,
                )  # fmt: skip
            else:
                verdict = Verdict([], next_token(step, request, generator))
            block = [*(tree.token_list[node] for node in verdict.path), verdict.bonus]
            taken = request.take(block)
            kept = [0, *(node + 1 for node in verdict.path)][:taken]
            target.commit(torch.tensor(kept))
            drafter.observe(_rows(tokens, kept), _rows(step.hidden, kept))
            if shaper is not None:
                shaper.observe(tree, verdict, step)
        recorder.add(step)
        counts.count(tree, verdict)
        yield block[:taken]


class _Context:
    """The tokens of a request, as they grow, as a tensor that is made when it is asked for."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens, self._tensor = tokens, torch.tensor(tokens)

    def tensor(self) -> Tensor:
        known = len(self._tensor)
        if known < len(self._tokens):
            self._tensor = torch.cat((self._tensor, torch.tensor(self._tokens[known:])))
        return self._tensor


def _rows(values: Tensor, kept: list[int]) -> Tensor:
    """The rows of these numbers; a view where they are the first ones, as in a chain."""
    if kept[-1] == len(kept) - 1:
        return values[: len(kept)]
    return values[torch.tensor(kept, device=values.device)]


def _budget(target: Target, speculation: Speculation, request: Request) -> Budget:
    """A tree one level short of what is left, because the target adds a token; and no more than the cache takes."""
    depth = min(speculation.most.depth, request.left - 1)
    nodes = min(speculation.most.nodes, target.capacity - target.length - 1)
    return Budget(nodes=nodes if depth > 0 else 0, depth=depth)
