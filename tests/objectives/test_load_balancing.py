"""Load balance between experts and activity balance between neighbours, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.objectives import balanced_l1, l1, load_balancing, token_balance


def test_equals_the_formula_on_one_row():
    weights = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 4.0]]])
    shares = weights / weights.sum(dim=-1, keepdim=True)
    mean_shares = [(2 / 3 + 0) / 2, 0.0, (1 / 3 + 1) / 2]
    load = [1 / 3, 0.0, 2 / 3]
    expected = 3 * sum(s * w for s, w in zip(mean_shares, load))
    assert load_balancing(shares, weights).item() == pytest.approx(expected, rel=1e-6)


def test_even_load_scores_one_and_a_single_expert_scores_their_number():
    even = torch.eye(4).unsqueeze(0)
    one = torch.zeros(1, 4, 4)
    one[..., 2] = 1.0
    assert load_balancing(even, even).item() == pytest.approx(1.0)
    assert load_balancing(one, one).item() == pytest.approx(4.0)


def test_rows_weigh_the_same_and_padding_does_not_count():
    one = torch.zeros(1, 4, 4)
    one[..., 0] = 1.0
    rows = torch.cat([torch.eye(4).unsqueeze(0), one, torch.ones(1, 4, 4)])
    documents = torch.tensor([[0] * 4, [0, 1, -1, -1], [-1] * 4])
    rows[1, 2:] = 7.0
    assert load_balancing(rows, rows, document_ids=documents).item() == pytest.approx((1 + 4) / 2)


def test_negative_weights_are_active():
    shares = torch.tensor([[[0.5, 0.5]]])
    assert load_balancing(shares, torch.tensor([[[-1.0, 2.0]]])).item() == pytest.approx(2 * (0.25 + 0.25))


def test_load_balancing_gradient_equals_finite_differences():
    shares = torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = (shares.detach() > 0.4).double()
    documents = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda s: load_balancing(s, weights, document_ids=documents), shares)


def test_without_active_experts_or_tokens_the_loss_is_zero():
    assert load_balancing(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)).item() == 0.0
    assert load_balancing(torch.ones(2, 0, 2), torch.ones(2, 0, 2)).item() == 0.0


def test_shares_and_weights_of_two_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"one shape, got \[1, 3, 4\] and \[1, 3, 2\]"):
        load_balancing(torch.zeros(1, 3, 2), torch.zeros(1, 3, 4))


def test_balanced_l1_equals_the_formula_on_one_row():
    """Sum over experts of (summed weight) · (tokens that use it) · E / (T² · k), as published."""
    weights = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 4.0]]])
    expected = (2 * 1 + 0 * 0 + 5 * 2) * 3 / (2**2 * 2)
    assert balanced_l1(weights, num_experts_per_tok=2).item() == pytest.approx(expected)


def test_balanced_l1_of_an_even_load_of_k_experts_is_the_plain_l1():
    weights = torch.tensor([[[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 5.0]]])
    assert balanced_l1(weights, num_experts_per_tok=2).item() == pytest.approx(l1(weights).item())


def test_balanced_l1_pushes_a_busy_expert_harder():
    weights = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]]).requires_grad_()
    balanced_l1(weights, num_experts_per_tok=1).backward()
    assert weights.grad[0, 0].tolist() == pytest.approx([2 * 1 / 3, 2 * (1 / 3) / 3])


def test_balanced_l1_weighs_rows_the_same_and_does_not_count_padding():
    weights = torch.tensor([[[1.0], [1.0]], [[3.0], [9.0]], [[5.0], [5.0]]])
    documents = torch.tensor([[0, 0], [0, -1], [-1, -1]])
    assert balanced_l1(weights, num_experts_per_tok=1, document_ids=documents).item() == pytest.approx((1 + 3) / 2)


def test_balanced_l1_gradient_equals_finite_differences():
    weights = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: balanced_l1(w, num_experts_per_tok=2), weights)


def test_balanced_l1_wants_an_expert_per_token():
    with pytest.raises(ValueError, match="num_experts_per_tok must be at least 1, got 0"):
        balanced_l1(torch.ones(1, 2, 2), num_experts_per_tok=0)


def test_token_balance_equals_the_formula_within_documents():
    rows = [[0.01, -0.03], [0.02, 0.0], [-0.01, 0.01], [0.5, 0.5]]
    activity = [sum(1 / (1 + math.exp(-100 * x)) for x in row) / 2 for row in rows]
    pairs = [(activity[t + 1] - activity[t]) ** 2 for t in range(3)]
    logits = torch.tensor([rows])
    assert token_balance(logits).item() == pytest.approx(sum(pairs) / 3, rel=1e-5)
    documents = torch.tensor([[0, 0, 1, -1]])
    assert token_balance(logits, document_ids=documents).item() == pytest.approx(pairs[0], rel=1e-5)


def test_token_balance_gradient_equals_finite_differences():
    logits = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: token_balance(x, document_ids=documents, sharpness=2.0), logits)


def test_token_balance_without_pairs_is_zero():
    assert token_balance(torch.ones(3, 1, 4)).item() == 0.0


def test_bfloat16_is_computed_in_float32():
    x = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    for value, exact in ((load_balancing(x, x), load_balancing(x.float(), x.float())),
                         (token_balance(x), token_balance(x.float()))):  # fmt: skip
        assert value.dtype == torch.float32
        assert value.item() == exact.item()
