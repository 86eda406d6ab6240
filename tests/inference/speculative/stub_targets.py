"""Targets for tests: a table of bigrams, and a real model that recomputes everything with an explicit tree mask."""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.ids import Ids, listed
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree, chain
from blockffn.inference.target import Step, Target
from blockffn.models.causal_lm import BlockFFNForCausalLM


class RecordingTarget:
    """Keeps the committed tokens and checks that it is called as the protocol says. A subclass computes."""

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.vocab_size, self._capacity = vocab_size, capacity
        self.calls: list[int] = []
        self.reset()

    @property
    def length(self) -> int:
        return len(self.committed)

    @property
    def capacity(self) -> int:
        return self._capacity

    def reset(self) -> None:
        self.committed: list[int] = []
        self._pending: tuple[list[int], list[int]] | None = None

    def extend(self, tokens: Ids, parents: Ids | None = None) -> Step:
        assert self._pending is None, "extend without commit"
        assert self.length + len(tokens) <= self.capacity, "the cache is full"
        parents = range(-1, len(tokens) - 1) if parents is None else parents
        self._pending = listed(tokens), listed(parents)
        assert all(parent < token for token, parent in enumerate(self._pending[1]))
        self.calls.append(len(tokens))
        return self.compute(torch.as_tensor(tokens), torch.as_tensor(parents))

    def commit(self, kept: Ids) -> None:
        assert self._pending is not None, "commit without extend"
        tokens, parents = self._pending
        previous = -1
        for index in listed(kept):
            assert parents[index] == previous, "kept is not a path"
            self.committed.append(tokens[index])
            previous = index
        self._pending = None

    def compute(self, tokens: Tensor, parents: Tensor) -> Step:
        raise NotImplementedError


class BigramTarget(RecordingTarget):
    """Logits depend on the last token alone; hidden states are one-hot of it. Each token has some active experts."""

    def __init__(self, logits: Tensor, capacity: int = 10_000) -> None:
        super().__init__(len(logits), capacity)
        self.logits = logits

    def compute(self, tokens: Tensor, parents: Tensor) -> Step:
        hidden = torch.nn.functional.one_hot(tokens, self.vocab_size).float()
        experts = torch.stack((tokens % 8, (tokens * 3 + 1) % 8), dim=1)
        union = torch.tensor([len(experts.unique())])
        return Step(self.logits[tokens], hidden, union, torch.tensor([[len(set(row)) for row in experts.tolist()]]))


class RecomputingTarget(RecordingTarget):
    """A model run over the whole text every time."""

    def __init__(self, model: BlockFFNForCausalLM, capacity: int = 256) -> None:
        super().__init__(model.vocab_size, capacity)
        self.model = model

    @torch.no_grad()
    def compute(self, tokens: Tensor, parents: Tensor) -> Step:
        before = self.length
        tree = DraftTree(tokens, parents, torch.zeros(len(tokens)))
        mask = torch.ones(before + len(tokens), before + len(tokens)).tril().bool()
        mask[before:, before:] = tree.ancestors
        additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
        positions = torch.cat((torch.arange(before), before + tree.depth - 1))[None]
        ids = torch.cat((torch.tensor(self.committed, dtype=torch.int64), tokens))[None]
        out = self.model.model(
            ids, attention_mask=additive, position_ids=positions, use_cache=False, output_routing=True
        )
        hidden = out.last_hidden_state[0, before:]
        active = torch.stack([routing.weights[0, before:] != 0 for routing in out.routings])
        logits = self.model.lm_head(self.model.head_input(hidden)).float()
        return Step(logits, hidden, active.any(dim=1).sum(dim=-1), active.sum(dim=-1))


class OracleDrafter:
    """Knows the text and proposes it, with every `wrong_every`-th token spoilt (0: never; 1: always)."""

    deterministic = True

    def __init__(self, text: list[int], vocab_size: int, *, wrong_every: int, length: int = 5) -> None:
        self.text, self.vocab_size, self.wrong_every, self.length = text, vocab_size, wrong_every, length
        self.observed: list[int] = []

    def start(self, prompt: Ids) -> None:
        self.observed = []

    def observe(self, tokens: Ids, hidden: Tensor) -> None:
        assert len(tokens) == len(hidden)
        self.observed += listed(tokens)

    def propose(self, context: Ids, budget: Budget) -> DraftTree:
        size = min(self.length, budget.depth, budget.nodes)
        tokens = self.text[len(context) : len(context) + size]
        if self.wrong_every:
            spoilt = [(len(context) + i) % self.wrong_every == 0 for i in range(len(tokens))]
            tokens = [(t + 1) % self.vocab_size if bad else t for t, bad in zip(tokens, spoilt)]
        return chain(tokens)


def decode_losslessly(
    target: Target, speculation: Speculation, prompt: list[int], max_new_tokens: int
) -> SpeculationStatistics:
    """Decode greedily with drafts and without, which must be the same; what became of the drafts."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    decoded = speculative_generate(target, speculation, prompt, settings)
    assert decoded.token_ids == generate(target, prompt, settings).token_ids
    assert decoded.statistics.speculation is not None
    return decoded.statistics.speculation
