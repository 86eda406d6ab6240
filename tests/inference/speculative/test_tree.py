"""Draft trees keep parents before children, and the best nodes of a tree are a tree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockffn.inference.speculative.tree import DraftTree, chain, no_tree


@st.composite
def trees(draw: st.DrawFn, largest: int = 24) -> DraftTree:
    size = draw(st.integers(0, largest))
    parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    log_probs = draw(st.lists(st.sampled_from([0.0, -0.1, -0.5, -1.0, -3.0]), min_size=size, max_size=size))
    return DraftTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64),
                     torch.tensor(log_probs))  # fmt: skip


@given(trees())
def test_a_node_attends_to_its_path_and_nothing_else(tree: DraftTree) -> None:
    for node in range(len(tree)):
        path = tree.path(node)
        assert tree.ancestors[node].nonzero().flatten().tolist() == path
        assert len(path) == tree.depth[node]
        assert tree.path_log_probs[node].item() == pytest.approx(float(tree.log_probs[path].sum()))


@given(trees())
def test_ranks_count_siblings_in_order(tree: DraftTree) -> None:
    for node in range(-1, len(tree)):
        assert tree.rank[tree.children(node)].tolist() == list(range(len(tree.children(node))))


@given(trees(), st.integers(0, 30))
def test_the_best_nodes_are_a_tree_of_the_largest_scores(tree: DraftTree, size: int) -> None:
    best = tree.best(size)
    assert len(best) == min(size, len(tree))
    expected = tree.path_log_probs.sort(descending=True).values[:size]
    assert torch.allclose(best.path_log_probs.sort(descending=True).values, expected, atol=1e-5)


@given(trees())
def test_behind_a_root_every_parent_moves_by_one(tree: DraftTree) -> None:
    tokens, parents = tree.behind(7)
    assert tokens == [7, *tree.token_list]
    expected = [-1, *(parent + 1 for parent in tree.parent_list)]
    if parents is None:
        assert expected == list(range(-1, len(tree)))
    else:
        assert parents == expected


def test_a_chain_is_a_tree_without_branches() -> None:
    tree = chain([5, 6, 7], [-0.5, -0.25, -1.0])
    assert tree.parent_list == [-1, 0, 1]
    assert tree.depth.tolist() == [1, 2, 3]
    assert tree.path_log_probs.tolist() == [-0.5, -0.75, -1.75]
    assert len(no_tree()) == 0
    assert tree.behind(4)[1] is None
    assert no_tree().behind(4)[1] is None


def test_a_parent_behind_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="parent of node 1 must come before it, got 1"):
        DraftTree(torch.tensor([1, 2]), torch.tensor([-1, 1]), torch.zeros(2))


def test_a_subtree_without_a_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the parents"):
        chain([1, 2, 3]).subtree(torch.tensor([0, 2]))


def test_a_tree_drawn_at_random_is_not_cut() -> None:
    tree = DraftTree(torch.tensor([1, 2]), torch.tensor([-1, -1]), torch.zeros(2), torch.ones(3, 4) / 4)
    with pytest.raises(ValueError, match="drawn at random"):
        tree.best(1)
