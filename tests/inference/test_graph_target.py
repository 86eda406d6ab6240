"""Steps of a plan against the model's own modules: token for token, as definitions, kernels and CUDA graphs."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import pack_model
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.graph_target import GraphTarget, graph_target
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.target import Step, prefill
from blockffn.presets import METHODS
from tests.models.conftest import ATTENTION, tiny_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

PARENTS = torch.tensor([-1, -1, 0, 1, 2, 2])
GREEDY = GenerationSettings(temperature=0.0, max_new_tokens=12)


def assert_steps_equal(actual: Step, expected: Step, tolerance: float = 1e-5) -> None:
    for name in ("logits", "hidden"):
        a, e = getattr(actual, name), getattr(expected, name)
        limit = tolerance * max(1.0, e.abs().max().item())
        torch.testing.assert_close(a, e, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("union", "active"):
        a, e = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (e is None), name
        assert a is None or torch.equal(a, e), name


def run_both(targets: list[Any], tolerance: float = 1e-5, num_steps: int = 7) -> None:
    """Prompt, chains and trees of sizes that are padded and that are not, paths committed out of order."""
    prompt, tokens = torch.randint(0, 61, (7,)), torch.randint(0, 61, (20,))
    for target in targets:
        prefill(target, prompt)
    steps: list[tuple[Tensor, Tensor | None, list[int]]] = [
        (tokens[:1], None, [0]), (tokens[:6], PARENTS, [1, 3]), (tokens[:3], None, [0, 1]), (tokens[:2], None, []),
        (tokens[:8], torch.arange(8) // 2 - 1, [1]), (tokens[:1], None, [0]), (tokens, None, list(range(20))),
    ]  # fmt: skip
    for chunk, parents, kept in steps[:num_steps]:
        expected, actual = (target.extend(chunk, parents) for target in targets)
        assert_steps_equal(actual, expected, tolerance)
        for target in targets:
            target.commit(torch.tensor(kept, dtype=torch.long))
        assert targets[0].length == targets[1].length


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_steps_equal_the_modules(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    run_both([ModelTarget(model), GraphTarget(model)])


def test_steps_with_gated_experts_equal_the_modules() -> None:
    model = tiny_model("gqa", expert_gated=True, router_norm_eps=0.01)
    run_both([ModelTarget(model), GraphTarget(model)])


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("method", ["blockffn", "dense"])
def test_steps_of_kernels_equal_the_modules(attention: str, method: str) -> None:
    pytest.importorskip("triton")
    model = tiny_model(attention, method, num_hidden_layers=1)
    run_both([ModelTarget(model), GraphTarget(model, backend="triton")], num_steps=3)


@pytest.mark.parametrize(
    "changes", [{}, {"expert_gated": True}, {"num_shared_experts": 1}, {"router_dtype": "float32"}]
)
def test_steps_of_kernels_with_their_experts_equal_the_modules(changes: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    model = tiny_model(num_hidden_layers=1, moe_intermediate_size=16, router_norm_eps=0.01, **changes)
    targets = [ModelTarget(model), GraphTarget(model, backend="triton")]
    if not changes.get("expert_gated"):
        model.model.layers[0].mlp.routed_experts.backend = "triton"
    run_both(targets, num_steps=3)


@pytest.mark.parametrize(
    ("changes", "unused"), [({}, "norm_route"), ({"expert_gated": True}, "norm_route_experts"),
                            ({"expert_activation": "norm_silu"}, "norm_route_experts")],
)  # fmt: skip
def test_router_and_experts_are_one_operation_where_experts_are_plain(changes: dict[str, Any], unused: str) -> None:
    target = GraphTarget(tiny_model(**changes))
    target.plan.ops = SimpleNamespace(**{name: op for name, op in vars(target.plan.ops).items() if name != unused})
    target.extend(torch.tensor([3]))


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_greedy_text_is_that_of_the_modules(attention: str) -> None:
    model = tiny_model(attention)
    expected, actual = (generate(target, [1, 2, 3], GREEDY) for target in (ModelTarget(model), GraphTarget(model)))
    assert actual.token_ids == expected.token_ids
    assert actual.statistics.active_experts == expected.statistics.active_experts


def test_parents_may_be_on_the_device_and_a_tree_may_exceed_the_graphs() -> None:
    model = tiny_model(max_position_embeddings=256)
    targets = [ModelTarget(model), GraphTarget(model)]
    tokens, parents = torch.randint(0, 61, (70,)), torch.arange(70) // 2 - 1
    assert_steps_equal(*(target.extend(tokens, parents) for target in reversed(targets)))
    for target in targets:
        target.commit(torch.tensor([1, 4]))
    assert_steps_equal(*(target.extend(tokens[:64], parents[:64]) for target in reversed(targets)))


def test_results_may_be_kept() -> None:
    target = GraphTarget(tiny_model())
    first = target.extend(torch.tensor([3]))
    logits, active = first.logits.clone(), first.active.clone()
    target.commit(torch.arange(1))
    target.extend(torch.tensor([5]))
    assert torch.equal(first.logits, logits)
    assert torch.equal(first.active, active)


def test_a_threshold_set_later_is_obeyed() -> None:
    model = tiny_model()
    target = GraphTarget(model)
    before = target.extend(torch.tensor([3])).active
    target.commit(torch.arange(0))
    model.set_threshold(1.0)
    step = target.extend(torch.tensor([3]))
    assert step.active.sum() < before.sum()
    assert_steps_equal(step, ModelTarget(model).extend(torch.tensor([3])))


def test_misuse_is_refused() -> None:
    target = GraphTarget(tiny_model(), capacity=8)
    with pytest.raises(ValueError, match="T of at least 1"):
        target.extend(torch.arange(0))
    with pytest.raises(ValueError, match="precede its token"):
        target.extend(torch.arange(3), torch.tensor([-1, 1, 0]))
    with pytest.raises(ValueError, match="exceed the cache's capacity of 8"):
        target.extend(torch.arange(9))
    target.extend(torch.arange(6), PARENTS)
    with pytest.raises(ValueError, match="tokens are pending"):
        target.extend(torch.arange(1))
    with pytest.raises(ValueError, match="path from a root"):
        target.commit(torch.tensor([0, 3]))


def test_packed_weights_are_refused_with_the_remedy() -> None:
    model = tiny_model("gqa", hidden_size=64, head_dim=16, moe_intermediate_size=32)
    pack_model(model, BlockFFNQuantizationConfig.preset("int8", group_size=32, attention="int8"))
    with pytest.raises(ValueError, match="dequantize or merge it first; use backend='model'"):
        GraphTarget(model)


def test_a_model_on_the_cpu_is_refused_as_a_backend() -> None:
    with pytest.raises(ValueError, match="on a CUDA device, got cpu; use backend='model'"):
        graph_target(tiny_model())


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_taken_as_a_backend() -> None:
    assert graph_target(tiny_model().cuda(), capacity=20).capacity == 20


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 6, 40])
def test_tokens_and_parents_may_lie_on_the_device(count: int) -> None:
    model = tiny_model(moe_intermediate_size=16).cuda()
    targets = [GraphTarget(model), GraphTarget(model)]
    tokens, parents = torch.randint(0, 61, (count,)), torch.arange(count) // 2 - 1
    for tree in (None, parents):
        expected = targets[0].extend(tokens, tree)
        assert_steps_equal(targets[1].extend(tokens.cuda(), None if tree is None else tree.cuda()), expected)
        for target in targets:
            target.commit(torch.arange(1, device="cuda"))


def gpu_models() -> list[tuple[str, str]]:
    return [(attention, method) for attention in sorted(ATTENTION) for method in ("blockffn", "dense", "topk")]


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "method"), gpu_models())
def test_graphs_equal_the_modules(attention: str, method: str) -> None:
    model = tiny_model(attention, method, moe_intermediate_size=16).cuda()
    targets = [ModelTarget(model), GraphTarget(model)]
    for _ in range(2):  # captured, then replayed over another text
        for target in targets:
            target.reset()
        run_both(targets, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "method"), gpu_models())
def test_greedy_text_of_graphs_is_that_of_the_modules(attention: str, method: str) -> None:
    model = tiny_model(attention, method, moe_intermediate_size=16, max_position_embeddings=512).cuda()
    settings = GenerationSettings(temperature=0.0, max_new_tokens=200)
    expected, actual = (generate(target, [1, 2, 3], settings) for target in (ModelTarget(model), GraphTarget(model)))
    assert actual.token_ids == expected.token_ids


@pytest.mark.gpu
def test_a_graph_step_does_not_wait_for_the_device() -> None:
    target = GraphTarget(tiny_model(moe_intermediate_size=16).cuda())
    for _ in range(2):
        target.extend(torch.tensor([1]))
        target.commit(torch.arange(1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = target.extend(torch.tensor([1]))
        target.commit(torch.arange(1))
        step.union.sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_bfloat16_graphs_decode_close_to_the_modules() -> None:
    for attention in ATTENTION:
        model = tiny_model(attention, moe_intermediate_size=16).cuda().to(torch.bfloat16)
        targets = [ModelTarget(model), GraphTarget(model)]
        expected, actual = (target.extend(torch.arange(9)).logits for target in targets)
        assert (actual - expected).norm() / expected.norm() < 0.05
