"""What a tree is worth and what it brings, learnt while decoding.

`AcceptanceEstimate` corrects the draft's probabilities by what was accepted. `UnionEstimate` predicts how many experts
the nodes of a tree use together. Both forget slowly, because texts change.
"""

from __future__ import annotations

import bisect
import math

import torch

from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict

BIN_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92)
MAX_DEPTH = 8
FORGET_ACCEPTANCE = 0.9995
FORGET_UNION = 0.995


class AcceptanceEstimate:
    """Probability that a node is accepted where its parent was, from the draft's probability of it and its depth.

    Rates are kept by bin of probability and by depth. A bin starts from the draft's own probability, a depth from its
    bin's rate over all depths; `prior` observations each must speak against that before it counts half.
    """

    def __init__(self, *, prior: float = 8.0) -> None:
        self._prior = prior
        # By depth and bin; row 0 holds all depths together.
        self._tried = [[0.0] * (len(BIN_EDGES) + 1) for _ in range(MAX_DEPTH + 1)]
        self._accepted = [[0.0] * (len(BIN_EDGES) + 1) for _ in range(MAX_DEPTH + 1)]

    def probability(self, draft_probability: float, depth: int) -> float:
        bin_ = bisect.bisect(BIN_EDGES, draft_probability)
        probability = draft_probability
        for level in (0, min(depth, MAX_DEPTH)):
            tried, accepted = self._tried[level][bin_], self._accepted[level][bin_]
            probability = (self._prior * probability + accepted) / (self._prior + tried)
        return probability

    def reach(self, tree: DraftTree) -> list[float]:
        """Probability of each node that its whole path is accepted. Siblings exclude each other: they share one."""
        own = [self.probability(math.exp(q), d) for q, d in zip(tree.log_probs.tolist(), tree.depth.tolist())]
        totals: dict[int, float] = {}
        for node, parent in enumerate(tree.parent_list):
            totals[parent] = totals.get(parent, 0.0) + own[node]
        reach: list[float] = []
        for node, parent in enumerate(tree.parent_list):
            reach.append(own[node] / max(totals[parent], 1.0) * (1.0 if parent == ROOT else reach[parent]))
        return reach

    def observe(self, tree: DraftTree, verdict: Verdict) -> None:
        """Learn from the children of every accepted node, and of the root."""
        probabilities, depths = tree.log_probs.exp().tolist(), tree.depth.tolist()
        on_path = {ROOT, *verdict.path}
        for node, parent in enumerate(tree.parent_list):
            if parent in on_path:
                bin_ = bisect.bisect(BIN_EDGES, probabilities[node])
                for level in (0, min(depths[node], MAX_DEPTH)):
                    self._tried[level][bin_] = self._tried[level][bin_] * FORGET_ACCEPTANCE + 1
                    self._accepted[level][bin_] = self._accepted[level][bin_] * FORGET_ACCEPTANCE + (node in on_path)


class UnionEstimate:
    """Experts that the root and some nodes use together, of `num_experts` in all layers.

    A node uses a share of the experts that are still unused, which depends on its depth and on whether it is a first
    child: what remains unused is a product, so its logarithm is a sum over nodes, with one coefficient a kind of node.
    The coefficients follow by recursive least squares; the root's own experts are as many as the last accepted token's.

    Args:
        share: of the experts that a token uses, before anything is observed. novelty: of those, that a node adds.
    """

    def __init__(self, num_experts: int, *, share: float = 0.15, novelty: float = 0.4) -> None:
        self.num_experts = num_experts
        self.active = share * num_experts
        self._root = self.active
        kinds = 2 * MAX_DEPTH
        self._coefficients = torch.full((kinds,), -math.log1p(-share * novelty), dtype=torch.float64)
        self._covariance = torch.eye(kinds, dtype=torch.float64)

    def start(self) -> float:
        """The logarithm of the root alone, as `union` takes it."""
        return self._log_of(self._root)

    def brings(self, tree: DraftTree) -> list[float]:
        """What each node adds to the logarithm."""
        return self._coefficients[self._kinds(tree)].tolist()

    def union(self, log_used: float) -> float:
        """Experts in the union, from the root's logarithm and the sum of what the nodes bring."""
        return self.num_experts * -math.expm1(-log_used)

    def observe(self, tree: DraftTree, *, union: int, active: list[int], last: int) -> None:
        """Learn from a verification.

        Args:
            union: experts that root and nodes used together. active: experts of the root and of each node.
            last: row of the last accepted token, 0 for the root.
        """
        if len(tree):
            counts = self._kinds(tree).bincount(minlength=len(self._coefficients)).double()
            target = self._log_of(union) - self._log_of(active[0])
            spread = self._covariance @ counts
            gain = spread / (FORGET_UNION + 0.05 * len(tree) + counts @ spread)
            self._coefficients += gain * (target - counts @ self._coefficients)
            self._coefficients.clamp_(min=1e-5)
            self._covariance = (self._covariance - torch.outer(gain, spread)) / FORGET_UNION
            self._covariance.diagonal().clamp_(max=1.0)
        self.active += 0.05 * (sum(active) / len(active) - self.active)
        self._root = active[last]

    def _log_of(self, used: float) -> float:
        return -math.log1p(-min(used / self.num_experts, 0.999))

    @staticmethod
    def _kinds(tree: DraftTree) -> torch.Tensor:
        return 2 * (tree.depth.clamp(max=MAX_DEPTH) - 1) + (tree.rank > 0)
