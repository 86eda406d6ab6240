"""What speculation did: acceptance by depth, sizes and unions of trees, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step


@dataclass
class SpeculationStatistics:
    """Sums over the verifications of one text.

    Attributes:
        prompt_tokens, new_tokens: what went in, what came out.
        verifications: calls of the target after the prompt.
        verified_tokens: tokens that these produced, before the text was cut at its end or its limit.
        tried, accepted: by depth (first entry: depth 1): verifications whose tree offered a token below an accepted
            path of that length, and those that accepted one.
        nodes: draft tokens verified, in all. largest_tree: most in one verification.
        union, pairs: experts per layer that a verification used together, and that its tokens used one by one; sums.
        sparse_layers: verifications times sparse layers, what these sums are over.
        seconds: by part: `prefill`, `draft`, `target`, `accept`. `target` holds the call alone; on a device that works
            asynchronously the wait for it is in `accept`.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    verifications: int = 0
    verified_tokens: int = 0
    nodes: int = 0
    largest_tree: int = 0
    union: int = 0
    pairs: int = 0
    sparse_layers: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prefill", "draft", "target", "accept"), 0.0)
    )

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin

    def count(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """Add one verification."""
        self.verifications += 1
        self.verified_tokens += len(verdict.path) + 1
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
        if step.union is not None and step.active is not None:
            self.union += int(step.union.sum())
            self.pairs += int(step.active.sum())
            self.sparse_layers += len(step.union)

    def report(self, *, num_experts: int | None = None) -> dict[str, Any]:
        """Plain data. Shares are of 1; those of experts need `num_experts` of a layer.

        `acceptance_length` is tokens per verification, the target's own included; `acceptance_by_depth` the rate at
        which a token is accepted where one is offered and its parent was accepted.
        """
        steps = max(self.verifications, 1)
        union = None
        if num_experts and self.sparse_layers:
            union = self.union / (self.sparse_layers * num_experts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "verifications": self.verifications,
            "acceptance_length": self.verified_tokens / steps,
            "acceptance_by_depth": [a / t for a, t in zip(self.accepted, self.tried)],
            "offered_by_depth": list(self.tried),
            "tree_size": self.nodes / steps,
            "largest_tree": self.largest_tree,
            "union_share": union,
            "experts_per_layer": self.union / self.sparse_layers if self.sparse_layers else None,
            "seconds": dict(self.seconds),
        }
