"""An EAGLE head as drafter: one layer that guesses from the target's hidden states what the target will say.

At position `t` the head gets the embedding of token `t + 1` and the target's final hidden state of token `t`, and its
output describes token `t + 2`. Where the target's state is not known, deeper in a tree, the head's own output stands in
for it, without a norm. When the target's states arrive, they replace the guesses in the head's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from blockffn.inference.ids import Ids
from blockffn.inference.speculative.growth import BestNodes, Budget, Growth
from blockffn.inference.speculative.tree import ROOT, DraftTree, no_tree
from blockffn.models.packed import PackedLinear
from blockffn.ops.quantization import unpack_rows

if TYPE_CHECKING:
    from blockffn.models.causal_lm import BlockFFNForCausalLM
    from blockffn.models.draft import DraftModel


class RowCache:
    """Keys and values of the head's layers, one row a token; the last rows can be taken back."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return next(iter(self._layers.values()))[0].shape[2] if self._layers else 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append `[1, H, T, K]` and `[1, H, T, W]`; returns all rows of the layer."""
        if layer_idx in self._layers:
            old_key, old_value = self._layers[layer_idx]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self._layers[layer_idx] = key, value
        return key, value

    def truncate(self, length: int) -> None:
        self._layers = {i: (key[:, :, :length], value[:, :, :length]) for i, (key, value) in self._layers.items()}


class EagleHead(Protocol):
    """The head's network."""

    def __call__(
        self,
        embeddings: Tensor,
        hidden_states: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: RowCache,
    ) -> Tensor:
        """`[1, T, D]` each to `[1, T, D]`, behind the rows of the cache, which it appends to.

        Args:
            position_ids: `[1, T]`. attention_mask: additive `[1, 1, T, S + T]` for `S` rows in the cache.
        """
        ...


class StatesDrafter:
    """What drafters that read the target's states share: how a tree grows, and the states that they have not read."""

    def __init__(self, growth: Growth | None, generator: torch.Generator | None) -> None:
        self._growth, self._generator = BestNodes() if growth is None else growth, generator
        # States of the target that the draft's cache does not hold, and how many they are.
        self._unseen: list[Tensor] = []
        self._num_unseen = 0

    @property
    def deterministic(self) -> bool:
        return self._growth.deterministic

    def start(self, prompt: Ids) -> None:
        self._unseen, self._num_unseen = [], 0

    def observe(self, tokens: Ids, hidden: Tensor) -> None:
        self._unseen.append(hidden)
        self._num_unseen += hidden.shape[0]

    def _take_unseen(self, known: int, held: int) -> Tensor:
        """States `[known - held, D]` behind the `held` ones that the draft's cache has.

        Raises:
            ValueError: `observe` has not been given all of them, or there are none.
        """
        new = self._num_unseen
        if held + new != known or not new:
            raise ValueError(f"a context of {known + 1} tokens needs the states of {known}, got {held + new}")
        states = self._unseen[0] if len(self._unseen) == 1 else torch.cat(self._unseen)
        self._unseen, self._num_unseen = [], 0
        return states


class EagleDrafter(StatesDrafter):
    """Drafts with an EAGLE head.

    Args:
        head: the network, with its weights.
        embed: token ids `[T]` to embeddings `[T, D]`, as the head's input wants them (scaled as the target scales).
        logits: outputs `[T, D]` of the head to logits `[T, V']`, by the target's head.
        vocab_size: of the target. token_ids: `[V']` the tokens behind `logits`, of a reduced vocabulary; `None`: all.
        growth: how its distributions become a tree.
    """

    def __init__(
        self,
        head: EagleHead,
        *,
        embed: Callable[[Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        vocab_size: int,
        token_ids: Tensor | None = None,
        growth: Growth | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(growth, generator)
        self._head, self._embed, self.logits = head, embed, logits
        self._vocab_size, self._token_ids = vocab_size, token_ids
        self._cache = RowCache()

    def start(self, prompt: Ids) -> None:
        super().start(prompt)
        self._cache = RowCache()

    @torch.no_grad()
    def propose(self, context: Ids, budget: Budget) -> DraftTree:
        """See `Drafter`.

        Raises:
            ValueError: `observe` has not been given the states of all tokens but the last.
        """
        if budget.nodes < 1 or budget.depth < 1:
            return no_tree()
        known = len(context) - 1
        outputs = {ROOT: self._catch_up(context, known)}
        row_of: dict[int, int] = {}  # rows of nodes in the cache, counted from `known`

        def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
            if nodes != [ROOT]:
                row_of.update({node: len(row_of) + i for i, node in enumerate(nodes)})
                mask = torch.full((len(nodes), known + len(row_of)), -torch.inf)
                mask[:, :known] = 0
                for i, node in enumerate(nodes):
                    mask[i, [known + row_of[ancestor] for ancestor in tree.path(node)]] = 0
                hidden = torch.stack([outputs[tree.parent_list[node]] for node in nodes])
                out = self._run(tree.tokens[nodes], hidden, known + tree.depth[nodes] - 1, mask)
                outputs.update(zip(nodes, out))
            return self.logits(torch.stack([outputs[node] for node in nodes])).float().log_softmax(dim=-1)

        tree = self._growth(
            expand, budget, vocab_size=self._vocab_size, token_ids=self._token_ids, generator=self._generator
        )
        self._cache.truncate(known)
        return tree

    def _catch_up(self, context: Ids, known: int) -> Tensor:
        """Run the head over the states that the target has computed since; the last output describes the next token."""
        start = self._cache.length
        states = self._take_unseen(known, start)
        mask = torch.full((len(states), known), -torch.inf).triu(start + 1)
        positions = torch.arange(start, known)
        return self._run(torch.as_tensor(context[start + 1 :]), states, positions, mask)[-1]

    def _run(self, tokens: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        device = hidden.device
        embeddings = self._embed(tokens.to(device))
        return self._head(
            embeddings[None],
            hidden.to(embeddings.dtype)[None],  # a target may compute in another precision than it stores
            position_ids=positions.to(device)[None],
            attention_mask=mask.to(device, embeddings.dtype)[None, None],
            cache=self._cache,
        )[0]


def eagle_drafter(
    draft: DraftModel,
    model: BlockFFNForCausalLM,
    *,
    growth: Growth | None = None,
    generator: torch.Generator | None = None,
) -> EagleDrafter:
    """The drafter of a draft model and its target, which lends its embedding and its head.

    With a reduced vocabulary the rows of the head are copied once.
    """
    ids, config = draft.token_ids, model.config
    head = model.lm_head if ids is None else _rows(model.lm_head, ids, draft.fc.weight.dtype)
    return EagleDrafter(
        draft,
        embed=lambda tokens: model.model.embed_tokens(tokens) * config.scale_emb,
        logits=lambda output: head(model.head_input(output)),
        vocab_size=config.vocab_size,
        token_ids=ids,
        growth=growth,
        generator=generator,
    )


def _rows(head: nn.Module, ids: Tensor, dtype: torch.dtype) -> nn.Module:
    """The head for the tokens `ids` alone."""
    if isinstance(head, PackedLinear):
        weight = unpack_rows(head.packed, head.layout, ids)
    else:
        weight = head.get_parameter("weight").detach()[ids]
    rows = nn.Linear(weight.shape[1], len(ids), bias=False, device="meta")
    rows.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return rows
