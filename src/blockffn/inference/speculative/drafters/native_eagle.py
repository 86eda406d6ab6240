"""The EAGLE head as drafter on the CPU: `EagleDrafter`, with each level of a tree in one call of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.inference.ids import Ids, listed
from blockffn.inference.native_draft import NativeDraft
from blockffn.inference.speculative.drafters.eagle import StatesDrafter
from blockffn.inference.speculative.growth import Budget, Growth
from blockffn.inference.speculative.tree import ROOT, DraftTree, no_tree
from blockffn.ops.native import MAX_STEP


class NativeEagleDrafter(StatesDrafter):
    """Drafts as `EagleDrafter` does, which is its reference.

    Args:
        growth: how distributions become a tree; of `BestNodes`' only the best tokens leave the kernels.
    """

    def __init__(
        self, draft: NativeDraft, *, growth: Growth | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(growth, generator)
        self.draft = draft
        self._length = 0  # rows in the draft's cache whose states are the target's

    def start(self, prompt: Ids) -> None:
        super().start(prompt)
        self._length = 0

    def propose(self, context: Ids, budget: Budget) -> DraftTree:
        """See `Drafter`.

        Raises:
            ValueError: `observe` has not been given the states of all tokens but the last, or a level that does not
                fit (`NativeDraft.run`).
        """
        if budget.nodes < 1 or budget.depth < 1:
            return no_tree()
        known = len(context) - 1
        states = self._take_unseen(known, self._length)
        if states.dtype != torch.float32 or not states.is_contiguous():
            states = states.float().contiguous()
        levels = _Levels(self.draft, listed(context[self._length + 1 :]), states, length=self._length)
        self._length = known
        return self._growth(
            levels, budget, vocab_size=self.draft.description.vocab_size, token_ids=self.draft.token_ids,
            generator=self._generator,
        )  # fmt: skip


class _Levels:
    """Runs a draft over one tree, level after level; first over what the target has said since, which gives the root's
    children."""

    def __init__(self, draft: NativeDraft, tokens: list[int], states: Tensor, *, length: int) -> None:
        self._draft, self._tokens, self._states, self._length = draft, tokens, states, length
        self._outputs = states  # later of the root, then of the nodes in the order of their runs
        self._row = {ROOT: -1}
        self._parents: list[int] = []

    def __call__(self, tree: DraftTree, nodes: list[int]) -> Tensor:
        return self._run(tree, nodes, num_best=0)[0].log_softmax(dim=-1)

    def best(self, tree: DraftTree, nodes: list[int], top_k: int) -> tuple[Tensor, Tensor]:
        """See `Expand`."""
        return self._run(tree, nodes, num_best=top_k)

    def chain(self, count: int, least: float) -> tuple[list[int], list[float]]:
        """See `Expand`."""
        *earlier, (tokens, states) = self._pieces()
        for piece, its_states in earlier:
            self._draft.run(piece, its_states, length=self._length)
            self._length += len(piece)
        return self._draft.run_chain(tokens, states, length=self._length, count=count, least=least)

    def _pieces(self) -> list[tuple[list[int], Tensor]]:
        """What the target has said since, as much as a step takes at a time."""
        if len(self._tokens) <= MAX_STEP:
            return [(self._tokens, self._states)]
        begins = range(0, len(self._tokens), MAX_STEP)
        return [(self._tokens[i : i + MAX_STEP], self._states[i : i + MAX_STEP]) for i in begins]

    def _run(self, tree: DraftTree, nodes: list[int], *, num_best: int) -> tuple[Tensor, Tensor]:
        if nodes == [ROOT]:
            return self._catch_up(num_best)
        above = [self._row[tree.parent_list[node]] for node in nodes]
        self._row.update({node: len(self._parents) + i for i, node in enumerate(nodes)})
        self._parents += above
        outputs, values, indices = self._draft.run(
            [tree.token_list[node] for node in nodes], self._outputs[[row + 1 for row in above]], length=self._length,
            parents=self._parents, num_logits=len(nodes), num_best=num_best,
        )  # fmt: skip
        self._outputs = torch.cat((self._outputs, outputs))
        return values, indices

    def _catch_up(self, num_best: int) -> tuple[Tensor, Tensor]:
        pieces = self._pieces()
        for i, (tokens, states) in enumerate(pieces, start=1):
            last = i == len(pieces)
            outputs, values, indices = self._draft.run(
                tokens, states, length=self._length, num_logits=int(last), num_best=num_best
            )
            self._length += len(tokens)
        self._outputs = outputs[-1:]
        return values, indices
