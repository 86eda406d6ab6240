"""Trees shaped by cost: a node stays where the tokens it promises are worth the time that verifying it takes.

A text of many rounds is decoded fastest when each round maximises `expected tokens - rate * milliseconds`, with the
rate of the whole text. Maximising tokens per millisecond round by round would spend too much where drafts are bad.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from blockffn.inference.speculative.cost import CostModel, union_and_pairs
from blockffn.inference.speculative.estimates import AcceptanceEstimate, TimeEstimate, UnionEstimate
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

FORGET_RATE, FIRST_ROUNDS = 0.99, 2  # plain ones, from which the rate starts
HOPELESS = 0.25  # of the rate: what a node must promise per millisecond for growth to go on
# Steps of drafting: children of the root alone, then of nodes whose path is ever less probable.
STEPS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.0)
HOPE = 0.1  # tokens that a step brings, before anything is known
FORGET_WORTH, FEWEST_ROUNDS = 0.97, 2.0  # what a step was worth before a round counts as so many at least
EXPLORE, MOST_CREDIT = 0.0125, 0.5  # of the time; of a round's
FURTHER, WIDER = (1, 2, 4), 2  # steps more, in turn; times as many nodes


@dataclass(frozen=True)
class Choice:
    """Nodes worth verifying, a tree, in the order in which they were added, and the milliseconds that each adds."""

    nodes: list[int]
    prices: list[float]


@dataclass(frozen=True)
class Prices:
    """What `choose_nodes` needs to know of the target: the cost model, the union, and experts of a token."""

    cost: CostModel
    union: UnionEstimate

    def milliseconds(self, tokens: int, log_used: float) -> float:
        return self.cost.milliseconds(tokens, self.union.union(log_used), tokens * self.union.active)


def choose_nodes(
    tree: DraftTree, *, reach: Sequence[float], brings: Sequence[float], prices: Prices, rate: float | None
) -> Choice:
    """The part of a tree that is worth verifying, maybe nothing.

    Nodes are added one by one, always the one with the most expected tokens per millisecond among those whose parent
    is in; the best of all the trees on the way is kept. Its measure is `tokens - rate * milliseconds`, or tokens per
    millisecond where no rate is known yet.

    Args:
        reach: probability of each node that its path is accepted. brings: see `UnionEstimate.brings`.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parent_list):
        children.setdefault(parent, []).append(node)
    tokens, log_used = 1.0, prices.union.start()
    now = prices.milliseconds(1, log_used)
    order: list[int] = []
    paid: list[float] = []
    best_value = tokens / now if rate is None else tokens - rate * now
    best_count = 0
    frontier = list(children.get(ROOT, ()))
    while frontier:
        after = {b: prices.milliseconds(len(order) + 2, log_used + b) for b in {brings[node] for node in frontier}}
        node = max(frontier, key=lambda n: reach[n] / max(after[brings[n]] - now, 1e-9))
        if rate is not None and reach[node] < HOPELESS * rate * (after[brings[node]] - now):
            break
        frontier.remove(node)
        frontier += children.get(node, ())
        order.append(node)
        paid.append(after[brings[node]] - now)
        tokens, log_used, now = tokens + reach[node], log_used + brings[node], after[brings[node]]
        value = tokens / now if rate is None else tokens - rate * now
        if value > best_value:
            best_value, best_count = value, len(order)
    return Choice(order[:best_count], paid[:best_count])


class CostAwareShaper:
    """Cuts drafted trees to what pays, by a cost model and by what it learns from every round.

    Two things are learnt from what was tried alone: whether drafting goes on where a path is improbable, and how often
    improbable nodes are accepted. So some rounds explore: they draft further and verify more than seems to pay. What
    they lose is taken from a credit that grows by `EXPLORE` of the time, so it is bounded whatever the draft; where
    they lose nothing, because more was accepted than expected, the next round explores too.

    Args:
        cost: of the target, from `calibrate`.
        num_experts: in all layers together; 1 for a dense model.
        overhead: milliseconds that every round costs beside the target's and the draft's.
        clock: seconds; what drafting and verifying cost is learnt by it. `None`: costs are as given.
        draft_level: milliseconds that drafting one level of a tree costs; 0 for n-grams.

    Draft large trees: a shaper can only cut.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        num_experts: int,
        overhead: float = 0.0,
        clock: Callable[[], float] | None = None,
        draft_level: float = 0.0,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts counts those of all layers, 1 for a dense model; got {num_experts}")
        self.acceptance = AcceptanceEstimate()
        self._cost, self._clock = cost, clock
        self._union = UnionEstimate(num_experts, share=1.0 if num_experts == 1 else 0.15)
        plain = overhead + cost.milliseconds(1, self._union.active, self._union.active)
        level = max(draft_level, 0.02 * plain)
        # Of a proposal, its levels, and nodes whose children are drafted; of a round, its tokens, and the cost model's.
        self._drafting = TimeEstimate((0.0, draft_level, 0.0), doubts=(2 * level, 2 * level, level / 2))
        self._verifying = TimeEstimate((overhead, 0.0, 1.0), doubts=(plain / 2, plain / 16, 0.25))
        self._tokens, self._milliseconds = float(FIRST_ROUNDS), FIRST_ROUNDS * plain
        self._worth = [HOPE] * len(STEPS)  # tokens that each step brought lately, less what its time is worth
        self._seen = [FEWEST_ROUNDS] * len(STEPS)
        self._credit, self._explored = -plain, 0  # milliseconds, rounds
        self._usual = self._taken = 0  # steps that seem to pay, and those taken in this round
        self._lost = 0.0  # by exploring, in this round, as far as is known before the verification
        self._more: dict[int, float] = {}  # nodes that are verified to explore, with the hope of each
        self._drafted: tuple[int, int, int] | None = None  # quantities of `_drafting`
        self._begun = self._shaping = self._late = 0.0  # milliseconds: a time; of the last `shape` and `observe`

    @property
    def rate(self) -> float:
        """Tokens per millisecond of the recent rounds, without what exploring took; of plain decoding at least."""
        active = self._union.active
        return max(self._tokens / self._milliseconds, 1 / self._current_cost().milliseconds(1, active, active))

    def budget(self, most: Budget) -> Budget:
        """What to draft: the steps that lately brought more than they cost, and more where this round explores."""
        self._begun, self._drafted = self._now(), None
        self._lost, self._more = 0.0, {}
        self._seen = [max(FORGET_WORTH * seen, FEWEST_ROUNDS) for seen in self._seen]
        totals = [0.0, *itertools.accumulate(self._worth)]
        self._usual = max(range(len(totals)), key=lambda steps: totals[steps])
        self._taken = self._usual
        if self._explores:
            self._explored += 1
            self._taken = min(self._usual + FURTHER[self._explored % len(FURTHER)], len(STEPS))
        if not self._taken:
            return replace(most, nodes=0)
        return replace(most, least=STEPS[self._taken - 1])

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that pays, maybe nothing; more of it where this round explores."""
        began = self._now()
        drafting = _Drafting(tree)
        self._learn_drafting(drafting, began - self._begun + self._shaping)
        reach, brings, rate = self.acceptance.reach(tree), self._union.brings(tree), self.rate
        prices = Prices(self._current_cost(), self._union)
        choice = choose_nodes(tree, reach=reach, brings=brings, prices=prices, rate=rate)
        net = {node: reach[node] - rate * price for node, price in zip(choice.nodes, choice.prices)}
        self._learn_worth(tree, net, drafting)
        nodes = choice.nodes
        if self._explores:
            count = max(WIDER * len(nodes), 2)
            nodes = tree.path_log_probs.sort(descending=True, stable=True).indices[:count].sort().values.tolist()
            log_used = prices.union.start() + sum(brings[node] for node in nodes)
            spent = prices.milliseconds(len(nodes) + 1, log_used) - prices.milliseconds(1, prices.union.start())
            worth = sum(reach[node] for node in nodes) - rate * spent
            self._lost += max(sum(net.values()) - worth, 0.0) / rate
            self._more = {place: reach[node] for place, node in enumerate(nodes) if node not in net}
        self._begun = self._now()
        self._shaping = self._begun - began
        return tree.subtree(torch.tensor(nodes, dtype=torch.int64))

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """Learn from a verification of root and tree."""
        now = self._now()
        union, pairs = union_and_pairs(step)
        quantities = (1, len(tree) + 1, self._cost.milliseconds(len(tree) + 1, union, pairs))
        if self._clock is not None:
            self._drafting.forget()
            self._verifying.forget()
            self._verifying.observe(quantities, now - self._begun + self._late)
        spent = self._verifying.milliseconds(quantities)
        if self._drafted is not None:
            spent += self._drafting.milliseconds(self._drafted)
        luck = sum((node in verdict.path) - hope for node, hope in self._more.items())
        self._credit = min(self._credit + EXPLORE * spent - self._lost + luck / self.rate, MOST_CREDIT * spent)
        self._tokens = FORGET_RATE * self._tokens + len(verdict.path) + 1
        self._milliseconds = FORGET_RATE * self._milliseconds + max(spent - self._lost, 0.0)
        self.acceptance.observe(tree, verdict)
        if step.active is not None:
            last = verdict.path[-1] + 1 if verdict.path else 0
            self._union.observe(tree, union=union, active=step.active.sum(dim=0).tolist(), last=last)
        self._late = self._now() - now

    def _now(self) -> float:
        return 1000 * self._clock() if self._clock is not None else 0.0

    @property
    def _explores(self) -> bool:
        return self._credit > 0

    def _current_cost(self) -> CostModel:
        every, token, factor = self._verifying.prices
        cost = self._cost
        return CostModel(
            every + factor * cost.fixed,
            token + factor * cost.per_token,
            factor * cost.per_expert,
            factor * cost.per_pair,
        )

    def _learn_drafting(self, drafting: _Drafting, milliseconds: float) -> None:
        self._drafted = drafting.quantities(STEPS[self._taken - 1])
        if self._clock is None:
            return
        self._drafting.observe(self._drafted, milliseconds)
        if self._explores:  # it is charged for no more than what was measured
            self._lost += min(milliseconds - self._drafting.milliseconds(self._drafted), 0.0)

    def _learn_worth(self, tree: DraftTree, net: dict[int, float], drafting: _Drafting) -> None:
        """Of each step that was taken: what the nodes are worth that it added, less what drafting them cost."""
        brought = [0.0] * len(STEPS)
        for node, value in net.items():
            brought[drafting.step_of(tree.parent_list[node])] += value
        before = lost = 0.0
        for step in range(self._taken):
            spent = self._drafting.milliseconds(drafting.quantities(STEPS[step]))
            worth = brought[step] - self.rate * (spent - before)
            before = spent
            self._seen[step] += 1
            self._worth[step] += (worth - self._worth[step]) / self._seen[step]
            lost -= worth if step >= self._usual else 0.0
        self._lost = max(self._lost + lost / self.rate, 0.0)


class _Drafting:
    """What was drafted for a tree, as far as the tree shows it."""

    def __init__(self, tree: DraftTree) -> None:
        self._probabilities = tree.path_log_probs.exp().tolist()
        self._depths = tree.depth.tolist()
        self._deepest = max(self._depths, default=0)

    def step_of(self, parent: int) -> int:
        """The first of `STEPS` in which the children of a node are drafted."""
        probability = 1.0 if parent == ROOT else self._probabilities[parent]
        return next(step for step, least in enumerate(STEPS) if probability >= least)

    def quantities(self, least: float) -> tuple[int, int, int]:
        """One proposal, its levels, and the nodes whose children were drafted, had `Budget.least` been this."""
        grown = [d for p, d in zip(self._probabilities, self._depths) if p >= least and d < self._deepest]
        return 1, 1 + max(grown, default=0), 1 + len(grown)
