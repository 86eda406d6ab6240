"""Which draft tokens the target accepts, and which token it adds itself.

Pure functions of a tree and the target's logits for the root and every node. Both are lossless: greedy verification
gives the tokens of the plain greedy loop, sampling verification tokens with the distribution of plain sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.inference.sampling import SamplingSettings, choose, draw, probabilities
from blockffn.inference.speculative.tree import ROOT, DraftTree


@dataclass(frozen=True)
class Verdict:
    """Accepted nodes, a path from the root in order, and the target's own token behind them (the bonus)."""

    path: list[int]
    bonus: int


def verify(
    tree: DraftTree, logits: Tensor, settings: SamplingSettings, *, context: Sequence[int], generator: torch.Generator,
) -> Verdict:  # fmt: skip
    """Accept what plain decoding with these settings would say, or draw as it would draw.

    Args:
        logits: `[N + 1, V]`; row 0 is the root's, row `i + 1` node `i`'s.
        context: tokens up to the root.
        generator: on the device of the logits.
    """
    if settings.takes_best:
        return verify_greedy(tree, logits.argmax(dim=-1).tolist())
    return verify_sampling(tree, logits, settings, context=context, generator=generator)


def verify_greedy(tree: DraftTree, choices: list[int]) -> Verdict:
    """The longest path on which every token is the target's first choice behind its parent.

    Args:
        choices: `N + 1` of the target's first choices; the first is the root's, entry `i + 1` node `i`'s.
    """
    tokens, last = tree.token_list, ROOT
    length = {ROOT: 0}  # of the path to each accepted node
    for node, parent in enumerate(tree.parent_list):
        if parent in length and tokens[node] == choices[parent + 1]:
            length[node] = length[parent] + 1
            if length[node] > length[last]:
                last = node
    return Verdict(tree.path(last), choices[last + 1])


def verify_sampling(
    tree: DraftTree, logits: Tensor, settings: SamplingSettings, *, context: Sequence[int], generator: torch.Generator
) -> Verdict:
    """Tokens distributed as if each had been chosen from the target's distribution. Arguments as for `verify`.

    Where the tree was chosen without chance, or the target chooses without, a token is chosen from the target at each
    node and the walk goes on while it is a child: this is plain decoding with the same random numbers, so an equal seed
    gives equal tokens. Where children were drawn, each is accepted with `min(1, p / q)`; a rejection leaves the
    target's distribution `max(p - q, 0)`, renormalised, and the draft's without that token (SpecInfer's recursive
    rejection; EAGLE's).
    """
    node = ROOT
    path: list[int] = []
    while True:
        history = None
        if settings.repetition_penalty != 1:
            history = torch.tensor([*context, *(tree.token_list[above] for above in path)])
        children = tree.children(node)
        if tree.distributions is None or settings.temperature == 0:
            token = choose(logits[node + 1], history, settings, generator)
            follow = [child for child in children if tree.token_list[child] == token]
        else:
            p = probabilities(logits[node + 1], history, settings)
            q = tree.distributions[node + 1].to(p.device, torch.float32)
            accepted, p = _accept_drawn(tree, children, p, q, generator)
            follow = [] if accepted is None else [accepted]
            token = draw(p, generator) if accepted is None else ROOT
        if not follow:
            return Verdict(path, token)
        # Of equal siblings the one with children promises more.
        node = max(follow, key=lambda child: len(tree.children(child)))
        path.append(node)


def _accept_drawn(
    tree: DraftTree, children: list[int], p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[int | None, Tensor]:
    """The accepted child, or none and what the target's distribution is after all rejections."""
    q = q.clone()
    for child in children:
        token = tree.token_list[child]
        if float(torch.rand((), generator=generator, device=p.device) * q[token]) < float(p[token]):
            return child, p
        rest = (p - q).clamp_min(0)
        # With p equal to q up to rounding a rejection cannot happen but by rounding; p is then as good as the rest.
        if float(rest.sum()) > 0:
            p = rest / rest.sum()
        q[token] = 0
        q = q / q.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return None, p
