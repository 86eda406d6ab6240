"""The native step against the model's own modules: one network, two plans of running it.

`BLOCKFFN_CPU_ISA` chooses the kernels; `tests/ops/test_native.py` runs this file once for each instruction set.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import pack_model, unpack_model
from blockffn.inference.backends import make_target
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.target import Step, Target, prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops import native
from tests.models.conftest import ATTENTION
from tests.models.conftest import tiny_model as tiny_model_of

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")

# A tree of two roots: 0 → (2 → 4, 5), 1 → 3.
PARENTS = torch.tensor([-1, -1, 0, 1, 2, 2])
PATHS = [[], [0], [1], [0, 2], [1, 3], [0, 2, 4], [0, 2, 5]]
METHODS = ["blockffn", "dense", "remoe", "gated"]
# Of sums of products of rounded numbers, relative to the size of all logits: int8 and int4 round activations to 8 bits.
TOLERANCE = {"f32": 1e-5, "bf16": 2e-2, "int8": 5e-2, "int4": 5e-2}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "vocab_size": 77}
HEADS = {
    "gqa": {"head_dim": 16},
    "mla": {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
# SmolLM2-135M as `blockffn convert --from-dense` makes it, a third as wide: three queries to a key, tied embeddings.
CONVERTED = {
    "hidden_size": 192, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_experts": 24,
    "moe_intermediate_size": 64, "vocab_size": 1021, "num_hidden_layers": 3, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_model(attention: str = "gqa", method: str = "blockffn", **overrides: Any) -> BlockFFNForCausalLM:
    """As `tests.models.conftest.tiny_model`; the method `gated` is `blockffn` with gated experts.

    Their router's epsilon keeps it from amplifying the rounding of a token whose experts are all nearly off.
    """
    gated = {"expert_gated": True, "router_norm_eps": 0.01} if method == "gated" else {}
    return tiny_model_of(attention, "blockffn" if gated else method, **{**gated, **overrides})


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_same(actual: Step, expected: Step, tolerance: float = TOLERANCE["f32"]) -> None:
    assert actual.logits.shape == expected.logits.shape
    assert error(actual.logits, expected.logits) < tolerance
    assert error(actual.hidden, expected.hidden) < tolerance
    for name in ("union", "active"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs), name


def ids(count: int, vocab: int = 61) -> Tensor:
    return torch.randint(0, vocab, (count,))


def both(model: BlockFFNForCausalLM, **options: Any) -> tuple[Target, Target]:
    return NativeTarget(model, **options), ModelTarget(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_prefill_and_decoding_equal_the_model(attention: str, method: str, tied: bool) -> None:
    model = tiny_model(attention, method, tie_word_embeddings=tied)
    targets = both(model)
    tokens = ids(20)
    assert_same(*(prefill(target, tokens[:13]) for target in targets))
    for i in range(13, 20):
        assert_same(*(target.extend(tokens[i : i + 1]) for target in targets))
        for target in targets:
            target.commit(torch.arange(1))
    assert [target.length for target in targets] == [20, 20]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_trees_and_what_is_kept_of_them_equal_the_model(attention: str, path: list[int]) -> None:
    targets = both(tiny_model(attention))
    prompt, tree, more = ids(7), ids(6), ids(4)
    for target in targets:
        prefill(target, prompt)
    assert_same(*(target.extend(tree, PARENTS) for target in targets))
    for target in targets:
        target.commit(torch.tensor(path, dtype=torch.long))
    assert_same(*(target.extend(more) for target in targets))


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_chains_longer_than_a_step_and_trees_of_64_equal_the_model(attention: str) -> None:
    targets = both(tiny_model(attention, max_position_embeddings=512, num_hidden_layers=3))
    prompt, chain, tree = ids(130), ids(129), ids(64)
    assert_same(*(prefill(target, prompt) for target in targets))
    assert_same(*(target.extend(chain) for target in targets))
    for target in targets:
        target.commit(torch.arange(70))
    parents = torch.tensor([-1] + [int(torch.randint(-1, i, ())) for i in range(1, 64)])
    assert_same(*(target.extend(tree, parents) for target in targets))


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("size", [3, 8, 21])
@pytest.mark.parametrize("method", ["blockffn", "gated"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_a_chain_gives_the_bits_of_its_tokens_one_by_one(attention: str, method: str, size: int, format: str) -> None:
    target = NativeTarget(tiny_model(attention, method, max_position_embeddings=256), format=format)
    tokens = ids(140)
    steps = []
    for count in (1, size):
        target.reset()
        prefill(target, tokens[:4])
        logits = []
        for chain in tokens[4:].split(count):
            logits.append(target.extend(chain).logits)
            target.commit(torch.arange(len(chain)))
        steps.append(torch.cat(logits))
    assert torch.equal(steps[0], steps[1])


@pytest.mark.parametrize("cache", ["f32", "bf16"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 500, 967])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_trees_of_any_size_behind_any_length_equal_the_model(attention: str, length: int, cache: str) -> None:
    """Attention takes a tree's rows in passes of as many as fit; the model sees the same rounded keys and values."""
    model = tiny_model(attention, "dense", **SIZES, **HEADS[attention], max_position_embeddings=1000)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[cache]
    ours, reference = NativeTarget(model, cache_dtype=dtype), ModelTarget(model)
    context = ids(length)
    prefill(ours, context), prefill(reference, context)
    for count in (1, 2, 4, 5, 9, 17, 32):
        tokens = ids(count)
        parents = torch.tensor([int(torch.randint(-1, node, ())) for node in range(count)])
        actual, expected = ours.extend(tokens, parents), reference.extend(tokens, parents)
        assert_same(actual, expected, TOLERANCE[cache])
        ours.commit(torch.empty(0, dtype=torch.int64)), reference.commit(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("method", ["blockffn", "dense", "gated"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_packed_formats_equal_the_model_with_the_values_they_store(attention: str, method: str, format: str) -> None:
    model = tiny_model(attention, method, **SIZES, **HEADS[attention])
    assert error_of_packing(model, format, vocab_size=77) < TOLERANCE[format]


def error_of_packing(model: BlockFFNForCausalLM, format: str, *, vocab_size: int) -> float:
    """Of a tree's logits from packed weights, against the modules with the values that packing leaves."""
    tokens, tree = ids(9, vocab_size), ids(6, vocab_size)
    target = NativeTarget(model, format=format, head_format=format, group_size=32)
    round_weights(model, format)
    steps = []
    for each in (target, ModelTarget(model)):
        prefill(each, tokens)
        steps.append(each.extend(tree, PARENTS))
    return error(steps[0].logits, steps[1].logits)


@torch.no_grad()
def round_weights(model: BlockFFNForCausalLM, format: str) -> None:
    """Give a model the values that packing leaves of its weights."""
    if format == "bf16":
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "router" not in name and "embed" not in name:
                parameter.copy_(parameter.bfloat16())
        return
    parts = {"ffn": format, "attention": format, "embeddings": None, "lm_head": format}
    pack_model(model, BlockFFNQuantizationConfig(**parts, group_size=32))
    unpack_model(model, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["blockffn", "dense", "gated"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_model_that_is_packed_is_used_as_it_is(attention: str, method: str, format: str, tied: bool) -> None:
    model = tiny_model(attention, method, **SIZES, **HEADS[attention], tie_word_embeddings=tied)
    pack_model(model, BlockFFNQuantizationConfig.preset(format, group_size=32))
    target, expected = both(model)
    tokens = ids(9, 77)
    steps = []
    for each in (target, expected):
        prefill(each, tokens[:-1])
        steps.append(each.extend(tokens[-1:]))
    assert error(steps[0].logits, steps[1].logits) < TOLERANCE[format]
    experts = model.model.layers[0].mlp
    if method != "dense":
        assert target.weights.description.layers[0].experts.data == experts.routed_experts.packed.data_ptr()


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_bfloat16_models_decode_close_to_float32(attention: str) -> None:
    model = tiny_model(attention, "dense").bfloat16()  # experts near a router's zero would come and go
    target, tokens = NativeTarget(model), ids(9)
    actual = prefill(target, tokens)
    assert actual.hidden.dtype == torch.float32  # as the kernels have it
    assert actual.logits.dtype == torch.float32
    assert error(actual.logits, prefill(ModelTarget(model.float()), tokens).logits) < TOLERANCE["bf16"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_greedy_text_is_that_of_the_model(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    prompt = ids(5).tolist()
    settings = GenerationSettings(max_new_tokens=50)
    texts = [generate(target, prompt, settings).token_ids for target in both(model)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 50


def test_greedy_text_of_a_converted_models_shape_is_that_of_the_model() -> None:
    model = tiny_model("gqa", "gated", **CONVERTED, max_position_embeddings=128)
    target = make_target(model)
    assert isinstance(target, NativeTarget)
    prompt = ids(70, 1021).tolist()  # longer than a step
    settings = GenerationSettings(max_new_tokens=50)
    text = generate(target, prompt, settings).token_ids
    assert text == generate(ModelTarget(model), prompt, settings).token_ids
    assert len(set(text)) > 10


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_converted_models_shape_in_packed_formats_equals_the_values_they_store(format: str) -> None:
    model = tiny_model("gqa", "gated", **{**CONVERTED, "num_hidden_layers": 1, "tie_word_embeddings": False})
    assert error_of_packing(model, format, vocab_size=1021) < TOLERANCE[format]


def test_thresholds_that_change_hold_after_a_reset() -> None:
    model = tiny_model(num_experts=9)
    targets = both(model)
    before = prefill(targets[0], ids(8))
    model.set_threshold(0.7)
    tokens = ids(8)
    for target in targets:
        target.reset()
    after = prefill(targets[0], tokens)
    assert_same(after, prefill(targets[1], tokens))
    assert before.active is not None
    assert after.active is not None
    assert after.active.sum() < before.active.sum()


def test_a_layer_without_experts_has_no_row_in_the_counts() -> None:
    model = tiny_model("mla", "blockffn", first_k_dense_replace=1, num_hidden_layers=3, router_type="relu_scaled")
    targets = both(model)
    step = prefill(targets[0], tokens := ids(9))
    assert_same(step, prefill(targets[1], tokens))
    assert step.active is not None
    assert step.active.shape == (2, 9)


def test_a_tokens_result_does_not_depend_on_its_company_or_on_threads() -> None:
    model = tiny_model("mla")
    tokens = ids(6)
    alone = NativeTarget(model)
    prefill(alone, tokens[:5])
    one = alone.extend(tokens[5:]).logits
    together = NativeTarget(model)
    assert torch.equal(together.extend(tokens).logits[5:], one)
    torch.set_num_threads(3)
    try:
        assert torch.equal(NativeTarget(model).extend(tokens).logits[5:], one)
    finally:
        torch.set_num_threads(1)


def test_two_targets_run_side_by_side() -> None:
    torch.set_num_threads(2)
    try:
        models = [tiny_model(attention) for attention in sorted(ATTENTION)]
        prompts = [ids(5).tolist() for _ in models]
        settings = GenerationSettings(max_new_tokens=40)
        alone = [generate(NativeTarget(m), p, settings).token_ids for m, p in zip(models, prompts)]
        targets = [NativeTarget(model) for model in models]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda t, p: generate(t, p, settings).token_ids, targets, prompts))
        assert together == alone
    finally:
        torch.set_num_threads(1)


def test_reset_forgets_everything() -> None:
    target = NativeTarget(tiny_model())
    tokens = ids(5)
    first = target.extend(tokens).logits
    target.reset()
    target.extend(ids(9))
    target.reset()
    assert target.length == 0
    assert torch.equal(target.extend(tokens).logits, first)


def test_the_size_of_weights_is_that_of_their_format() -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "vocab_size": 512, "kv_lora_rank": 64}
    model = tiny_model("mla", **sizes, q_lora_rank=64, qk_nope_head_dim=64, v_head_dim=64)
    bits = {f: NativeTarget(model, format=f, head_format=f).bits_per_weight for f in ("f32", "bf16", "int8")}
    assert 32 <= bits["f32"] < 36  # padding of narrow matrices
    assert 16 <= bits["bf16"] < 18
    assert 8.25 <= bits["int8"] < 9.5


def test_times_are_collected_on_request() -> None:
    target = NativeTarget(tiny_model())
    target.extend(ids(3))
    assert not any(target.seconds.values())
    target.reset()
    target.times = True
    target.extend(ids(3))
    assert all(seconds > 0 for seconds in target.seconds.values())


def test_steps_may_be_kept() -> None:
    target = NativeTarget(tiny_model())
    target.ask_best(1)
    first = target.extend([5, 6, 7], [-1, 0, 0])
    assert first.choices == first.logits.argmax(dim=-1).tolist()
    copies = [tensor.clone() for tensor in (first.logits, first.hidden, first.active, first.union)]
    chosen = list(first.choices)
    target.commit([0, 2])
    target.extend([8, 9, 10, 11])
    assert all(map(torch.equal, (first.logits, first.hidden, first.active, first.union), copies))
    assert first.choices == chosen


@pytest.mark.parametrize("path", PATHS)
def test_lists_and_tensors_mean_the_same(path: list[int]) -> None:
    target, steps = NativeTarget(tiny_model()), []
    for tokens, parents, kept in (
        (list(range(1, 7)), PARENTS.tolist(), path),
        (torch.arange(1, 7), PARENTS, torch.tensor(path, dtype=torch.int64)),
    ):
        target.reset()
        steps.append(target.extend(tokens, parents))
        target.commit(kept)
        steps.append(target.extend([9]))
    assert_same(steps[0], steps[2])
    assert_same(steps[1], steps[3])


def test_misuse_is_refused() -> None:
    target = NativeTarget(tiny_model(), capacity=8)
    with pytest.raises(ValueError, match="nothing to commit"):
        target.commit(torch.arange(1))
    with pytest.raises(ValueError, match=r"0 committed tokens and 9 more exceed the cache's capacity of 8"):
        target.extend(torch.arange(9))
    with pytest.raises(ValueError, match="precede its token"):
        target.extend(torch.arange(3), torch.tensor([-1, 1, 0]))
    with pytest.raises(ValueError, match=r"tokens must lie between 0 and 60, got 1 … 61"):
        target.extend(torch.tensor([1, 61]))
    with pytest.raises(ValueError, match="at least one token"):
        target.extend(torch.arange(0))
    target.extend(torch.arange(6), PARENTS)
    with pytest.raises(ValueError, match="tokens are pending"):
        target.extend(torch.arange(1))
    with pytest.raises(ValueError, match="path from a root"):
        target.commit(torch.tensor([2]))
    with pytest.raises(ValueError, match="the model's context of 64 tokens, got 65"):
        NativeTarget(tiny_model(), capacity=65)
    with pytest.raises(ValueError, match="at most 64 tokens here, got 65"):
        NativeTarget(tiny_model(max_position_embeddings=128)).extend(ids(65), torch.full((65,), -1))
    with pytest.raises(ValueError, match="the cache is float32 or bfloat16"):
        NativeTarget(tiny_model(), cache_dtype=torch.float16)


def test_the_routers_norm_has_an_epsilon_of_its_own() -> None:
    model = tiny_model(router_norm_eps=1.0)
    tokens = ids(9)
    with_epsilon = [prefill(target, tokens) for target in both(model)]
    assert_same(*with_epsilon)
    for layer in model.model.layers:
        layer.mlp.router.norm.eps = model.config.rms_norm_eps
    without = prefill(ModelTarget(model), tokens)
    assert (without.logits - with_epsilon[0].logits).abs().max() > 1e-2
