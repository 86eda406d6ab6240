"""Which draft tokens the target accepts, and which token it adds itself.

Pure functions of a tree and the target's logits for the root and every node. Both are lossless: greedy verification
gives the tokens of the plain greedy loop, sampling verification tokens with the distribution of plain sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.inference.speculative.tree import ROOT, DraftTree

Probabilities = Callable[[Tensor, Tensor], Tensor]
"""Logits `[V]` and all tokens before `[N]` to probabilities `[V]`: penalties, temperature, top-k, top-p and so on."""


@dataclass(frozen=True)
class Verdict:
    """Accepted nodes, a path from the root in order, and the target's own token behind them (the bonus)."""

    path: list[int]
    bonus: int


def verify_greedy(tree: DraftTree, logits: Tensor) -> Verdict:
    """The longest path on which every token is the target's first choice behind its parent.

    Args:
        logits: `[N + 1, V]`; row 0 is the root's, row `i + 1` node `i`'s.
    """
    choices = logits.argmax(dim=-1).tolist()
    tokens = tree.tokens.tolist()
    length: dict[int, int] = {ROOT: 0}
    for node, parent in enumerate(tree.parent_list):
        if parent in length and tokens[node] == choices[parent + 1]:
            length[node] = length[parent] + 1
    last = max(length, key=lambda node: length[node])
    return Verdict(tree.path(last), choices[last + 1])


def verify_sampling(
    tree: DraftTree,
    logits: Tensor,
    probabilities: Probabilities,
    *,
    context: Tensor,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Tokens distributed as if each had been sampled from the target.

    Where the tree was chosen without chance, a token is sampled from the target at each node and the walk goes on
    while it is a child: this is plain sampling with the same random numbers, so an equal seed gives equal tokens.
    Where children were drawn, each is accepted with `min(1, p / q)`; a rejection leaves the target's distribution
    `max(p - q, 0)`, renormalised, and the draft's without that token (SpecInfer's recursive rejection; EAGLE's).

    Args:
        logits: `[N + 1, V]`; row 0 is the root's, row `i + 1` node `i`'s.
        probabilities: applied to the rows that are visited.
        context: tokens `[N]` up to the root.
    """
    node = ROOT
    path: list[int] = []
    while True:
        p = probabilities(logits[node + 1], torch.cat((context, tree.tokens[path]))).float().cpu()
        children = tree.children(node)
        if tree.distributions is None:
            token = _sample(p, generator)
            follow = [child for child in children if int(tree.tokens[child]) == token]
        else:
            accepted, p = _accept_drawn(tree, children, p, tree.distributions[node + 1].float().cpu(), generator)
            follow = [] if accepted is None else [accepted]
            token = _sample(p, generator) if accepted is None else ROOT
        if not follow:
            return Verdict(path, token)
        # Of equal siblings the one with children promises more.
        node = max(follow, key=lambda child: len(tree.children(child)))
        path.append(node)


def _accept_drawn(
    tree: DraftTree, children: list[int], p: Tensor, q: Tensor, generator: torch.Generator | None
) -> tuple[int | None, Tensor]:
    """The accepted child, or none and what the target's distribution is after all rejections."""
    q = q.clone()
    for child in children:
        token = int(tree.tokens[child])
        if float(torch.rand((), generator=generator)) * float(q[token]) < float(p[token]):
            return child, p
        rest = (p - q).clamp_min(0)
        # With p equal to q up to rounding a rejection cannot happen but by rounding; p is then as good as the rest.
        if float(rest.sum()) > 0:
            p = rest / rest.sum()
        q[token] = 0
        q = q / q.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return None, p


def _sample(probabilities: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))
