"""A small model as drafter: any `Target` over the same vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.inference.ids import Ids, listed
from blockffn.inference.speculative.growth import BestNodes, Budget, Growth
from blockffn.inference.speculative.tree import ROOT, DraftTree, no_tree
from blockffn.inference.target import Target


class ModelDrafter:
    """Drafts with a smaller model.

    Args:
        draft: the model, with a cache of its own.
        vocab_size: of the target.
        growth: how its distributions become a tree.
        temperature: flattens (above 1) or sharpens its distributions.

    A level is one call of the model on the nodes to expand and their ancestors, because a `Target` keeps no tentative
    rows from call to call. Where its cache is full it proposes nothing.

    Raises:
        ValueError: the vocabularies differ, or the temperature is not positive.
    """

    def __init__(
        self,
        draft: Target,
        *,
        vocab_size: int,
        growth: Growth | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if draft.vocab_size != vocab_size:
            raise ValueError(
                f"the draft model has {draft.vocab_size} tokens, the target {vocab_size}; they must share a tokenizer"
            )
        if not temperature > 0:
            raise ValueError(f"temperature of a draft must be positive, got {temperature}")
        self._draft, self._growth = draft, BestNodes() if growth is None else growth
        self._temperature, self._generator = temperature, generator

    @property
    def deterministic(self) -> bool:
        return self._growth.deterministic

    def start(self, prompt: Ids) -> None:
        self._draft.reset()

    def observe(self, tokens: Ids, hidden: Tensor) -> None:
        """Nothing to learn: `propose` catches up with the context."""

    def propose(self, context: Ids, budget: Budget) -> DraftTree:
        draft = self._draft
        if budget.nodes < 1 or budget.depth < 1 or len(context) > draft.capacity:
            return no_tree()
        *unseen, root = listed(context[draft.length :])
        if unseen:
            draft.extend(unseen)
            draft.commit(range(len(unseen)))

        def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
            involved = sorted({ancestor for node in nodes for ancestor in tree.path(node)})
            if draft.length + 1 + len(involved) > draft.capacity:
                return torch.full((len(nodes), draft.vocab_size), -torch.inf)
            tokens, parents = tree.subtree(involved).behind(root)
            logits = draft.extend(tokens, parents).logits
            draft.commit([])
            row = {ROOT: 0} | {node: i + 1 for i, node in enumerate(involved)}
            return (logits[[row[node] for node in nodes]].float() / self._temperature).log_softmax(dim=-1)

        return self._growth(expand, budget, vocab_size=draft.vocab_size, generator=self._generator)
