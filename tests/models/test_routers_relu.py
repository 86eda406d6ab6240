"""ReLU routers without a norm: ReMoE's, and DECO's with a learned factor per expert."""

from __future__ import annotations

import pytest
import torch

from blockffn.models.routers.relu import ReLURouter


def router_with(logits: list[float], initial_scale: float | None) -> ReLURouter:
    router = ReLURouter(1, len(logits), initial_scale=initial_scale)
    with torch.no_grad():
        router.proj.weight.copy_(torch.tensor(logits)[:, None])
    return router


def test_weights_are_the_bare_relu_and_shares_sum_to_one() -> None:
    routing = router_with([3.0, -2.0, 1.0], None)(torch.ones(1, 1))
    assert routing.weights[0].tolist() == [3.0, 0.0, 1.0]
    assert routing.shares[0].tolist() == [0.75, 0.0, 0.25]


def test_a_scale_multiplies_the_weights_and_not_the_shares() -> None:
    router = router_with([3.0, -2.0, 1.0], 0.1)
    routing = router(torch.ones(1, 1))
    assert routing.weights[0].tolist() == pytest.approx([0.3, 0.0, 0.1])
    assert routing.shares[0].tolist() == [0.75, 0.0, 0.25]
    routing.weights.sum().backward()
    assert router.scale is not None
    assert router.scale.weight.grad is not None
    assert router.scale.weight.grad.tolist() == [3.0, 0.0, 1.0]


def test_a_token_without_active_experts_has_no_shares() -> None:
    routing = router_with([-1.0, -2.0], None)(torch.ones(1, 1))
    assert not routing.shares.any()
    assert not routing.weights.any()
