"""Activation locality against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.objectives import activation_locality


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(p: float, target: float) -> float:
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def test_equals_the_formula_on_three_tokens_and_two_experts():
    rows = [[0.01, -0.02], [0.03, 0.0], [-0.01, 0.02]]
    expected = [
        cross_entropy(sigmoid(100 * rows[t][e]), sigmoid(100 * rows[t + 1][e])) for t in range(2) for e in range(2)
    ]
    assert activation_locality(torch.tensor([rows])).item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_sharpness_scales_the_logits():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        activation_locality(logits, sharpness=30.0), activation_locality(logits * 0.3, sharpness=100.0)
    )


def test_gradient_reaches_both_neighbours_and_equals_finite_differences():
    logits = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: activation_locality(x, document_ids=documents, sharpness=2.0), logits)
    (grad,) = torch.autograd.grad(activation_locality(logits[1:, :2], sharpness=2.0), logits)
    assert (grad[1, :2] != 0).all()


def test_the_soft_target_puts_the_minimum_at_equality_where_the_value_is_the_entropy():
    target = sigmoid(0.7)
    losses = {}
    for offset in (-0.2, -0.01, 0.0, 0.01, 0.2):
        pair = torch.tensor([[[0.7 + offset], [0.7]]], dtype=torch.float64)
        losses[offset] = activation_locality(pair, sharpness=1.0).item()
    assert min(losses, key=losses.__getitem__) == 0.0
    assert losses[0.0] == pytest.approx(cross_entropy(target, target), rel=1e-12)


def test_equal_neighbours_are_pushed_away_from_zero():
    logits = torch.full((1, 2, 1), 0.005).requires_grad_()
    activation_locality(logits).backward()
    assert logits.grad.sum() < 0  # descent raises both


def test_saturated_logits_give_the_linear_penalty_without_overflow():
    logits = torch.tensor([[[50.0], [-50.0], [-50.0], [50.0]]]).requires_grad_()
    loss = activation_locality(logits)
    assert loss.item() == pytest.approx((5000 + 0 + 5000) / 3, rel=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_pairs_do_not_cross_documents():
    joined = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    first, second = activation_locality(joined[:, :3]), activation_locality(joined[:, 3:])
    torch.testing.assert_close(
        activation_locality(joined, document_ids=documents), (2 * first + 3 * second) / 5, rtol=1e-6, atol=0
    )


def test_padding_neither_counts_nor_receives_gradient():
    tokens = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(3))
    padded = torch.cat([tokens, torch.full((1, 3, 3), 9.0)], dim=1).requires_grad_()
    documents = torch.tensor([[0, 0, 0, 0, -1, -1, -1]])
    loss = activation_locality(padded, document_ids=documents)
    torch.testing.assert_close(loss, activation_locality(tokens))
    loss.backward()
    assert (padded.grad[:, 4:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 0, 4), (0, 5, 4)])
def test_without_pairs_the_loss_is_zero(shape):
    assert activation_locality(torch.ones(shape)).item() == 0.0


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
    loss = activation_locality(logits)
    assert loss.dtype == torch.float32
    assert loss.item() == activation_locality(logits.float()).item()
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
