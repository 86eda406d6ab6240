"""Which parameter learns at which rate, and how gradients are clipped."""

from __future__ import annotations

import pytest
import torch

from blockffn.training.config import OptimizerSettings
from blockffn.training.optimizer import clip_gradients, make_optimizer, parameter_group, set_learning_rate
from tests.models.conftest import tiny_model


@pytest.mark.parametrize(("name", "group"), [
    ("model.embed_tokens.weight", "unscaled"), ("lm_head.weight", "unscaled"), ("model.norm.weight", "unscaled"),
    ("model.layers.0.input_layernorm.weight", "unscaled"),
    ("model.layers.0.self_attn.kv_a_layernorm.weight", "unscaled"),
    ("model.layers.0.mlp.router.proj.weight", "router"), ("model.layers.0.mlp.router.norm.weight", "matrices"),
    ("model.layers.0.mlp.routed_experts.up_proj", "matrices"), ("model.layers.0.self_attn.q_b_proj.weight", "matrices"),
])  # fmt: skip
def test_parameter_groups_follow_the_published_recipe(name: str, group: str) -> None:
    assert parameter_group(name) == group


def test_matrices_learn_at_the_rate_over_the_width_multiplier() -> None:
    model = tiny_model(hidden_size=512, num_hidden_layers=1)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=0.01, router_learning_rate=0.003))
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates == {"router": 0.003, "matrices": 0.005, "unscaled": 0.01}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    set_learning_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "router": 0.0015,
        "matrices": 0.0025,
        "unscaled": 0.005,
    }


def test_router_and_the_rest_are_clipped_apart() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, OptimizerSettings())
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1e-6 if parameter_group(name) == "router" else 1.0)
    norm = clip_gradients(optimizer, 1.0)
    assert norm == pytest.approx(
        sum(p.numel() for n, p in model.named_parameters() if parameter_group(n) != "router") ** 0.5
    )
    router = model.model.layers[0].mlp.router.proj.weight.grad
    assert router is not None
    assert torch.equal(router, torch.full_like(router, 1e-6))
    others = [p.grad for n, p in model.named_parameters() if parameter_group(n) != "router"]
    assert torch.stack([g.square().sum() for g in others if g is not None]).sum().sqrt() == pytest.approx(1.0, rel=1e-4)
