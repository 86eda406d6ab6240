"""What each drafter proposes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.eagle import EagleDrafter, RowCache
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.target import Step
from tests.inference.speculative.stub_targets import BigramTarget, decode_losslessly

WIDE = Budget(nodes=99, depth=9)
NO_HIDDEN = torch.empty(0, 0)


def ngram_tree(context: list[int], budget: Budget = WIDE, **settings: int) -> DraftTree:
    drafter = NgramDrafter(**settings)
    drafter.start(torch.tensor(context[:2]))
    return drafter.propose(torch.tensor(context), budget)


def test_prompt_lookup_proposes_what_followed_before() -> None:
    tree = ngram_tree([1, 2, 3, 4, 5, 9, 1, 2, 3], depth=3)
    assert tree.tokens.tolist() == [4, 5, 9]
    assert tree.parent_list == [-1, 0, 1]


def test_the_longest_suffix_decides() -> None:
    assert ngram_tree([7, 1, 2, 5, 8, 2, 6, 1, 2], depth=1).tokens.tolist() == [5]


def test_where_the_past_differs_the_tree_branches_and_common_beginnings_are_shared() -> None:
    tree = ngram_tree([1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3, 0, 1, 2], longest=2, depth=2)
    assert sorted(tree.tokens[tree.children(-1)].tolist()) == [3, 4]
    shares = {int(t): float(p.exp()) for t, p in zip(tree.tokens, tree.log_probs) if t}
    assert shares == pytest.approx({3: 2 / 4, 4: 1 / 4})


def test_nothing_known_means_no_tree() -> None:
    assert len(ngram_tree([1, 2, 3, 4])) == 0
    assert len(ngram_tree([1, 1, 1, 1], Budget(nodes=0, depth=0))) == 0


def test_an_overlapping_repetition_is_continued() -> None:
    assert ngram_tree([5, 6, 5, 6, 5, 6], depth=2).tokens[:2].tolist() == [5, 6]


def test_a_draft_model_of_another_vocabulary_is_refused(bigram: BigramTarget) -> None:
    with pytest.raises(ValueError, match="12 tokens, the target 13"):
        ModelDrafter(bigram, vocab_size=13)


def test_a_draft_model_keeps_only_the_context_in_its_cache(bigram: BigramTarget) -> None:
    drafter = ModelDrafter(bigram, vocab_size=12, growth=BestNodes(top_k=2, depth=3, size=6))
    drafter.start(torch.tensor([1]))
    drafter.propose(torch.tensor([1, 2, 3]), WIDE)
    assert bigram.committed == [1, 2]
    drafter.propose(torch.tensor([1, 2, 3, 7]), WIDE)
    assert bigram.committed == [1, 2, 3]


D, V = 8, 11


class TinyHead(nn.Module):
    """One attention layer with the positions in its keys, so that a wrong row, mask or position shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.qkv, self.out = nn.Linear(2 * D, D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(
        self,
        embeddings: Tensor,
        hidden_states: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: RowCache,
    ) -> Tensor:
        x = self.fc(torch.cat((embeddings, hidden_states), dim=-1))
        angle = position_ids[..., None] * torch.arange(1, D + 1) / 7
        q, k, v = self.qkv(x + torch.sin(angle)).chunk(3, dim=-1)
        k, v = cache.update(k[:, None], v[:, None], 0)
        return x + self.out(((q[:, None] @ k.transpose(2, 3)) / D**0.5 + attention_mask).softmax(dim=-1) @ v)[:, 0]


class EagleCase:
    """A head with random weights, and what it says about a path when it is run over everything at once."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.head, self.embedding, self.unembedding = TinyHead(), torch.randn(V, D), 2 * torch.randn(V, D)
        self.hidden = torch.randn(20, D)

    def drafter(self, growth: BestNodes, token_ids: Tensor | None = None) -> EagleDrafter:
        rows = self.unembedding if token_ids is None else self.unembedding[token_ids]
        return EagleDrafter(self.head, embed=lambda t: self.embedding[t], logits=lambda x: x @ rows.T, vocab_size=V,
                            token_ids=token_ids, growth=growth)  # fmt: skip

    @torch.no_grad()
    def log_probs(self, context: list[int], path: list[int]) -> Tensor:
        """`[V]` behind a path, token by token without a cache."""
        tokens, hidden = [*context[1:], *path], self.hidden[: len(context) - 1]
        while True:
            n = len(hidden)
            mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
            out = self.head(self.embedding[tokens[:n]][None], hidden[None], position_ids=torch.arange(n)[None],
                            attention_mask=mask, cache=RowCache())[0]  # fmt: skip
            if n == len(tokens):
                return (out[-1] @ self.unembedding.T).log_softmax(dim=-1)
            hidden = torch.cat((hidden, out[-1:]))


@pytest.mark.parametrize("growth", [BestNodes(top_k=3, depth=3, size=12), BestNodes(top_k=1, depth=4, size=4)])
def test_an_eagle_tree_has_the_probabilities_of_the_head_run_over_each_path(growth: BestNodes) -> None:
    case = EagleCase()
    drafter = case.drafter(growth)
    context = [1, 5, 2, 8]
    drafter.start(torch.tensor(context[:2]))
    drafter.observe(torch.tensor(context[:2]), case.hidden[:2])
    drafter.observe(torch.tensor(context[2:3]), case.hidden[2:3])
    # A second round, to see that guesses made way for the target's states in the cache.
    for rest in ([], [3, 7]):
        start = len(context) - 1
        context = context + rest
        if rest:
            drafter.observe(torch.tensor(context[start:-1]), case.hidden[start : len(context) - 1])
        tree = drafter.propose(torch.tensor(context), WIDE)
        assert len(tree) == growth.size
        for node in range(len(tree)):
            path = tree.tokens[tree.path(node)].tolist()
            expected = case.log_probs(context, path[:-1])
            assert tree.log_probs[node].item() == pytest.approx(float(expected[path[-1]]), abs=1e-4)


def test_an_eagle_head_with_few_tokens_proposes_only_these() -> None:
    case = EagleCase()
    ids = torch.tensor([9, 3, 4])
    drafter = case.drafter(BestNodes(top_k=2, depth=2, size=6), ids)
    drafter.observe(torch.tensor([1, 2]), case.hidden[:2])
    tree = drafter.propose(torch.tensor([1, 2, 3]), WIDE)
    assert set(tree.tokens.tolist()) <= set(ids.tolist())
    reduced = case.log_probs([1, 2, 3], [])[ids].log_softmax(dim=-1)
    assert tree.log_probs[0].item() == pytest.approx(float(reduced.max()), abs=1e-4)


def test_an_eagle_head_without_the_targets_states_says_so() -> None:
    with pytest.raises(ValueError, match="needs the states of 2, got 0"):
        EagleCase().drafter(BestNodes()).propose(torch.tensor([1, 2, 3]), WIDE)


class EagleTarget(BigramTarget):
    """Its hidden states are embeddings of the case."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__(torch.randn(V, V))
        self.embedding = embedding

    def compute(self, tokens: Tensor, parents: Tensor) -> Step:
        return Step(self.logits[tokens], self.embedding[tokens])


def test_an_eagle_head_decodes_losslessly() -> None:
    case = EagleCase()
    target = EagleTarget(case.embedding)
    drafter = case.drafter(BestNodes(top_k=3, depth=3, size=12))
    statistics = decode_losslessly(target, Speculation(drafter), [1, 2, 3], 20)
    assert statistics.largest_tree == 12
