"""Trees shaped by cost: a node stays where the tokens it promises are worth the time that verifying it takes.

A text of many rounds is decoded fastest when each round maximises `expected tokens - rate * milliseconds`, with the
rate of the whole text. Maximising tokens per millisecond round by round would spend too much where drafts are bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blockffn.inference.speculative.cost import CostModel, union_and_pairs
from blockffn.inference.speculative.estimates import AcceptanceEstimate, UnionEstimate
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

FORGET_RATE = 0.995
HOPELESS = 0.25  # of the rate: what a node must promise per millisecond for growth to go on


@dataclass(frozen=True)
class Prices:
    """What `choose_nodes` needs to know of the target: the cost model, the union, and experts of a token."""

    cost: CostModel
    union: UnionEstimate

    def milliseconds(self, tokens: int, log_used: float) -> float:
        return self.cost.milliseconds(tokens, self.union.union(log_used), tokens * self.union.active)


def choose_nodes(
    tree: DraftTree, *, reach: Sequence[float], brings: Sequence[float], prices: Prices, rate: float | None
) -> list[int]:
    """Nodes worth verifying, a tree.

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
        tokens, log_used, now = tokens + reach[node], log_used + brings[node], after[brings[node]]
        value = tokens / now if rate is None else tokens - rate * now
        if value > best_value:
            best_value, best_count = value, len(order)
    return order[:best_count]


class CostAwareShaper:
    """Cuts drafted trees to what pays, by a cost model and by what it learns from every verification.

    Args:
        cost: of the target, from `calibrate`.
        num_experts: in all layers together; 1 for a dense model.
        overhead: milliseconds of a round beside the target's, such as drafting, that every round costs.
        probe_every: each so many rounds a tree is larger than what seems to pay, so that a wrong first impression of a
            draft is found out.

    Draft large trees: a shaper can only cut.
    """

    def __init__(self, cost: CostModel, *, num_experts: int, overhead: float = 0.0, probe_every: int = 50) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts counts those of all layers, 1 for a dense model; got {num_experts}")
        cost = CostModel(cost.fixed + overhead, cost.per_token, cost.per_expert, cost.per_pair)
        self.acceptance = AcceptanceEstimate()
        self._prices = Prices(cost, UnionEstimate(num_experts, share=1.0 if num_experts == 1 else 0.15))
        self._probe_every, self._rounds = probe_every, 0
        self._tokens, self._milliseconds = 0.0, 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per millisecond of the recent rounds, by the cost model; `None` before the first."""
        return self._tokens / self._milliseconds if self._milliseconds else None

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that pays, maybe nothing."""
        self._rounds += 1
        union = self._prices.union
        nodes = choose_nodes(
            tree, reach=self.acceptance.reach(tree), brings=union.brings(tree), prices=self._prices, rate=self.rate
        )
        if self._rounds % self._probe_every == 0:
            return tree.best(max(2 * len(nodes), 4))
        return tree.subtree(torch.tensor(nodes, dtype=torch.int64))

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """Learn from a verification of root and tree."""
        union, pairs = union_and_pairs(step)
        self.acceptance.observe(tree, verdict)
        if step.active is not None:
            last = verdict.path[-1] + 1 if verdict.path else 0
            self._prices.union.observe(tree, union=union, active=step.active.sum(dim=0).tolist(), last=last)
        self._tokens = FORGET_RATE * self._tokens + len(verdict.path) + 1
        spent = self._prices.cost.milliseconds(len(tree) + 1, union, pairs)
        self._milliseconds = FORGET_RATE * self._milliseconds + spent
