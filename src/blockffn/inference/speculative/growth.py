"""How a draft model's tree grows: the most probable nodes as in EAGLE-2, or nodes drawn at random.

Both ask an `Expand` for the distributions behind some nodes, a level at a time, and know no model.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from blockffn.inference.speculative.tree import ROOT, DraftTree, chain, no_tree

Expand = Callable[[DraftTree, list[int]], Tensor]
"""Given the tree so far and nodes of it (or -1), their children's log-probabilities `[K, V']` (float32).

One that can name the most probable children without writing all probabilities has a method `best(tree, nodes, top_k)`
for it, which gives their log-probabilities and indices `[K, top_k]`, the most probable first, and is called instead.

One that can run a whole chain at once has a method `chain(count, least)`: lists of the ids and log-probabilities of up
to `count` tokens behind the root, each the most probable behind the one before; fewer where the path's log-probability
has fallen below `least`, or where there is none. It is called instead where a tree may have no branches.
"""


class Budget(NamedTuple):
    """What a tree may have: so many nodes, so many levels.

    `least`: the probability that a node's path must have for children to be drafted. It saves time where drafting takes
    some; a drafter that takes none may ignore it. `chain`: without branches.
    """

    nodes: int
    depth: int
    least: float = 0.0
    chain: bool = False


class Growth(Protocol):
    """A way to make a tree from distributions. `deterministic`: without chance, so that the tree may be cut."""

    deterministic: ClassVar[bool]

    def __call__(
        self,
        expand: Expand,
        budget: Budget,
        *,
        vocab_size: int,
        token_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DraftTree: ...


@dataclass(frozen=True)
class BestNodes:
    """EAGLE-2's tree; the defaults are those of the published engine (its 32 nodes count the root)."""

    top_k: int = 10
    depth: int = 3
    size: int = 31
    deterministic: ClassVar[bool] = True

    def __call__(
        self,
        expand: Expand,
        budget: Budget,
        *,
        vocab_size: int,
        token_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DraftTree:
        top_k, depth, size = self.within(budget)
        return grow(expand, top_k=top_k, depth=depth, size=size, least=budget.least, token_ids=token_ids)

    def within(self, budget: Budget) -> tuple[int, int, int]:
        """`top_k`, `depth` and `size` that a budget leaves."""
        return 1 if budget.chain else self.top_k, min(self.depth, budget.depth), min(self.size, budget.nodes)


@dataclass(frozen=True)
class DrawnNodes:
    """A tree drawn from the draft's distribution; `widths[i]` children for every node of level `i`."""

    widths: tuple[int, ...] = (3, 2, 1, 1)
    deterministic: ClassVar[bool] = False

    def __call__(
        self,
        expand: Expand,
        budget: Budget,
        *,
        vocab_size: int,
        token_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DraftTree:
        wished = (1,) * len(self.widths) if budget.chain else self.widths
        widths = fit_widths(wished, nodes=budget.nodes, depth=budget.depth)
        return draw(expand, widths=widths, vocab_size=vocab_size, token_ids=token_ids, generator=generator)


def grow(
    expand: Expand, *, top_k: int, depth: int, size: int, least: float = 0.0, token_ids: Tensor | None = None
) -> DraftTree:
    """Grow a tree as EAGLE-2 does.

    Args:
        expand: called once a level, with the best `top_k` nodes of the level before; first with the root.
        top_k: children of an expanded node, and nodes expanded in a level.
        depth: levels. size: nodes that are kept in the end, the best by their paths.
        least: see `Budget`.
        token_ids: `[V']` ids of a reduced vocabulary's tokens; `None`: a token's index is its id.
    """
    tree = no_tree()
    level = [ROOT]
    floor = math.log(least) if least > 0 else -math.inf
    run_chain = getattr(expand, "chain", None) if top_k == 1 and min(depth, size) > 0 else None
    if run_chain is not None:
        return chain(*run_chain(min(depth, size), floor))
    nodes = _Nodes()
    for _ in range(depth if size > 0 else 0):
        values, indices = (t.cpu() for t in top_children(expand, tree, level, top_k))
        ids = indices if token_ids is None else token_ids.cpu()[indices]
        start = len(nodes.tokens)
        nodes.add(level, ids.tolist(), values.tolist())
        if len(nodes.tokens) == start:
            break
        tree = nodes.tree()
        scores = nodes.scores()
        best = sorted(range(start, len(scores)), key=lambda node: -scores[node])[:top_k]
        # A node below the last that is kept has no descendant above it.
        bar = sorted(scores, reverse=True)[size - 1] if len(scores) >= size else -math.inf
        level = sorted(node for node in best if scores[node] > bar and scores[node] >= floor)
        if not level:
            break
    return tree.best(size)


class _Nodes:
    """A tree as it grows, in lists: its levels are short, and a tensor operation takes longer than one of them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.log_probs: list[float] = []
        self._totals: list[float] = []  # of paths

    def add(self, level: list[int], ids: list[list[int]], values: list[list[float]]) -> None:
        """The children `[len(level), K]` of these nodes, but those without a finite log-probability."""
        for parent, tokens, log_probs in zip(level, ids, values):
            above = 0.0 if parent == ROOT else self._totals[parent]
            for token, log_prob in zip(tokens, log_probs):
                if not math.isfinite(log_prob):
                    continue
                self.tokens.append(token)
                self.parents.append(parent)
                self.log_probs.append(log_prob)
                self._totals.append(log_prob + above)

    def scores(self) -> list[float]:
        """Of paths, in float32, as `DraftTree.path_log_probs` has them."""
        return array("f", self._totals).tolist()

    def tree(self) -> DraftTree:
        return DraftTree(list(self.tokens), list(self.parents), self.log_probs)


def top_children(expand: Expand, tree: DraftTree, level: list[int], top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and indices `[len(level), top_k]` of the most probable children. See `Expand`."""
    own = getattr(expand, "best", None)
    if own is not None:
        found: tuple[Tensor, Tensor] = own(tree, level, top_k)
        return found
    log_probs = expand(tree, level)
    top = log_probs.float().topk(min(top_k, log_probs.shape[-1]), dim=-1)
    return top.values, top.indices


def draw(
    expand: Expand,
    *,
    widths: Sequence[int],
    vocab_size: int,
    token_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DraftTree:
    """Draw a tree at random: every node of level `i` gets `widths[i]` children, drawn without replacement.

    The shape is settled before anything is drawn; a shape that depended on the tokens drawn would not be lossless.
    Drawing in order without replacement is taking the largest of log-probabilities plus Gumbel noise.
    """
    tokens: list[int] = []
    parents: list[int] = []
    log_probs: list[float] = []
    rows = [torch.zeros(vocab_size)]
    level = [ROOT]
    for width in widths:
        so_far = DraftTree(list(tokens), list(parents), log_probs)
        start = len(tokens)
        for node, row in zip(level, expand(so_far, level).float().cpu()):
            uniform = torch.rand(row.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
            drawn = (row - (-uniform.log()).log()).topk(min(width, len(row))).indices
            ids = torch.arange(len(row)) if token_ids is None else token_ids.cpu()
            rows[node + 1].scatter_(0, ids, row.exp())
            for index in drawn.tolist():
                if row[index] > -torch.inf:
                    tokens.append(int(ids[index]))
                    parents.append(node)
                    log_probs.append(float(row[index]))
                    rows.append(torch.zeros(vocab_size))
        level = list(range(start, len(tokens)))
        if not level:
            break
    return DraftTree(tokens, parents, log_probs, torch.stack(rows))


def fit_widths(widths: Sequence[int], *, nodes: int, depth: int) -> tuple[int, ...]:
    """The widths cut to `depth` levels and to at most `nodes` nodes in all; the deepest levels lose first."""
    kept: list[int] = []
    parents, room = 1, nodes
    for width in widths[:depth]:
        width = min(width, room // parents)
        if width < 1:
            break
        kept.append(width)
        parents *= width
        room -= parents
    return tuple(kept)
