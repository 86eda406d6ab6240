"""Prompt lookup: what followed the last few tokens where they occurred before. Needs no model and no training."""

from __future__ import annotations

import math

from torch import Tensor

from blockffn.inference.ids import Ids, listed
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import ROOT, DraftTree, no_tree


class NgramDrafter:
    """Proposes the continuations of the longest suffix of the context that occurs earlier in it.

    Args:
        longest, shortest: lengths of the suffixes that are looked up, the longest first.
        branches: the most recent occurrences that are used; where they differ, the tree branches.
        depth, size: levels and nodes at most.

    The probability of a token is its share of the occurrences that reach it, with one more occurrence for everything
    that was never seen.
    """

    deterministic = True

    def __init__(
        self, *, longest: int = 4, shortest: int = 1, branches: int = 4, depth: int = 8, size: int = 16
    ) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must lie between 1 and longest ({longest}), got {shortest}")
        self._lengths = range(longest, shortest - 1, -1)
        self._branches, self._depth, self._size = branches, depth, size
        self._forget()

    def start(self, prompt: Ids) -> None:
        self._forget()
        self._read(prompt)

    def observe(self, tokens: Ids, hidden: Tensor) -> None:
        """Nothing to learn: `propose` reads the context."""

    def propose(self, context: Ids, budget: Budget) -> DraftTree:
        self._read(context)
        depth = min(self._depth, budget.depth)
        seen = self._tokens
        for length in self._lengths:
            ends = [end for end in self._ends.get(tuple(seen[-length:]), ()) if end < len(seen)]
            if ends and len(seen) > length:
                branches = 1 if budget.chain else self._branches
                found = [seen[end : end + depth] for end in ends[-branches:][::-1]]
                return _merge(found).best(min(self._size, budget.nodes))
        return no_tree()

    def _forget(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where each n-gram ended

    def _read(self, context: Ids) -> None:
        for token in listed(context[len(self._tokens) :]):
            self._tokens.append(token)
            for length in self._lengths:
                if length <= len(self._tokens):
                    self._ends.setdefault(tuple(self._tokens[-length:]), []).append(len(self._tokens))


def _merge(sequences: list[list[int]]) -> DraftTree:
    """The tree of common beginnings; of equal counts the earlier sequence comes first."""
    children: dict[tuple[int, int], int] = {}  # by parent and token
    tokens: list[int] = []
    parents: list[int] = []
    counts: list[int] = []
    for sequence in sequences:
        node = ROOT
        for token in sequence:
            parent, known = node, children.get((node, token))
            node = len(tokens) if known is None else known
            if known is None:
                children[parent, token] = node
                tokens.append(token)
                parents.append(parent)
                counts.append(0)
            counts[node] += 1
    reached = [*counts, len(sequences)]  # the last is the root's
    log_probs = [math.log(count / (reached[parent] + 1)) for count, parent in zip(counts, parents)]
    return DraftTree(tokens, parents, log_probs)
