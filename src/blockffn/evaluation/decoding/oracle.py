"""A drafter that knows what the target will say and is right as often as it is told to be: simulated acceptance.

For timing speculation where no trained draft is at hand, such as with random weights. What it drafts is known in
advance, so it shows what a draft of that quality would be worth, and nothing about any real one. What drafting costs
can be made real: `PricedDrafter` runs a real draft on every level of the oracle's trees.

The draft's confidence varies from position to position around the rate asked for. It is honest: where it says 0.8, its
first choice is right in 80 of 100 cases. A further choice is right with half of what is left, and so on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from blockffn.configuration import BlockFFNConfig
from blockffn.inference.ids import Ids, listed
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import BestNodes, Budget, Expand, Growth, grow, top_children
from blockffn.inference.speculative.tree import ROOT, DraftTree, chain, no_tree
from blockffn.models.draft import DraftModel

BRANCHES = 8  # children that are offered for a node
PASSAGE = 32  # tokens of a text that are equally hard
CONCENTRATION = 2.0  # of the confidences around their mean; small: mostly near 0 or 1
DRAFT_VOCABULARY = 16384  # tokens that a draft proposes, as the published one does


@dataclass(frozen=True)
class _Position:
    """What the draft says at a position of the text: log-probabilities of its choices, and which of them is right."""

    log_probs: Tensor
    first: tuple[int, float]  # the one that a tree takes first, and its log-probability; several may be equal
    right: int  # BRANCHES or more: none


class OracleDrafter:
    """Proposes trees behind texts that it has been told (`learn`).

    Args:
        rates: mean probability that its first choice is right, between 0 and 1. Of several, each is that of a passage
            of the text, in turn.
        growth: how its distributions become a tree.
        seed: which positions are easy, and where it errs; equal for all who use the same seed.

    Raises:
        ValueError: a rate outside 0 … 1.
    """

    deterministic = True

    def __init__(self, *rates: float, vocab_size: int, growth: BestNodes | None = None, seed: int = 0) -> None:
        if not rates or not all(0 < rate < 1 for rate in rates):
            raise ValueError(f"the rate of a simulated draft lies between 0 and 1, got {rates}")
        self.rates, self.growth = rates, BestNodes() if growth is None else growth
        self._vocab_size, self._seed = vocab_size, seed
        self._texts: dict[tuple[int, ...], list[int]] = {}
        self._text: list[int] = []
        self._positions: dict[int, _Position] = {}

    def learn(self, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        """What the target says behind a prompt. Behind others every proposal is wrong."""
        self._texts[tuple(prompt)] = [*prompt, *continuation]

    def start(self, prompt: Ids) -> None:
        self._text = self._texts.get(tuple(listed(prompt)), [])
        self._positions = {}
        for place in range(len(prompt), len(self._text)):  # now: while decoding, their time would count as the draft's
            self.position(place)

    def observe(self, tokens: Ids, hidden: Tensor) -> None:
        """Nothing to learn."""

    def propose(self, context: Ids, budget: Budget, *, beside: Expand | None = None) -> DraftTree:
        """See `Drafter`. `beside`: asked for every level as well, for the time it takes."""
        length = len(context)
        top_k, depth, size = self.growth.within(budget)
        if size < 1 or depth < 1:
            return no_tree()
        top_k = min(top_k, BRANCHES)
        if top_k == 1 and (beside is None or hasattr(beside, "chain")):
            return self._chain(length, min(depth, size), budget.least, beside)
        levels = _Levels(self, length, top_k, beside)
        ranks = grow(levels, top_k=top_k, depth=depth, size=size, least=budget.least)
        return DraftTree(self._tokens(ranks, length), ranks.parent_list, ranks.log_prob_list)

    def _chain(self, length: int, count: int, least: float, beside: Expand | None) -> DraftTree:
        """What `grow` makes of the first choices; as short a work as for a draft that runs a chain in one call, for
        its time counts as the draft's."""
        tokens, log_probs = list[int](), list[float]()
        total, floor, is_right = 0.0, math.log(least) if least > 0 else -math.inf, True
        while len(tokens) < count and total >= floor:
            node = len(tokens)
            choice, log_prob = self.position(length + node).first
            token, is_right = self._token(length + node, node, choice, is_right)
            tokens.append(token)
            log_probs.append(log_prob)
            total += log_prob
        if beside is not None:
            beside.chain(len(tokens), -math.inf)  # type: ignore[attr-defined]
        return chain(tokens, log_probs)

    def position(self, place: int) -> _Position:
        """Of the token at a place of the text. What follows a wrong token is as easy as what follows the right one."""
        if place not in self._positions:
            rng = random.Random(f"{self._seed} {place} {self._text[place - 1 : place + 1]}")
            rate = self.rates[place // PASSAGE % len(self.rates)]
            first = rng.betavariate(CONCENTRATION * rate, CONCENTRATION * (1 - rate))
            first = min(max(first, 0.01), 0.99)
            shares = [first]
            for _ in range(1, BRANCHES):  # half of what is left, and never more than the choice before
                shares.append(min(shares[-1], (1 - sum(shares)) / 2))
            luck, right = rng.random(), 0
            while right < BRANCHES and luck >= shares[right]:
                luck -= shares[right]
                right += 1
            log_probs = torch.tensor(shares).log()
            best = log_probs.topk(1)
            first_choice = (int(best.indices), float(best.values))
            self._positions[place] = _Position(log_probs, first_choice, right)
        return self._positions[place]

    def _tokens(self, ranks: DraftTree, length: int) -> list[int]:
        """Of a tree whose tokens are choices."""
        right = {ROOT}
        tokens = []
        chosen, depths = ranks.token_list, ranks.depths
        for node, parent in enumerate(ranks.parent_list):
            token, is_right = self._token(length + depths[node] - 1, node, chosen[node], parent in right)
            tokens.append(token)
            if is_right:
                right.add(node)
        return tokens

    def _token(self, place: int, node: int, choice: int, parent_is_right: bool) -> tuple[int, bool]:
        """The token of a node, and whether it is right: its parent is, and it is the right choice at its place."""
        right = self._text[place] if place < len(self._text) else None
        if right is not None and parent_is_right and choice == self._positions[place].right:
            return right, True
        wrong = hash((self._seed, place, node, choice)) % (self._vocab_size - 1)
        return wrong if right is None or wrong < right else wrong + 1, False


class _Levels:
    """What the oracle says behind nodes, as `grow` asks for it; a real draft is asked beside it, for its time."""

    def __init__(self, oracle: OracleDrafter, length: int, top_k: int, beside: Expand | None) -> None:
        self._oracle, self._length, self._top_k, self._beside = oracle, length, top_k, beside

    def __call__(self, tree: DraftTree, nodes: list[int]) -> Tensor:
        if self._beside is not None:
            top_children(self._beside, tree, nodes, self._top_k)
        depths = [0 if node == ROOT else tree.depths[node] for node in nodes]
        return torch.stack([self._oracle.position(self._length + depth).log_probs for depth in depths])


class PricedDrafter:
    """Proposes what an oracle proposes; a real draft runs on every level of its trees, for its time.

    Args:
        price: makes the real drafter, given how its trees are to grow: as the oracle's.
    """

    deterministic = True

    def __init__(self, oracle: OracleDrafter, price: Callable[[Growth], Drafter]) -> None:
        self._oracle = oracle
        self._growth = _OraclesTree(oracle)
        self._price = price(self._growth)

    def start(self, prompt: Sequence[int]) -> None:
        self._price.start(prompt)
        self._oracle.start(prompt)

    def propose(self, context: Sequence[int], budget: Budget) -> DraftTree:
        self._growth.context = context
        return self._price.propose(context, budget)

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        self._price.observe(tokens, hidden)


class _OraclesTree:
    """A `Growth` that asks for the distributions of the oracle's nodes and takes the oracle's word."""

    deterministic: ClassVar[bool] = True
    context: Sequence[int]

    def __init__(self, oracle: OracleDrafter) -> None:
        self._oracle = oracle

    def __call__(
        self,
        expand: Expand,
        budget: Budget,
        *,
        vocab_size: int,
        token_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DraftTree:
        return self._oracle.propose(self.context, budget, beside=expand)


def random_eagle_head(config: BlockFFNConfig, *, dtype: torch.dtype, seed: int = 0) -> DraftModel:
    """A head of the published one's proportions beside a target: one layer, heads of 128, random weights."""
    width = config.hidden_size
    head_dim = 128 if width % 128 == 0 else width
    heads = width // head_dim
    sizes = {
        "num_hidden_layers": 1, "intermediate_size": max(64, round(2.8125 * width / 64) * 64), "ffn_type": "dense",
        "attention_type": "gqa", "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": max(1, heads // 4) if heads % 4 == 0 else 1,
    }  # fmt: skip
    surplus = ("quantization_config", "architectures", "dtype")
    values = {name: value for name, value in config.to_dict().items() if name not in surplus}
    draft_config = BlockFFNConfig.from_dict(values | sizes)
    draft_config._attn_implementation = "eager"
    ids = None if config.vocab_size <= DRAFT_VOCABULARY else torch.arange(DRAFT_VOCABULARY)
    draft = DraftModel(draft_config, token_ids=ids)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return draft.to(dtype).requires_grad_(False).eval()
