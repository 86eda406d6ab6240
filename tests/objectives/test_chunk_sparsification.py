"""Chunk sparsification against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from blockffn.objectives import chunk_sparsification


def random_shares(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    activated = F.relu(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))
    return activated / activated.sum(dim=-1, keepdim=True).clamp_min(1e-6)


def by_definition(tokens: list[list[float]]) -> float:
    """Mean over experts of 1 - prod_k (1 - p_k)."""
    experts = range(len(tokens[0]))
    return sum(1 - math.prod(1 - token[e] for token in tokens) for e in experts) / len(tokens[0])


def test_equals_the_definition_on_two_chunks():
    chunks = [[[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]], [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]]
    expected = sum(map(by_definition, chunks)) / 2
    shares = torch.tensor([chunks[0] + chunks[1]])
    assert chunk_sparsification(shares, chunk_length=2).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_random_routing_scores_the_same_at_any_density(density):
    generator = torch.Generator().manual_seed(5)
    activated = torch.rand(64, 64, 48, generator=generator) * (torch.rand(64, 64, 48, generator=generator) < density)
    activated[..., 0] += 1e-6 * (activated.sum(dim=-1) == 0)
    value = chunk_sparsification(activated / activated.sum(dim=-1, keepdim=True)).item()
    assert 0.68 < value < 1 - math.exp(-64 / 48) + 0.01


def test_ten_shared_experts_of_48_score_their_union():
    shares = torch.zeros(1, 64, 48)
    shares[..., :10] = 0.1
    assert chunk_sparsification(shares).item() == pytest.approx(0.208, abs=5e-4)


def test_one_expert_for_all_tokens_scores_one_over_the_number_of_experts():
    shares = torch.zeros(1, 64, 48)
    shares[..., 7] = 1.0
    assert chunk_sparsification(shares).item() == pytest.approx(1 / 48, rel=1e-6)


def test_unused_experts_contribute_exactly_nothing():
    documents = torch.tensor([[0] * 5 + [1] * 3])
    assert chunk_sparsification(torch.zeros(1, 8, 4), chunk_length=8).item() == 0.0
    assert chunk_sparsification(torch.zeros(1, 8, 4), chunk_length=8, document_ids=documents).item() == 0.0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_extreme_shares_have_finite_gradients(share):
    shares = torch.full((1, 64, 4), share).requires_grad_()
    chunk_sparsification(shares).backward()
    assert shares.grad.isfinite().all()


def test_a_lone_share_of_one_has_the_gradient_of_its_neighbours():
    shares = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).requires_grad_()
    chunk_sparsification(shares, chunk_length=2).backward()
    # d/dp of 1 - (1 - p)(1 - q) is 1 - q: 1 for both experts of the first token, 0 beside the share of 1.
    torch.testing.assert_close(shares.grad, torch.tensor([[[0.5, 0.5], [0.0, 0.5]]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_gradient_equals_finite_differences(aligned):
    shares = random_shares(1, 8, 3, seed=1, dtype=torch.float64).requires_grad_()
    documents = torch.tensor([[0, 0, 0, -1, 1, 1, 1, 1]] if aligned else [[0, 0, 0, 1, 1, 1, 2, -1]])
    assert torch.autograd.gradcheck(
        lambda p: chunk_sparsification(p, chunk_length=4, document_ids=documents, aligned=aligned), shares
    )


def test_where_documents_meet_each_part_of_a_window_is_a_chunk():
    shares = random_shares(1, 8, 3, seed=2)
    tokens = shares[0].tolist()
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1, -1]])
    parts = [tokens[0:2], tokens[2:4], tokens[4:7]]
    expected = sum(map(by_definition, parts)) / 3
    assert chunk_sparsification(shares, chunk_length=4, document_ids=documents).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_windows_of_padding_do_not_dilute():
    shares = random_shares(1, 4, 3, seed=3)
    padded = torch.cat([shares, torch.full((1, 8, 3), 1 / 3)], dim=1)
    documents = torch.tensor([[0] * 4 + [-1] * 8])
    for aligned in (False, True):
        value = chunk_sparsification(padded, chunk_length=4, document_ids=documents, aligned=aligned)
        torch.testing.assert_close(value, chunk_sparsification(shares, chunk_length=4))


def test_the_path_for_aligned_documents_equals_the_general_one():
    shares = random_shares(2, 16, 5, seed=4)
    documents = torch.tensor([[0] * 6 + [-1, -1] + [1] * 8, [0] * 4 + [1] * 3 + [-1] * 9])
    torch.testing.assert_close(
        chunk_sparsification(shares, chunk_length=4, document_ids=documents, aligned=True),
        chunk_sparsification(shares, chunk_length=4, document_ids=documents),
    )


def test_autocast_does_not_coarsen_it():
    shares = random_shares(1, 64, 8, seed=5)
    documents = torch.zeros(1, 64, dtype=torch.long)
    outside = chunk_sparsification(shares, document_ids=documents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chunk_sparsification(shares, document_ids=documents).item() == outside.item()


def test_bfloat16_shares_are_computed_in_float32():
    shares = random_shares(2, 64, 8, seed=6).bfloat16()
    value = chunk_sparsification(shares)
    assert value.dtype == torch.float32
    assert value.item() == chunk_sparsification(shares.float()).item()


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 0, 4)])
def test_without_chunks_the_loss_is_zero(shape):
    assert chunk_sparsification(torch.ones(shape), chunk_length=4).item() == 0.0


def test_a_row_that_does_not_divide_into_chunks_is_an_error_naming_both():
    with pytest.raises(ValueError, match="rows of 100 positions do not divide into chunks of 64"):
        chunk_sparsification(torch.zeros(1, 100, 4))


def test_a_chunk_of_no_positions_is_an_error():
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        chunk_sparsification(torch.zeros(1, 4, 4), chunk_length=0)
