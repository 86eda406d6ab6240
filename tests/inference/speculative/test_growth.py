"""EAGLE-2's growth keeps what a search over all paths would keep; drawn trees have the shape that was settled."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockffn.inference.speculative.growth import BestNodes, Budget, DrawnNodes, Expand, draw, fit_widths, grow
from blockffn.inference.speculative.tree import DraftTree


def bigram_expand(table: Tensor, root: int = 0) -> Expand:
    """Distributions behind nodes, of a table `[V, V]` of log-probabilities."""

    def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
        return table[[root if node == -1 else int(tree.tokens[node]) for node in nodes]]

    return expand


@pytest.mark.parametrize("size", [1, 2, 5, 13, 30])
def test_with_room_for_all_it_finds_the_most_probable_paths(size: int) -> None:
    vocab, depth = 4, 3
    table = torch.randn(vocab, vocab).mul(2).log_softmax(dim=-1)
    tree = grow(bigram_expand(table), top_k=64, depth=depth, size=size)
    scores = sorted(
        (float(sum(table[a, b] for a, b in itertools.pairwise((0, *path)))), path)
        for length in range(1, depth + 1)
        for path in itertools.product(range(vocab), repeat=length)
    )[::-1][:size]
    found = {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}
    assert found == {path for _, path in scores}


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 40), st.integers(0, 3))
def test_growth_stays_within_its_limits(top_k: int, depth: int, size: int, seed: int) -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=-1)
    tree = grow(bigram_expand(table), top_k=top_k, depth=depth, size=size)
    assert len(tree) <= size
    assert all(d <= depth for d in tree.depth.tolist())
    assert all(len(tree.children(node)) <= top_k for node in range(-1, len(tree)))
    assert len({tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}) == len(tree)


def test_a_level_is_one_call_on_at_most_top_k_nodes() -> None:
    table = torch.randn(9, 9).log_softmax(dim=-1)
    calls: list[int] = []

    def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
        calls.append(len(nodes))
        return bigram_expand(table)(tree, nodes)

    grow(expand, top_k=3, depth=4, size=100)
    assert calls == [1, 3, 3, 3]


def test_a_budget_cuts_what_the_growth_would_take() -> None:
    table = torch.randn(9, 9).log_softmax(dim=-1)
    tree = BestNodes(top_k=3, depth=4, size=20)(bigram_expand(table), Budget(nodes=5, depth=2), vocab_size=9)
    assert len(tree) == 5
    assert tree.depth.max() <= 2


def test_children_are_drafted_only_behind_paths_that_are_probable_enough() -> None:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).log_softmax(dim=-1)
    asked: list[int] = []

    def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
        asked.extend(node for node in nodes if node >= 0)
        assert all(float(tree.path_log_probs[node].exp()) >= 0.2 - 1e-6 for node in nodes if node >= 0)
        return bigram_expand(table)(tree, nodes)

    tree = grow(expand, top_k=4, depth=4, size=100, least=0.2)
    assert asked
    assert len(grow(bigram_expand(table), top_k=4, depth=4, size=100, least=1.0)) == 4  # the root's
    assert 4 < len(tree) < len(grow(bigram_expand(table), top_k=4, depth=4, size=100))


def test_a_reduced_vocabulary_gives_real_token_ids() -> None:
    ids = torch.tensor([40, 10, 30])
    table = torch.tensor([[0.2, 0.7, 0.1]]).log()
    tree = grow(lambda tree, nodes: table.expand(len(nodes), -1), top_k=2, depth=1, size=9, token_ids=ids)
    assert tree.tokens.tolist() == [10, 40]


def test_impossible_tokens_are_never_proposed() -> None:
    table = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    tree = grow(lambda tree, nodes: table.expand(len(nodes), -1), top_k=4, depth=1, size=9)
    assert sorted(tree.tokens.tolist()) == [0, 1]
    drawn = draw(lambda tree, nodes: table.expand(len(nodes), -1), widths=(4,), vocab_size=4)
    assert sorted(drawn.tokens.tolist()) == [0, 1]


def test_a_drawn_tree_has_the_settled_shape_and_no_equal_siblings() -> None:
    table = torch.randn(9, 9).log_softmax(dim=-1)
    tree = DrawnNodes(widths=(3, 2, 1))(bigram_expand(table), Budget(nodes=99, depth=9), vocab_size=9)
    assert tree.depth.bincount().tolist() == [0, 3, 6, 6]
    for node in range(-1, len(tree)):
        siblings = tree.tokens[tree.children(node)].tolist()
        assert len(set(siblings)) == len(siblings)
    assert tree.distributions is not None
    assert torch.allclose(tree.distributions[0], table[0].exp())


def test_the_first_child_is_distributed_as_the_draft_says() -> None:
    q = torch.tensor([0.6, 0.3, 0.1])
    counts = torch.zeros(3, 3)
    for _ in range(3000):
        first, second = draw(lambda tree, nodes: q.log()[None], widths=(2,), vocab_size=3).tokens.tolist()
        counts[first, second] += 1
    expected = torch.tensor([[0.0 if a == b else q[a] * q[b] / (1 - q[a]) for b in range(3)] for a in range(3)])
    assert torch.allclose(counts / counts.sum(), expected, atol=0.03)


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 40), st.integers(0, 5))
def test_fitted_widths_fit(widths: list[int], nodes: int, depth: int) -> None:
    kept = fit_widths(widths, nodes=nodes, depth=depth)
    total, level = 0, 1
    for width, wanted in zip(kept, widths):
        assert 1 <= width <= wanted
        level *= width
        total += level
    assert total <= nodes
    assert len(kept) <= depth
