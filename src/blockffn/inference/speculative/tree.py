"""A tree of draft tokens behind the last token of a context.

That last token, the root, is not part of the tree; -1 names it as a parent. Parents come before their children. Scores
are cumulative log-probabilities in float32: coarser ones tie where the order matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

ROOT = -1


@dataclass(frozen=True)
class DraftTree:
    """`N` draft tokens behind the last token of a context.

    Attributes:
        tokens: `[N]` int64.
        parents: `[N]` int64, an earlier index or -1 for the root.
        log_probs: `[N]` float32, the draft's log-probability of a token behind its parent.
        distributions: `[N + 1, V]` float32 where children were drawn at random: row `i + 1` is what the children of
            node `i` were drawn from, without replacement and in the order of their indices (row 0: the root's). `None`
            where the tokens were chosen without chance. Verification by sampling depends on it.

    Raises:
        ValueError: lengths differ, or a parent does not come before its child.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    distributions: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.tokens.shape == self.parents.shape == self.log_probs.shape:
            shapes = [tuple(t.shape) for t in (self.tokens, self.parents, self.log_probs)]
            raise ValueError(f"tokens, parents and log_probs of a tree must be equally long, got {shapes}")
        for node, parent in enumerate(self.parent_list):
            if not ROOT <= parent < node:
                raise ValueError(f"the parent of node {node} must come before it, got {parent}")

    def __len__(self) -> int:
        return len(self.parent_list)

    @cached_property
    def parent_list(self) -> list[int]:
        return self.parents.tolist()

    @cached_property
    def token_list(self) -> list[int]:
        return self.tokens.tolist()

    @cached_property
    def depth(self) -> Tensor:
        """`[N]` int64: 1 for children of the root."""
        return torch.tensor(self.depths, dtype=torch.int64)

    @cached_property
    def depths(self) -> list[int]:
        """`depth` as a list."""
        depths: list[int] = []
        for parent in self.parent_list:
            depths.append(1 + (0 if parent == ROOT else depths[parent]))
        return depths

    @cached_property
    def ranks(self) -> list[int]:
        """How many earlier siblings each node has."""
        seen: dict[int, int] = {}
        ranks = []
        for parent in self.parent_list:
            ranks.append(seen.get(parent, 0))
            seen[parent] = ranks[-1] + 1
        return ranks

    @cached_property
    def rank(self) -> Tensor:
        """`[N]` int64: `ranks`."""
        return torch.tensor(self.ranks, dtype=torch.int64)

    @cached_property
    def log_prob_list(self) -> list[float]:
        return self.log_probs.tolist()

    @cached_property
    def path_totals(self) -> list[float]:
        """`path_log_probs` as a list, not rounded to float32."""
        totals: list[float] = []
        for own, parent in zip(self.log_prob_list, self.parent_list):
            totals.append(own + (0.0 if parent == ROOT else totals[parent]))
        return totals

    @cached_property
    def path_log_probs(self) -> Tensor:
        """`[N]` float32: log-probability of a node's whole path from the root."""
        return torch.tensor(self.path_totals, dtype=torch.float32)

    @cached_property
    def ancestors(self) -> Tensor:
        """`[N, N]` bool: row `i` marks node `i` and its ancestors, what it attends to within the tree."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parent_list):
            if parent != ROOT:
                mask[node] |= mask[parent]
        return mask

    def path(self, node: int) -> list[int]:
        """Indices from a child of the root to the node."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parent_list[node]
        return found[::-1]

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parent_list) if parent == node]

    def behind(self, root: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and parents `[N + 1]` with the root's token in front, as a target's `extend` takes them.

        Parents are `None` for a chain, which costs a target less.
        """
        tokens = torch.tensor([root, *self.token_list])
        if self.parent_list == list(range(-1, len(self) - 1)):
            return tokens, None
        return tokens, torch.cat((torch.tensor([ROOT]), self.parents + 1))

    def subtree(self, nodes: Tensor) -> DraftTree:
        """The tree of some of its nodes (indices, any order), in the order of the whole.

        Raises:
            ValueError: the parent of a node is missing, or the tree was drawn at random: leaving siblings out by what
                they are would change the distribution that verification relies on.
        """
        if self.distributions is not None:
            raise ValueError("a tree drawn at random cannot be cut: draw a smaller one")
        nodes = nodes.sort().values
        kept = len(nodes)
        if nodes.tolist() == list(range(kept)):
            return DraftTree(self.tokens[:kept], self.parents[:kept], self.log_probs[:kept])
        place = {ROOT: ROOT} | {node: i for i, node in enumerate(nodes.tolist())}
        parents = self.parents[nodes].tolist()
        missing = [parent for parent in parents if parent not in place]
        if missing:
            raise ValueError(f"a subtree needs the parents of its nodes; {missing} are missing")
        renamed = torch.tensor([place[parent] for parent in parents], dtype=torch.int64)
        return DraftTree(self.tokens[nodes], renamed, self.log_probs[nodes])

    def best(self, size: int) -> DraftTree:
        """The `size` most probable nodes by their paths. On ties the earlier wins, so ancestors are always in."""
        if len(self) <= size:
            return self
        return self.subtree(self.path_log_probs.sort(descending=True, stable=True).indices[:size])


def chain(tokens: Sequence[int] | Tensor, log_probs: Sequence[float] | Tensor | None = None) -> DraftTree:
    """A tree without branches. Without log-probabilities every token counts as certain."""
    tokens = torch.as_tensor(tokens, dtype=torch.int64)
    if log_probs is None:
        log_probs = torch.zeros(len(tokens))
    return DraftTree(tokens, chain_parents(len(tokens)), torch.as_tensor(log_probs, dtype=torch.float32))


@cache
def chain_parents(count: int) -> Tensor:
    """Parents `[count]` of a chain: the root, then each node of the next."""
    return torch.arange(-1, count - 1)


@cache
def no_tree() -> DraftTree:
    """A tree of no nodes: the step is then a plain one."""
    return chain([])
