"""L1 and router entropy against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.objectives import l1, router_entropy

DOCUMENTS = torch.tensor([[0, 0, 1, -1]])


def test_l1_is_the_mean_norm_of_the_tokens_without_padding():
    weights = torch.tensor([[[1.0, -2.0], [0.0, 0.5], [0.0, 0.0], [9.0, 9.0]]])
    assert l1(weights).item() == pytest.approx((3 + 0.5 + 0 + 18) / 4)
    assert l1(weights, document_ids=DOCUMENTS).item() == pytest.approx((3 + 0.5 + 0) / 3)


def test_entropy_is_the_mean_over_tokens_without_padding():
    shares = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [0.5, 0.5]]])
    even, one, skewed = (-sum(s * math.log(s + 1e-5) for s in row) for row in ([0.5, 0.5], [1.0], [0.25, 0.75]))
    assert router_entropy(shares).item() == pytest.approx((2 * even + one + skewed) / 4, rel=1e-5)
    assert router_entropy(shares, document_ids=DOCUMENTS).item() == pytest.approx((even + one + skewed) / 3, rel=1e-5)


def test_entropy_of_an_unused_expert_has_a_finite_gradient():
    shares = torch.tensor([[[1.0, 0.0]]]).requires_grad_()
    router_entropy(shares).backward()
    assert shares.grad[0, 0, 1].item() == pytest.approx(-math.log(1e-5), rel=1e-5)


@pytest.mark.parametrize("objective", [l1, router_entropy])
def test_gradients_equal_finite_differences(objective):
    x = torch.rand(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: objective(v, document_ids=DOCUMENTS), x)


@pytest.mark.parametrize("objective", [l1, router_entropy])
def test_no_token_gives_zero(objective):
    assert objective(torch.ones(2, 0, 3)).item() == 0.0
    assert objective(torch.ones(1, 4, 3), document_ids=torch.full((1, 4), -1)).item() == 0.0


@pytest.mark.parametrize("objective", [l1, router_entropy])
def test_bfloat16_is_computed_in_float32(objective):
    x = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert objective(x).dtype == torch.float32
    assert objective(x).item() == objective(x.float()).item()
