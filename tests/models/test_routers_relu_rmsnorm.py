"""The router's formula, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.moe import BlockFFN
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.presets import preset_config


def router_with(logits: list[float], scale: list[float]) -> tuple[ReLURMSNormRouter, torch.Tensor]:
    """A router whose logits for the token `[1]` are as given."""
    router = ReLURMSNormRouter(1, len(logits))
    with torch.no_grad():
        router.proj.weight.copy_(torch.tensor(logits)[:, None])
        router.norm.weight.copy_(torch.tensor(scale))
    return router, torch.ones(1, 1)


def test_weights_are_the_rms_norm_of_the_relu_over_all_experts() -> None:
    router, x = router_with([3.0, -2.0, 4.0, 0.0], [1.0, 1.0, 0.5, 1.0])
    routing = router(x)
    rms = math.sqrt((9 + 16) / 4 + 1e-5)
    assert routing.weights[0].tolist() == pytest.approx([3 / rms, 0, 0.5 * 4 / rms, 0])
    assert routing.shares[0].tolist() == pytest.approx([3 / 7, 0, 4 / 7, 0])
    assert routing.logits[0].tolist() == [3.0, -2.0, 4.0, 0.0]


def test_a_large_epsilon_lets_a_token_that_excites_little_take_little() -> None:
    config = preset_config("nano", router_norm_eps=1.0)
    model = BlockFFNForCausalLM(config)
    router = model.model.layers[0].mlp.router
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    activated = torch.relu(x @ router.proj.weight.T)
    expected = activated / torch.sqrt(activated.square().mean(-1, keepdim=True) + 1.0) * router.norm.weight
    torch.testing.assert_close(router(x).weights, expected)
    small, large = router(x * 0.01).weights, router(x).weights
    assert small.norm() < 0.05 * large.norm()


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_an_epsilon_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="router_norm_eps must be finite and positive"):
        preset_config("nano", router_norm_eps=value)


def test_a_token_without_active_experts_has_zero_weights_shares_and_output() -> None:
    router, x = router_with([-3.0, -2.0, -0.5], [1.0, 1.0, 1.0])
    ffn = BlockFFN(1, 3, 4, router=router)
    with torch.no_grad():
        router.proj.weight.copy_(torch.tensor([[-3.0], [-2.0], [-0.5]]))
    y, routing = ffn(x)
    assert not routing.weights.any()
    assert not routing.shares.any()
    assert not y.any()


def test_a_negative_learned_scale_keeps_its_expert_active() -> None:
    router, x = router_with([1.0, 1.0], [-1.0, 1.0])
    weights = router(x).weights[0]
    assert weights[0] == -weights[1]
    assert (weights != 0).all()


def test_routing_is_float32_for_bfloat16_tokens() -> None:
    routing = ReLURMSNormRouter(8, 4).bfloat16()(torch.randn(5, 8, dtype=torch.bfloat16))
    assert {routing.logits.dtype, routing.shares.dtype, routing.weights.dtype} == {torch.float32}


def test_inactive_experts_get_no_gradient_and_active_ones_do() -> None:
    ffn = BlockFFN(6, 3, 4)
    with torch.no_grad():
        ffn.router.proj.weight.copy_(torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, 6))
    y, _ = ffn(torch.rand(2, 5, 6) + 0.1)
    y.square().sum().backward()
    gradient = ffn.routed_experts.up_proj.grad
    assert gradient is not None
    assert not gradient[1].any()
    assert gradient[0].any()
    assert gradient[2].any()


@pytest.mark.parametrize("field", ["hidden_size", "num_experts", "moe_intermediate_size"])
def test_a_size_below_one_is_refused_by_name(field: str) -> None:
    sizes = {"hidden_size": 4, "num_experts": 2, "moe_intermediate_size": 3, field: 0}
    with pytest.raises(ValueError, match=field):
        BlockFFN(**sizes)


def test_the_scale_starts_where_the_configuration_says() -> None:
    config = preset_config("nano", vocab_size=32, num_hidden_layers=1, router_scale_initializer=0.25)
    router = BlockFFNForCausalLM(config).model.layers[0].mlp.router
    assert (router.norm.weight == 0.25).all()
