"""The top-k router against its formula, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.models.routers.topk import TopKRouter
from blockffn.objectives import load_balancing


def router_with(logits: list[float], k: int) -> TopKRouter:
    """A router whose logits for the token `[1]` are as given."""
    router = TopKRouter(1, len(logits), k)
    with torch.no_grad():
        router.proj.weight.copy_(torch.tensor(logits)[:, None])
    return router


def test_the_k_largest_probabilities_are_renormalised_once() -> None:
    """A second softmax over the chosen probabilities would give 0.57 and 0.43 here."""
    routing = router_with([math.log(6), math.log(1), math.log(3)], 2)(torch.ones(1, 1))
    assert routing.shares[0].tolist() == pytest.approx([0.6, 0.1, 0.3])
    assert routing.weights[0].tolist() == pytest.approx([6 / 9, 0, 3 / 9])
    assert routing.logits[0].tolist() == pytest.approx([math.log(6), 0, math.log(3)])


def test_every_token_has_k_active_experts_that_sum_to_one() -> None:
    torch.manual_seed(0)
    weights = TopKRouter(8, 12, 5)(3 * torch.randn(4, 7, 8)).weights
    assert ((weights != 0).sum(dim=-1) == 5).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 7))


def test_the_gradient_of_the_weights_is_that_of_a_softmax_over_the_chosen_logits() -> None:
    """Renormalised probabilities are a softmax over the chosen alone; experts not chosen get nothing."""
    torch.manual_seed(0)
    logits, g = [2.0, -1.0, 0.5, 1.0], torch.randn(4)
    router = router_with(logits, 2)
    (router(torch.ones(1, 1)).weights[0] * g).sum().backward()
    p = torch.tensor([2.0, 1.0]).softmax(dim=0)
    chosen = p * (g[[0, 3]] - (p * g[[0, 3]]).sum())
    assert router.proj.weight.grad is not None
    torch.testing.assert_close(router.proj.weight.grad[:, 0], torch.tensor([chosen[0], 0, 0, chosen[1]]))


def test_load_balancing_of_an_even_router_is_one_and_pushes_the_busy_expert_down() -> None:
    even = router_with([0.0] * 4, 4)(torch.ones(1, 6, 1))
    assert load_balancing(even.shares, even.weights).item() == pytest.approx(1.0)
    router = router_with([2.0, 0.0, 0.0, 0.0], 1)
    routing = router(torch.ones(1, 6, 1))
    loss = load_balancing(routing.shares, routing.weights)
    p = math.exp(2) / (math.exp(2) + 3)
    assert loss.item() == pytest.approx(4 * p)  # the whole load on an expert of probability p
    loss.backward()
    assert router.proj.weight.grad is not None
    assert router.proj.weight.grad[0] > 0


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_experts_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok must lie in 1…4, got {k}"):
        TopKRouter(2, 4, k)
