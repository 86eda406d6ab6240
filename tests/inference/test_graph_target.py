"""Steps of a plan against the model's own modules: token for token, as definitions, kernels and CUDA graphs."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import pack_model
from blockffn.inference import graph_target as graph_target_module
from blockffn.inference.decode import GenerationSettings, Request, decode, generate
from blockffn.inference.decode_plan import StepOutputs
from blockffn.inference.graph_target import GraphTarget, _EagerStep, graph_target
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.target import Step, expect_choices, prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.decode.inputs import StepInputs
from blockffn.presets import METHODS
from tests.models.conftest import ATTENTION, tiny_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests marked so run the kernels")
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


@in_interpreter
@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("method", ["blockffn", "dense"])
def test_steps_of_kernels_equal_the_modules(attention: str, method: str) -> None:
    pytest.importorskip("triton")
    model = tiny_model(attention, method, num_hidden_layers=1)
    run_both([ModelTarget(model), GraphTarget(model, backend="triton")], num_steps=3)


@in_interpreter
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


class Ahead:
    """A target that expects choices beside one that runs a step when it is asked to; both get the same calls.

    Attributes:
        launched: steps that the first one's plan has run or captured.
    """

    def __init__(self, model: BlockFFNForCausalLM, **settings: Any) -> None:
        self.targets = GraphTarget(model, run_ahead=True, **settings), GraphTarget(model, run_ahead=False, **settings)
        self.launched = 0
        plan = self.targets[0].plan
        step = plan.step

        def counted(inputs: StepInputs) -> StepOutputs:
            self.launched += 1
            return step(inputs)

        plan.step = counted
        self.begin([1, 2, 3])

    def begin(self, prompt: list[int]) -> None:
        for target in self.targets:
            target.reset()
            prefill(target, torch.tensor(prompt))
            expect_choices(target)

    def step(self, tokens: list[int], parents: Tensor | None = None, kept: tuple[int, ...] = (0,)) -> int:
        """Extend and commit; the best token behind the last. The steps must be equal in all but `choices`."""
        actual, expected = (target.extend(torch.tensor(tokens), parents) for target in self.targets)
        assert_steps_equal(actual, expected)
        best = int(expected.logits[-1].argmax())
        assert actual.choices is None or actual.choices == [best]
        assert (actual.choices is not None) == (len(tokens) == 1)
        for target in self.targets:
            target.commit(torch.tensor(kept, dtype=torch.long))
        return best

    def follow(self, token: int, count: int) -> int:
        """Steps of the tokens that are chosen; the last choice."""
        for _ in range(count):
            token = self.step([token])
        return token


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("method", ["blockffn", "dense", "topk"])
def test_a_step_has_run_when_its_token_was_expected(attention: str, method: str) -> None:
    ahead = Ahead(tiny_model(attention, method))
    token = 3
    for count in range(1, 9):
        token = ahead.follow(token, 1)
        assert ahead.launched == count + 1


def test_a_token_that_was_not_expected_gets_its_own_step() -> None:
    ahead = Ahead(tiny_model())
    token = ahead.follow(3, 4)
    ahead.follow((token + 1) % 61, 3)
    assert ahead.launched == 9  # seven, the one in vain, and the next one


def test_a_token_may_be_left_out_and_said_again() -> None:
    ahead = Ahead(tiny_model())
    token = ahead.follow(3, 2)
    again = ahead.step([token], kept=())
    ahead.follow(again, 2)
    ahead.follow(token, 2)


@pytest.mark.parametrize("size", [2, 6, 70])
def test_a_tree_may_follow_steps_ahead(size: int) -> None:
    ahead = Ahead(tiny_model(max_position_embeddings=256))
    for tree in (torch.arange(size) // 2 - 1, torch.arange(size) - 1):
        token = ahead.follow(3, 3)
        ahead.step([token, *[5] * (size - 1)], tree, kept=(0, 1) if tree[1] == 0 else (1,))
        token = ahead.follow(token, 2)
        ahead.step([(token + 1) % 61] * size, tree, kept=())
        ahead.follow(token, 2)  # its first row of the cache was the tree's meanwhile


def test_nothing_of_a_text_reaches_the_next() -> None:
    ahead = Ahead(tiny_model())
    token = ahead.follow(3, 2)
    ahead.begin([9, 8, 7, 6, 5])  # as long as the first text, whose next token comes now
    token = ahead.follow(token, 2)
    expected = ahead.step([token], kept=())
    for target in ahead.targets:
        prefill(target, torch.tensor([(token + 1) % 61]))
    ahead.follow(expected, 2)


def test_choices_are_expected_until_the_next_reset() -> None:
    target = GraphTarget(tiny_model(), run_ahead=True)
    for expected in (True, False):
        if expected:
            expect_choices(target)
        assert (target.extend(torch.tensor([3])).choices is not None) == expected
        target.reset()


def test_the_last_row_of_the_cache_is_used_and_none_behind_it() -> None:
    ahead = Ahead(tiny_model(), capacity=8)
    token = ahead.follow(3, 5)
    assert ahead.launched == 5
    with pytest.raises(ValueError, match="exceed the cache's capacity of 8"):
        ahead.targets[0].extend(torch.tensor([token]))
    ahead.begin([1, 2, 3])
    ahead.follow(3, 5)


def test_a_threshold_set_after_a_step_was_launched_is_obeyed() -> None:
    model = tiny_model()
    ahead = Ahead(model)
    token = ahead.follow(3, 2)
    model.set_threshold(1.0)
    ahead.follow(token, 2)


def test_a_target_that_ran_ahead_is_freed_when_it_is_dropped() -> None:
    target = GraphTarget(tiny_model(), run_ahead=True)
    expect_choices(target)
    target.extend(torch.tensor([3]))
    cache = weakref.ref(target.cache)
    del target
    assert cache() is None


class ReusingStep(_EagerStep):
    """A step that leaves its outputs where those of the run before were, as a graph does."""

    outputs: StepOutputs | None = None

    def run(self) -> StepOutputs:
        outputs = super().run()
        if self.outputs is None:
            self.outputs = outputs
        for name, value in vars(outputs).items():
            getattr(self.outputs, name).copy_(value)
        return self.outputs


def test_steps_ahead_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_target_module, "_EagerStep", ReusingStep)
    target = GraphTarget(tiny_model(), run_ahead=True)
    expect_choices(target)
    check_kept(target)


def check_kept(target: GraphTarget) -> None:
    token, kept = 3, []
    plain = GraphTarget(target.forward.model, run_ahead=False)
    for _ in range(4):
        step = target.extend(torch.tensor([token]))
        assert_steps_equal(step, plain.extend(torch.tensor([token])))
        plain.commit(torch.arange(1))
        kept.append((step, [t.clone() for t in (step.logits, step.hidden, step.active)]))
        target.commit(torch.arange(1))
        [token] = step.choices
    for step, copies in kept:
        for now, before in zip((step.logits, step.hidden, step.active), copies, strict=True):
            assert torch.equal(now, before)


@pytest.mark.parametrize("method", ["blockffn", "dense"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_greedy_text_ahead_is_that_of_the_modules(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    targets = [ModelTarget(model), GraphTarget(model, run_ahead=True, capacity=14)]
    for prompt in ([1, 2, 3], [7]):
        expected, actual = (generate(target, prompt, GREEDY) for target in targets)
        assert actual.token_ids == expected.token_ids
        assert actual.statistics.active_experts == expected.statistics.active_experts
    end = expected.token_ids[5]
    settings = GenerationSettings(temperature=0.0, max_new_tokens=12, eos_token_ids=(end,))
    expected, actual = (generate(target, [7], settings) for target in targets)
    assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, "eos")


@in_interpreter
def test_greedy_text_of_kernels_ahead_is_that_of_the_modules() -> None:
    pytest.importorskip("triton")
    model = tiny_model(num_hidden_layers=1)
    settings = GenerationSettings(temperature=0.0, max_new_tokens=5)
    targets = ModelTarget(model), GraphTarget(model, backend="triton", run_ahead=True)
    expected, actual = (generate(target, [1, 2], settings) for target in targets)
    assert actual.token_ids == expected.token_ids


def test_only_the_plain_greedy_loop_expects_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    target = GraphTarget(tiny_model(), run_ahead=True)
    expects: list[str] = []
    monkeypatch.setattr(target, "expect_choices", lambda: expects.append("expected"))
    for changes in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"repetition_penalty": 1.2}):
        generate(target, [1, 2], replace(GREEDY, **changes))
    for _ in decode(target, Request([1, 2], GREEDY), on_logits=lambda logits: None):
        pass
    speculative_generate(target, Speculation(NgramDrafter()), [1, 2], GREEDY)
    assert not expects
    generate(target, [1, 2], GREEDY)
    assert expects == ["expected"]


def test_misuse_is_refused() -> None:
    target = GraphTarget(tiny_model(), capacity=8)
    with pytest.raises(ValueError, match="at least one token"):
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
@pytest.mark.parametrize(("attention", "method"), gpu_models())
def test_graphs_ahead_take_any_calls(attention: str, method: str) -> None:
    ahead = Ahead(tiny_model(attention, method, moe_intermediate_size=16).cuda(), capacity=24)
    for prompt in ([1, 2, 3], [9, 8, 7]):
        ahead.begin(prompt)
        token = ahead.follow(3, 4)
        token = ahead.follow((token + 1) % 61, 3)
        ahead.step([token, 1, 2, 3, 4, 5], PARENTS, kept=(0, 2))
        ahead.step([token], kept=())
        token = ahead.follow(token, 12)
        assert ahead.targets[0].length == 24


@pytest.mark.gpu
def test_steps_ahead_of_graphs_may_be_kept() -> None:
    target = GraphTarget(tiny_model(moe_intermediate_size=16).cuda())
    expect_choices(target)
    check_kept(target)


@pytest.mark.gpu
def test_a_step_is_read_while_the_next_one_runs() -> None:
    target = GraphTarget(tiny_model(moe_intermediate_size=16).cuda())
    expect_choices(target)
    for token in (1, 2):
        target.extend(torch.tensor([token]))
        target.commit(torch.arange(1))
    torch.cuda.synchronize()
    launch = target._ahead._launch

    def launch_slow() -> None:
        torch.cuda._sleep(1 << 29)  # some tenths of a second
        launch()

    [token] = target.extend([3]).choices
    target.commit(torch.arange(1))
    target._ahead._launch = launch_slow
    target.extend(torch.tensor([token]))
    assert not torch.cuda.current_stream().query()


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
