"""What speculation did: acceptance by depth, and sizes of trees."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.speculative.verify import Verdict


@dataclass
class SpeculationStatistics:
    """Sums over the verifications of one text.

    Attributes:
        verifications: calls of the target after the prompt.
        verified_tokens: tokens that these produced, before the text was cut at its end or its limit.
        tried, accepted: by depth (first entry: depth 1): verifications whose tree offered a token below an accepted
            path of that length, and those that accepted one.
        nodes: draft tokens verified, in all. largest_tree: most in one verification.
    """

    verifications: int = 0
    verified_tokens: int = 0
    nodes: int = 0
    largest_tree: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, tree: DraftTree, verdict: Verdict) -> None:
        """Add one verification."""
        self.verifications += 1
        self.verified_tokens += len(verdict.path) + 1
        if not len(tree):
            return
        self.nodes += len(tree)
        self.largest_tree = max(self.largest_tree, len(tree))
        offered = set(tree.parent_list)
        for depth, node in enumerate((-1, *verdict.path)):
            if node not in offered:
                break
            if depth == len(self.tried):
                self.tried.append(0)
                self.accepted.append(0)
            self.tried[depth] += 1
            self.accepted[depth] += depth < len(verdict.path)

    def count_plain(self, rounds: int) -> None:
        """Add steps without drafts."""
        self.verifications += rounds
        self.verified_tokens += rounds

    def add(self, other: SpeculationStatistics) -> None:
        """Add those of another text."""
        self.verifications += other.verifications
        self.verified_tokens += other.verified_tokens
        self.nodes += other.nodes
        self.largest_tree = max(self.largest_tree, other.largest_tree)
        self.tried = [sum(pair) for pair in zip_longest(self.tried, other.tried, fillvalue=0)]
        self.accepted = [sum(pair) for pair in zip_longest(self.accepted, other.accepted, fillvalue=0)]

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verification, the target's own included; `None` before the first."""
        return self.verified_tokens / self.verifications if self.verifications else None

    @property
    def acceptance_by_depth(self) -> list[float]:
        """How often a token is accepted where one is offered and its parent was accepted. Shares of 1."""
        return [accepted / tried for accepted, tried in zip(self.accepted, self.tried)]

    @property
    def tree_size(self) -> float | None:
        """Draft tokens per verification; `None` before the first."""
        return self.nodes / self.verifications if self.verifications else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rates included."""
        return {
            "verifications": self.verifications,
            "acceptance_length": self.acceptance_length,
            "acceptance_by_depth": self.acceptance_by_depth,
            "offered_by_depth": list(self.tried),
            "tree_size": self.tree_size,
            "largest_tree": self.largest_tree,
        }
