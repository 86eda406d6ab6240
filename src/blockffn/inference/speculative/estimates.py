"""What a tree is worth, brings and costs, learnt while decoding.

`AcceptanceEstimate` corrects the draft's probabilities by what was accepted. `UnionEstimate` predicts how many experts
the nodes of a tree use together. `TimeEstimate` corrects what was assumed of times. All forget slowly, because texts
and machines change.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np

from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict

BIN_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92)
NUM_BINS = 2 * (len(BIN_EDGES) + 1)  # of first siblings, then of later ones
PRIOR = 4.0  # acceptances that an assumption counts as
MAX_DEPTH = 8  # deeper levels count as this one
UNION_DEPTH = 3  # the same for what a node brings
FORGET_ACCEPTANCE = 0.995
FORGET_UNION = 0.997
FORGET_TIME = 0.99
TIME_NOISE, OUTLIER = 0.2, 3.0  # standard deviation of a time; more than this is cut; both as shares of the expected
POOLS = (0.2, 0.3, 0.4, 0.55, 0.75, 1.0)  # sizes, as shares of all experts

Calibration = dict[str, list[list[float]]]
"""How often a draft's tokens were accepted: of `first` and of `later` siblings rows of the draft's mean probability,
the rate accepted, and how many were offered, by rising probability."""


class AcceptanceEstimate:
    """Probability that a node is accepted where its parent was, from the draft's probability of it and its depth.

    The draft's probability is multiplied by a factor, so that its order stays: accepted over hoped for, where hope is
    the sum of the draft's probabilities. Factors are kept by bin of probability, apart for first and for later
    siblings, and by depth; a depth starts from its bin's factor over all depths. What was assumed before counts as
    `PRIOR` acceptances.

    Args:
        calibration: assumed before, as `calibration` gives it; `None`: that the draft is right as often as it says.
        forget: what a round leaves of what was known.
    """

    def __init__(self, calibration: Calibration | None = None, *, forget: float = FORGET_ACCEPTANCE) -> None:
        self._assumed = _factors(calibration)
        # By depth and bin, row 0 for all depths together: sums of the draft's probabilities, acceptances, tokens.
        self._hoped, self._accepted, self._offered = (
            [[0.0] * NUM_BINS for _ in range(MAX_DEPTH + 1)] for _ in range(3)
        )
        # What is new is weighed more and more instead of what is old less and less: nothing is to be done for a round.
        self._growth, self._weight = 1 / forget, 1.0
        self._known: dict[tuple[float, int, int], float] = {}  # what `probability` gave since the last observation

    def probability(self, draft_probability: float, depth: int, rank: int = 0) -> float:
        key = (draft_probability, depth, rank)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._probability(*key)
        return known

    def _probability(self, draft_probability: float, depth: int, rank: int) -> float:
        bin_ = _bin(draft_probability, rank)
        prior = PRIOR * self._weight
        factor = self._assumed[bin_]
        for level in (0, depth if depth < MAX_DEPTH else MAX_DEPTH):
            factor *= (prior + self._accepted[level][bin_]) / (prior + factor * self._hoped[level][bin_])
        return min(draft_probability * factor, 1.0)

    def reach(self, tree: DraftTree) -> list[float]:
        """Probability of each node that its whole path is accepted. Siblings exclude each other: they share one."""
        own = [
            self.probability(math.exp(log_prob), depth, rank)
            for log_prob, depth, rank in zip(tree.log_prob_list, tree.depths, tree.ranks)
        ]
        totals: dict[int, float] = {}
        for node, parent in enumerate(tree.parent_list):
            totals[parent] = totals.get(parent, 0.0) + own[node]
        reach: list[float] = []
        for node, parent in enumerate(tree.parent_list):
            reach.append(own[node] / max(totals[parent], 1.0) * (1.0 if parent == ROOT else reach[parent]))
        return reach

    def observe(self, tree: DraftTree, verdict: Verdict, *, rounds: int = 1) -> None:
        """Learn from the children of every accepted node, and of the root.

        Args:
            rounds: that have passed since the last call.
        """
        self._known.clear()
        self._weight *= self._growth**rounds
        if self._weight > 1e6:
            self._rescale()
        on_path = {ROOT, *verdict.path}
        log_probs, depths, ranks = tree.log_prob_list, tree.depths, tree.ranks
        for node, parent in enumerate(tree.parent_list):
            if parent in on_path:
                probability = math.exp(log_probs[node])
                bin_ = _bin(probability, ranks[node])
                for level in (0, min(depths[node], MAX_DEPTH)):
                    self._hoped[level][bin_] += self._weight * probability
                    self._accepted[level][bin_] += self._weight * (node in on_path)
                    self._offered[level][bin_] += self._weight

    def calibration(self) -> Calibration:
        """What was seen, over all depths."""
        rows: Calibration = {"first": [], "later": []}
        for bin_, offered in enumerate(self._offered[0]):
            if offered:
                sums = self._hoped[0][bin_], self._accepted[0][bin_]
                row = [*(round(value / offered, 4) for value in sums), round(offered / self._weight)]
                rows["later" if bin_ > len(BIN_EDGES) else "first"].append(row)
        return rows

    def _rescale(self) -> None:
        for table in (self._hoped, self._accepted, self._offered):
            table[:] = [[value / self._weight for value in row] for row in table]
        self._weight = 1.0


def _bin(probability: float, rank: int) -> int:
    return bisect.bisect(BIN_EDGES, probability) + (NUM_BINS // 2 if rank else 0)


def _factors(calibration: Calibration | None) -> list[float]:
    """By bin, accepted over hoped for; 1 where little was seen."""
    hoped, accepted = [PRIOR] * NUM_BINS, [PRIOR] * NUM_BINS
    for rank, kind in enumerate(("first", "later")):
        for probability, rate, offered in (calibration or {}).get(kind, ()):
            hoped[_bin(probability, rank)] += offered * probability
            accepted[_bin(probability, rank)] += offered * rate
    return [a / h for a, h in zip(accepted, hoped)]


class UnionEstimate:
    """Experts that the root and some nodes use together, of `num_experts` in all layers.

    A passage of text draws on a pool of experts. A node uses a share of the pool's experts that are still unused, which
    depends on its depth and on whether it is a first child: what remains unused is a product, so its logarithm is a sum
    over nodes, with one coefficient a kind of node. Pools of several sizes are followed side by side, each with
    coefficients by recursive least squares; the one that predicted best lately speaks. The root's own experts are as
    many as the last accepted token's.

    Args:
        share: of the experts that a token uses, before anything is observed. novelty: of those, that a node adds.
    """

    def __init__(self, num_experts: int, *, share: float = 0.15, novelty: float = 0.4) -> None:
        self.num_experts = num_experts
        self.active = share * num_experts
        self._root = self.active
        kinds = 2 * UNION_DEPTH
        self._pools = np.array(POOLS) * num_experts
        self._coefficients = np.tile(self._log_of(share * novelty * num_experts)[:, None], kinds)
        self._covariances = np.tile(np.eye(kinds), (len(POOLS), 1, 1))
        # The largest pool speaks until another has been seen to be better.
        self._errors = np.linspace(1e-4, 0, len(POOLS))
        self._best = len(POOLS) - 1

    def start(self) -> float:
        """The logarithm of the root alone, as `union` takes it."""
        return float(self._log_of(self._root)[self._best])

    def brings(self, tree: DraftTree) -> list[float]:
        """What each node adds to the logarithm."""
        return self._coefficients[self._best][self._kinds(tree)].tolist()

    def union(self, log_used: float) -> float:
        """Experts in the union, from the root's logarithm and the sum of what the nodes bring."""
        return POOLS[self._best] * self.num_experts * -math.expm1(-log_used)

    def observe(self, tree: DraftTree, *, union: int, active: list[int], last: int) -> None:
        """Learn from a verification.

        Args:
            union: experts that root and nodes used together. active: experts of the root and of each node.
            last: row of the last accepted token, 0 for the root.
        """
        if len(tree):
            counts = np.bincount(self._kinds(tree), minlength=2 * UNION_DEPTH)
            root = self._log_of(active[0])
            predicted = self._pools * -np.expm1(-root - self._coefficients @ counts)
            self._errors = FORGET_UNION * self._errors + ((predicted - union) / self.num_experts) ** 2
            self._best = int(self._errors.argmin())
            spread = self._covariances @ counts
            gain = spread / (FORGET_UNION + 0.05 * len(tree) + spread @ counts)[:, None]
            missed = self._log_of(union) - root - self._coefficients @ counts
            self._coefficients = np.maximum(self._coefficients + gain * missed[:, None], 1e-5)
            self._covariances = (self._covariances - gain[:, :, None] * spread[:, None, :]) / FORGET_UNION
            diagonal = np.arange(len(counts))
            self._covariances[:, diagonal, diagonal] = np.minimum(self._covariances[:, diagonal, diagonal], 1.0)
        self.active += 0.05 * (sum(active) / len(active) - self.active)
        self._root = active[last]

    def _log_of(self, used: float) -> np.ndarray:
        """For each size of the pool."""
        return -np.log1p(-np.minimum(used / self._pools, 0.98))

    @staticmethod
    def _kinds(tree: DraftTree) -> list[int]:
        return [2 * (min(depth, UNION_DEPTH) - 1) + (rank > 0) for depth, rank in zip(tree.depths, tree.ranks)]


class TimeEstimate:
    """Milliseconds as a sum of quantities, each at a price: non-negative prices, by recursive least squares.

    Errors are relative to what was expected, so that short and long times teach alike.

    Args:
        prices: assumed before anything was measured. doubts: how far off each may be (a standard deviation).
    """

    def __init__(self, prices: Sequence[float], *, doubts: Sequence[float]) -> None:
        self.prices = list(prices)
        self._first = [[doubt**2 * (i == j) for j in range(len(prices))] for i, doubt in enumerate(doubts)]
        self._covariance = self._first
        self._passed = 0  # rounds since the last measurement

    def milliseconds(self, quantities: Sequence[float]) -> float:
        return sum(price * quantity for price, quantity in zip(self.prices, quantities))

    def observe(self, quantities: Sequence[float], milliseconds: float, *, count: int = 1) -> None:
        """Learn from a measurement. What takes far too long was the machine being busy with something else.

        Args:
            count: of measurements whose means these are.
        """
        covariance = self._doubts()
        expected = max(self.milliseconds(quantities), 1e-6)
        relative = [quantity / expected for quantity in quantities]
        spread = [sum(value * x for value, x in zip(row, relative)) for row in covariance]
        variance = TIME_NOISE**2 / count + sum(x * value for x, value in zip(relative, spread))
        missed = min(milliseconds / expected, OUTLIER) - 1
        self.prices = [max(price + value * missed / variance, 0.0) for price, value in zip(self.prices, spread)]
        self._covariance = [
            [value - a * b / variance for value, b in zip(row, spread)] for row, a in zip(covariance, spread)
        ]

    def forget(self, rounds: int) -> None:
        """So many rounds pass: prices that are not measured become as doubtful again as they were at first."""
        self._passed += rounds

    def _doubts(self) -> list[list[float]]:
        """The covariance after the rounds that have passed since the last measurement."""
        kept, self._passed = FORGET_TIME**self._passed, 0
        return [
            [first + kept * (value - first) for value, first in zip(row, first_row)]
            for row, first_row in zip(self._covariance, self._first)
        ]
