"""A tree of draft tokens behind the last token of a context.

That last token, the root, is not part of the tree; -1 names it as a parent. Parents come before their children. Scores
are cumulative log-probabilities in float32: coarser ones tie where the order matters. Nodes are few, so they are kept
in lists: an operation on a tensor takes longer than one of these.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from blockffn.inference.ids import Ids, listed

ROOT = -1


class DraftTree:
    """`N` draft tokens behind the last token of a context. It is not changed once it is made.

    Args:
        tokens: of the nodes. parents: an earlier index each, or -1 for the root.
        log_probs: the draft's log-probability of a token behind its parent.
        distributions: `[N + 1, V]` float32 where children were drawn at random: row `i + 1` is what the children of
            node `i` were drawn from, without replacement and in the order of their indices (row 0: the root's). `None`
            where the tokens were chosen without chance. Verification by sampling depends on it.

    Attributes:
        token_list, parent_list, log_prob_list: of the nodes; as tensors `[N]` `tokens`, `parents`, `log_probs`, which
            are made when they are asked for.

    Raises:
        ValueError: lengths differ, or a parent does not come before its child.
    """

    def __init__(
        self, tokens: Ids, parents: Ids, log_probs: Sequence[float] | Tensor, distributions: Tensor | None = None
    ) -> None:
        self.token_list, self.parent_list = listed(tokens), listed(parents)
        self.log_prob_list: list[float] = log_probs.tolist() if isinstance(log_probs, Tensor) else list(log_probs)
        self.distributions = distributions
        if not len(self.token_list) == len(self.parent_list) == len(self.log_prob_list):
            lengths = [len(values) for values in (self.token_list, self.parent_list, self.log_prob_list)]
            raise ValueError(f"tokens, parents and log_probs of a tree must be equally long, got {lengths}")
        for node, parent in enumerate(self.parent_list):
            if not ROOT <= parent < node:
                raise ValueError(f"the parent of node {node} must come before it, got {parent}")

    def __len__(self) -> int:
        return len(self.parent_list)

    @cached_property
    def tokens(self) -> Tensor:
        """`[N]` int64."""
        return torch.tensor(self.token_list, dtype=torch.int64)

    @cached_property
    def parents(self) -> Tensor:
        """`[N]` int64."""
        return torch.tensor(self.parent_list, dtype=torch.int64)

    @cached_property
    def log_probs(self) -> Tensor:
        """`[N]` float32."""
        return torch.tensor(self.log_prob_list, dtype=torch.float32)

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

    def behind(self, root: int) -> tuple[list[int], list[int] | None]:
        """Tokens and parents of all nodes with the root's token in front, as a target's `extend` takes them.

        Parents are `None` for a chain, which costs a target less.
        """
        tokens = [root, *self.token_list]
        if self.parent_list == list(range(-1, len(self) - 1)):
            return tokens, None
        return tokens, [ROOT, *(parent + 1 for parent in self.parent_list)]

    def subtree(self, nodes: Ids) -> DraftTree:
        """The tree of some of its nodes (indices, any order), in the order of the whole.

        Raises:
            ValueError: the parent of a node is missing, or the tree was drawn at random: leaving siblings out by what
                they are would change the distribution that verification relies on.
        """
        if self.distributions is not None:
            raise ValueError("a tree drawn at random cannot be cut: draw a smaller one")
        nodes = sorted(listed(nodes))
        place = {ROOT: ROOT} | {node: i for i, node in enumerate(nodes)}
        missing = [self.parent_list[node] for node in nodes if self.parent_list[node] not in place]
        if missing:
            raise ValueError(f"a subtree needs the parents of its nodes; {missing} are missing")
        return DraftTree(
            [self.token_list[node] for node in nodes],
            [place[self.parent_list[node]] for node in nodes],
            [self.log_prob_list[node] for node in nodes],
        )

    def best(self, size: int) -> DraftTree:
        """The `size` most probable nodes by their paths. On ties the earlier wins, so ancestors are always in."""
        return self if len(self) <= size else self.subtree(self.most_probable(size))

    def most_probable(self, size: int) -> list[int]:
        """`size` nodes, by `path_log_probs`, the most probable first; on ties the earlier."""
        scores = array("f", self.path_totals)
        return sorted(range(len(self)), key=lambda node: -scores[node])[:size]


def chain(tokens: Ids, log_probs: Sequence[float] | Tensor | None = None) -> DraftTree:
    """A tree without branches. Without log-probabilities every token counts as certain."""
    count = len(tokens)
    return DraftTree(tokens, list(range(-1, count - 1)), [0.0] * count if log_probs is None else log_probs)


@cache
def no_tree() -> DraftTree:
    """A tree of no nodes: the step is then a plain one."""
    return chain([])
