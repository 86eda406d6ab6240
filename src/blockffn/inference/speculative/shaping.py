"""Trees shaped by cost: a node stays where the tokens it promises are worth the time that verifying it takes.

A text of many rounds is decoded fastest when each round maximises `expected tokens - rate * milliseconds`, with the
rate of the whole text. Maximising tokens per millisecond round by round would spend too much where drafts are bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from blockffn.inference.speculative.cost import CostModel, union_and_pairs
from blockffn.inference.speculative.estimates import AcceptanceEstimate, UnionEstimate
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

FORGET_RATE = 0.998
HOPELESS = 0.25  # of the rate: what a node must promise per millisecond for growth to go on
LEARN_WORTH = 0.1
LEARN_OVERHEAD = 0.02
LEARN_LEVEL = 0.05
FIRST_PROBES, LARGE = (2, 6, 12), 31  # rounds; nodes


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
    """Cuts drafted trees to what pays, by a cost model and by what it learns from every verification.

    Args:
        cost: of the target, from `calibrate`.
        num_experts: in all layers together; 1 for a dense model.
        overhead: milliseconds that every round costs beside the target's and the draft's.
        clock: seconds; the overhead is learnt by it, from `budget` to `observe`, and what a level of drafting costs,
            from `budget` to `shape`. `None`: both stay as given.
        draft_level: milliseconds that drafting one level of a tree costs; 0 for n-grams.
        probe_every: each so many rounds a tree is drafted in full and cut less, so that a wrong first impression of a
            draft is found out.

    Draft large trees: a shaper can only cut.

    Attributes:
        overhead: as given, or learnt so far.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        num_experts: int,
        overhead: float = 0.0,
        clock: Callable[[], float] | None = None,
        draft_level: float = 0.0,
        probe_every: int = 100,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts counts those of all layers, 1 for a dense model; got {num_experts}")
        self.acceptance, self.overhead = AcceptanceEstimate(), overhead
        self._cost, self._clock, self._begun = cost, clock, 0.0
        self._union = UnionEstimate(num_experts, share=1.0 if num_experts == 1 else 0.15)
        self._draft_level, self._probe_every, self._rounds = draft_level, probe_every, 0
        self._drafted = 0  # levels of this round, those that are cut off included
        self._tokens, self._milliseconds = 0.0, 0.0
        self._worth: list[float] = []  # of each level lately: tokens less what their time is worth

    @property
    def rate(self) -> float | None:
        """Tokens per millisecond of the recent rounds, by the cost model; `None` before the first."""
        return self._tokens / self._milliseconds if self._milliseconds else None

    def budget(self, most: Budget) -> Budget:
        """What to draft: the levels that lately gave more than drafting them costs, all of them in a probing round."""
        self._rounds += 1
        self._drafted = 0
        self._begun = self._clock() if self._clock is not None else 0.0
        if self.rate is None or not self._draft_level or self._probing:
            return most
        best, best_worth, worth = 0, 0.0, 0.0
        for depth, level in enumerate(self._worth, start=1):
            worth += level - self.rate * self._draft_level
            if worth > best_worth:
                best, best_worth = depth, worth
        return Budget(nodes=most.nodes if best else 0, depth=min(most.depth, best))

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that pays, maybe nothing."""
        self._drafted = int(tree.depth.max()) if len(tree) else 0
        self._learn_draft_level()
        rate, reach = self.rate, self.acceptance.reach(tree)
        prices = Prices(replace(self._cost, fixed=self._cost.fixed + self.overhead), self._union)
        choice = choose_nodes(tree, reach=reach, brings=self._union.brings(tree), prices=prices, rate=rate)
        if rate is not None:
            self._learn_worth(tree, {n: reach[n] - rate * price for n, price in zip(choice.nodes, choice.prices)})
        if self._probing:
            # At first large trees, because how a union saturates shows in them alone.
            return tree.best(LARGE if self._rounds in FIRST_PROBES else max(2 * len(choice.nodes), 4))
        return tree.subtree(torch.tensor(choice.nodes, dtype=torch.int64))

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """Learn from a verification of root and tree."""
        union, pairs = union_and_pairs(step)
        self.acceptance.observe(tree, verdict)
        if step.active is not None:
            last = verdict.path[-1] + 1 if verdict.path else 0
            self._union.observe(tree, union=union, active=step.active.sum(dim=0).tolist(), last=last)
        self._tokens = FORGET_RATE * self._tokens + len(verdict.path) + 1
        spent = self._cost.milliseconds(len(tree) + 1, union, pairs)
        spent += self._draft_level * self._drafted
        self._milliseconds = FORGET_RATE * self._milliseconds + spent + self.overhead
        if self._clock is not None:
            rest = 1000 * (self._clock() - self._begun) - spent
            # A round that the machine was busy with something else in says little.
            rest = min(max(rest, 0.0), 3 * spent)
            self.overhead += max(LEARN_OVERHEAD, 1 / self._rounds) * (rest - self.overhead)

    @property
    def _probing(self) -> bool:
        return self._rounds % self._probe_every == 0 or self._rounds in FIRST_PROBES

    def _learn_draft_level(self) -> None:
        """Drafting is timed on its own: its cost must not pass for one that every round has, drafted or not."""
        if self._clock is None or not self._draft_level or not self._drafted:
            return
        level = 1000 * (self._clock() - self._begun) / self._drafted
        self._draft_level += LEARN_LEVEL * (min(level, 3 * self._draft_level) - self._draft_level)

    def _learn_worth(self, tree: DraftTree, net: dict[int, float]) -> None:
        depths = tree.depth.tolist()
        for depth in range(1, max(depths) + 1):
            worth = sum(value for node, value in net.items() if depths[node] == depth)
            if depth > len(self._worth):
                self._worth.append(worth)
            self._worth[depth - 1] += LEARN_WORTH * (worth - self._worth[depth - 1])
