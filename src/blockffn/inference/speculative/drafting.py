"""What drafting costs and what it brings, for trees and for chains: how far to draft is learnt here.

Children are drafted of nodes whose path is probable enough (`Budget.least`), in ten steps of that. Each is followed by
what its nodes brought lately, less what drafting them took; those are worth taking whose sum is largest, maybe none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from blockffn.inference.speculative.cost import DraftingCost
from blockffn.inference.speculative.estimates import TimeEstimate
from blockffn.inference.speculative.tree import ROOT, DraftTree

# Steps of drafting: children of the root alone, then of nodes whose path is ever less probable.
STEPS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.0)
HOPE, FIRST_HOPE = 0.1, 0.5  # tokens that a step brings, and the first one more, before anything is known
# Tokens that chains must bring to be usual where trees are known, too: the best of noisy estimates promises too much.
LEAST_WORTH = 0.02
FORGET_WORTH, FEWEST_ROUNDS = 0.97, 2.0  # what a step was worth before a round counts as so many at least
MOST_FORGOTTEN = 8  # rounds between two that teach, where these are few
FORGET_ROUTINE = 0.999  # as FORGET_WORTH, where every round teaches: what was accepted varies more than what is hoped


class Drafted:
    """What was drafted for a tree, as far as the tree shows it.

    Args:
        among: nodes that count, with all their ancestors; `None`: all.
    """

    def __init__(self, tree: DraftTree, among: Sequence[int] | None = None) -> None:
        self._parents = tree.parent_list
        self._probabilities = [math.exp(total) for total in tree.path_totals]
        self._depths = tree.depths
        self._nodes = range(len(tree)) if among is None else among
        self._deepest = max((self._depths[node] for node in self._nodes), default=0)

    def quantities(self, least: float) -> tuple[int, int, int]:
        """One proposal, its levels, and the nodes whose children were drafted, had `Budget.least` been this."""
        grown = [
            depth
            for depth, probability in ((self._depths[node], self._probabilities[node]) for node in self._nodes)
            if probability >= least and depth < self._deepest
        ]
        return 1, 1 + max(grown, default=0), 1 + len(grown)

    def by_step(self, values: Mapping[int, float]) -> list[float]:
        """The sum of the nodes' values, for each of `STEPS` in which they are drafted first."""
        sums = [0.0] * len(STEPS)
        for node, value in values.items():
            parent = self._parents[node]
            probability = 1.0 if parent == ROOT else self._probabilities[parent]
            sums[next(step for step, least in enumerate(STEPS) if probability >= least)] += value
        return sums


class WayOfDrafting:
    """With branches or without: what drafting so takes, and what each of `STEPS` is worth in tokens.

    Args:
        cost: as far as is known. plain: milliseconds of a plain step.

    Attributes:
        times: of a proposal, its levels, nodes whose children are drafted, and tokens of the text that the draft had
            not read yet, as whenever nothing was drafted for long.
        usual: steps that seem to pay.
    """

    def __init__(self, cost: DraftingCost, *, chain: bool, plain: float) -> None:
        self.chain = chain
        doubt = max(cost.level, 0.02 * plain)
        self.times = TimeEstimate(
            (cost.proposal, cost.level, 0.0, cost.read),
            doubts=(2 * doubt, 2 * doubt, doubt / 2, cost.read / 2 + doubt / 128),
        )
        self._worth = [HOPE] * len(STEPS)  # tokens that each step brought lately, less what its time is worth
        self._worth[0] += FIRST_HOPE - (cost.proposal + cost.level + cost.read) / plain
        self._seen = [FEWEST_ROUNDS] * len(STEPS)
        self._passed = 0  # rounds since the last that taught something
        self.usual = self._best_steps()

    def worth(self, start: int, end: int) -> float:
        """What is expected of some steps."""
        return sum(self._worth[start:end])

    def forget(self, rounds: int) -> None:
        """So many rounds pass."""
        self._passed += rounds
        self.times.forget(rounds)

    def backlog(self, tokens: int) -> float:
        """Milliseconds of reading so many tokens."""
        return self.times.prices[-1] * tokens

    def learn_chains(
        self, chains: Sequence[tuple[DraftTree, int]], *, steps: int, rate: float, verifying: float, read: float
    ) -> None:
        """From rounds that took at most so many steps, all alike: as `learn`, by what was accepted.

        Args:
            chains: what each drafted, and how many nodes of it were accepted. verifying: milliseconds a node.
        """
        drafted, accepted = [0] * steps, [0] * steps
        for tree, count in chains:
            step = 0
            for depth, total in enumerate(tree.path_totals):
                drafted[step] += 1
                accepted[step] += depth < count
                while step < steps - 1 and math.exp(total) < STEPS[step]:
                    step += 1
        proposal, level, node, reading = self.times.prices
        passed, self._passed = self._passed, 0
        for step in range(steps):
            spent = (level + node + verifying) * drafted[step] / len(chains) + (
                0 if step else proposal + reading * read
            )
            worth = accepted[step] / len(chains) - rate * spent
            self._seen[step] = max(FORGET_ROUTINE**passed * self._seen[step], FEWEST_ROUNDS) + len(chains)
            self._worth[step] += (worth - self._worth[step]) * len(chains) / self._seen[step]
        self.usual = self._best_steps()

    def learn(self, drafted: Drafted, brought: Sequence[float], *, steps: int, rate: float, read: int) -> list[float]:
        """From a round that took so many steps; gives what each was worth.

        Args:
            brought: what the nodes of each step are worth in tokens. rate: tokens per millisecond of the text.
            read: tokens that a draft reads in a round, where it drafts in every one.
        """
        kept, self._passed = FORGET_WORTH ** min(self._passed, MOST_FORGOTTEN), 0
        self._seen = [max(kept * seen, FEWEST_ROUNDS) for seen in self._seen]
        before, worths = 0.0, []
        for step in range(steps):
            spent = self.times.milliseconds((*drafted.quantities(STEPS[step]), read))
            worths.append(brought[step] - rate * (spent - before))
            before = spent
            self._seen[step] += 1
            self._worth[step] += (worths[step] - self._worth[step]) / self._seen[step]
        self.usual = self._best_steps()
        return worths

    @property
    def best_try(self) -> int:
        """Steps that seem to be worth most, one at least."""
        totals = list(itertools.accumulate(self._worth))
        return 1 + totals.index(max(totals))

    def _best_steps(self) -> int:
        totals = [LEAST_WORTH if self.chain else 0.0, *itertools.accumulate(self._worth)]
        return totals.index(max(totals))


def first_choices(tree: DraftTree) -> list[int]:
    """The nodes of the chain within a tree: from the root on the most probable child each, as a chain is drafted."""
    best: dict[int, int] = {}
    log_probs = tree.log_prob_list
    for node, parent in enumerate(tree.parent_list):
        if parent not in best or log_probs[node] > log_probs[best[parent]]:
            best[parent] = node
    nodes, at = [], ROOT
    while at in best:
        at = best[at]
        nodes.append(at)
    return nodes
