"""What all routers share: the projection's precision, shared experts, and a decoder layer that compiles."""

from __future__ import annotations

import pytest
import torch

from blockffn.metrics.sparsity import SparsityMeter
from blockffn.models.moe import BlockFFN
from blockffn.models.routers.projection import RouterProjection
from blockffn.models.routers.topk import TopKRouter
from blockffn.objectives import objective_terms
from blockffn.presets import METHODS
from tests.models.conftest import tiny_model

MOE = sorted(method for method, row in METHODS.items() if row["ffn_type"] == "moe")


@pytest.mark.parametrize("dtype", ["model", "float32"])
def test_a_float32_projection_is_exact_under_autocast_and_for_bfloat16_weights(dtype: str) -> None:
    torch.manual_seed(0)
    projection, x = RouterProjection(64, 8, dtype=dtype), torch.randn(5, 64)
    exact = x @ projection.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = projection(x)
    assert under_autocast.dtype == torch.float32
    assert torch.allclose(under_autocast, exact, atol=1e-6) == (dtype == "float32")
    projection.bfloat16()
    rounded = projection(x.bfloat16())
    assert rounded.dtype == torch.float32
    reference = x.bfloat16().float() @ projection.weight.float().T
    assert torch.allclose(rounded, reference, atol=1e-6) == (dtype == "float32")


def test_an_unknown_projection_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="model or float32, got 'fp8'"):
        RouterProjection(2, 2, dtype="fp8")


def shared_ffn() -> BlockFFN:
    torch.manual_seed(0)
    return BlockFFN(8, 6, 4, router=TopKRouter(8, 4, 1), num_shared_experts=2)


def test_a_shared_expert_adds_its_own_network_to_every_token() -> None:
    ffn, x = shared_ffn(), torch.randn(3, 8)
    y, routing = ffn(x)
    assert (routing.weights[:, :2] == 1).all()
    experts = ffn.routed_experts

    def expert(e: int) -> torch.Tensor:
        return torch.nn.functional.silu(x @ experts.up_proj[e].T) @ experts.down_proj[e]

    routed = sum(routing.weights[:, e, None] * expert(e) for e in range(2, 6))
    torch.testing.assert_close(y, expert(0) + expert(1) + routed)


def test_metrics_count_shared_experts_as_active() -> None:
    _, routing = shared_ffn()(torch.randn(1, 16, 8))
    meter = SparsityMeter(1, 6, windows=(8,))
    meter.update([routing])
    assert meter.compute().tls == pytest.approx(50.0)  # 2 shared and 1 chosen of 6


@pytest.mark.parametrize("name", ["activation_locality", "chunk_sparsification", "load_balancing", "router_entropy"])
def test_objectives_see_only_what_the_router_chooses_among(name: str) -> None:
    ffn, x = shared_ffn(), torch.randn(1, 16, 8)
    (alone,) = objective_terms([ffn.router(x)], [name], chunk_length=8).values()
    (shared,) = objective_terms([ffn(x)[1]], [name], chunk_length=8, num_shared_experts=2).values()
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("num_shared", [-1, 6])
def test_shared_experts_must_leave_some_to_route_to(num_shared: int) -> None:
    with pytest.raises(ValueError, match=f"num_shared_experts must lie in 0…5, got {num_shared}"):
        BlockFFN(8, 6, 4, num_shared_experts=num_shared)


@pytest.mark.parametrize("method", MOE)
@pytest.mark.parametrize("router_dtype", ["model", "float32"])
def test_a_layer_of_any_method_compiles_into_one_graph_under_autocast(method: str, router_dtype: str) -> None:
    torch.compiler.reset()  # one process allows a function only a few variants
    torch.manual_seed(0)
    model = tiny_model("gqa", method, router_dtype=router_dtype).train()
    layer, x = model.model.layers[-1], torch.randn(2, 8, 32)
    cos_sin = model.model.rotary_emb(x, torch.arange(8)[None])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (layer, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _, routing = forward(x, position_embeddings=cos_sin)
        (y.float().square().mean() + routing.shares.square().mean()).backward()
        results.append((y, routing.weights, layer.mlp.router.proj.weight.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    assert layer.mlp.router.proj.weight.grad.any()


@pytest.mark.parametrize("method", MOE)
def test_the_router_and_every_expert_in_use_receive_gradient_from_the_loss(method: str) -> None:
    torch.manual_seed(0)
    model = tiny_model("gqa", method).train()
    ids = torch.randint(0, 61, (2, 16))
    out = model(ids, labels=ids, output_routing=True)
    out.loss.backward()
    layer = model.model.layers[-1].mlp
    assert layer.router.proj.weight.grad.any(dim=1).sum() > 1
    used = (out.routings[-1].weights != 0).any(dim=0).any(dim=0)
    assert torch.equal(layer.routed_experts.up_proj.grad.flatten(1).any(dim=1), used)
