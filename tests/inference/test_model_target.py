"""The engine's pass over a cache against the model's own forward pass, in every way the cache can be filled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import pack_model
from blockffn.inference import cached_attention
from blockffn.inference.model_target import ModelTarget, ancestors_of
from blockffn.inference.target import prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import METHODS
from tests.models.conftest import ATTENTION, tiny_model

# A tree of two roots: 0 → (2 → 4, 5), 1 → 3.
PARENTS = torch.tensor([-1, -1, 0, 1, 2, 2])
PATHS = [[0], [1], [0, 2], [1, 3], [0, 2, 4], [0, 2, 5]]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value: the order of float32 additions."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def reference(model: BlockFFNForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` and final hidden states `[T, D]` without a cache."""
    out = model(ids[None], use_cache=False, output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_chunked_prefill_and_decoding_equal_the_model(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    ids = torch.randint(0, 61, (20,))
    logits, hidden = reference(model, ids)
    target = ModelTarget(model, chunk_size=5)
    step = prefill(target, ids[:13])
    assert_equal(step.logits, logits[12:13])
    assert_equal(step.hidden, hidden[:13])
    for i in range(13, 20):
        step = target.extend(ids[i : i + 1])
        target.commit(torch.arange(1))
        assert_equal(step.logits, logits[i : i + 1])
        assert_equal(step.hidden, hidden[i : i + 1])
    assert target.length == 20


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("absorbs", [True, False])
def test_a_chain_equals_the_model_absorbed_and_expanded(
    monkeypatch: pytest.MonkeyPatch, attention: str, absorbs: bool
) -> None:
    monkeypatch.setattr(cached_attention, "absorbing_pays", lambda *sizes: absorbs)
    model = tiny_model(attention)
    ids = torch.randint(0, 61, (12,))
    target = ModelTarget(model, chunk_size=5)
    assert_equal(target.extend(ids).logits, reference(model, ids)[0])


@pytest.mark.parametrize("method", ["blockffn", "dense", "topk"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_a_tree_equals_each_of_its_paths(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    prompt, tree = torch.randint(0, 61, (7,)), torch.randint(0, 61, (6,))
    target = ModelTarget(model)
    prefill(target, prompt)
    step = target.extend(tree, PARENTS)
    for path in PATHS:
        logits, hidden = reference(model, torch.cat((prompt, tree[path])))
        assert_equal(step.logits[path[-1]], logits[-1])
        assert_equal(step.hidden[path[-1]], hidden[-1])


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@pytest.mark.parametrize("path", [[], *PATHS])
def test_after_a_path_is_committed_the_rest_of_the_tree_is_forgotten(attention: str, path: list[int]) -> None:
    model = tiny_model(attention)
    prompt, tree, more = torch.randint(0, 61, (7,)), torch.randint(0, 61, (6,)), torch.randint(0, 61, (4,))
    target = ModelTarget(model)
    prefill(target, prompt)
    target.extend(tree, PARENTS)
    target.commit(torch.tensor(path, dtype=torch.long))
    assert target.length == 7 + len(path)
    step = target.extend(more)
    logits, _ = reference(model, torch.cat((prompt, tree[path], more)))
    assert_equal(step.logits, logits[-4:])


@torch.no_grad()
def test_the_union_and_the_active_experts_are_those_of_the_routing() -> None:
    model = tiny_model(num_experts=9)
    ids = torch.randint(0, 61, (11,))
    target = ModelTarget(model, chunk_size=4)
    step = target.extend(ids)
    active = torch.stack([r.weights[0] != 0 for r in model(ids[None], output_routing=True).routings])
    assert step.active is not None
    assert step.union is not None
    assert torch.equal(step.active, active.sum(-1))
    assert torch.equal(step.union, active.any(1).sum(-1))
    assert step.union.min() > 0


def test_a_dense_model_has_no_union() -> None:
    step = ModelTarget(tiny_model("gqa", "dense")).extend(torch.tensor([1, 2]))
    assert step.union is None
    assert step.active is None


def test_bfloat16_decodes_close_to_the_model() -> None:
    for attention in ATTENTION:
        model = tiny_model(attention).to(torch.bfloat16)
        ids = torch.randint(0, 61, (9,))
        expected, _ = reference(model, ids)
        target = ModelTarget(model)
        prefill(target, ids[:-1])
        actual = target.extend(ids[-1:]).logits[0]
        assert actual.dtype == torch.float32
        error = (actual - expected[-1].float()).norm() / expected[-1].float().norm()
        assert error < 0.05


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_packed_weights_decode_like_their_model(attention: str) -> None:
    sizes = {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "moe_intermediate_size": 32}
    if attention == "gqa":
        sizes |= {"head_dim": 16}
    model = tiny_model(attention, **sizes)
    pack_model(model, BlockFFNQuantizationConfig.preset("int8", group_size=32, attention="int8"))
    ids = torch.randint(0, 61, (9,))
    expected, _ = reference(model, ids)
    target = ModelTarget(model)
    prefill(target, ids[:-1])
    actual = target.extend(ids[-1:]).logits[0]
    # Products of int8 round their inputs, so an absorbed projection rounds elsewhere.
    assert (actual - expected[-1]).norm() / expected[-1].norm() < 0.03


def test_reset_forgets_everything() -> None:
    model = tiny_model()
    target = ModelTarget(model)
    ids = torch.randint(0, 61, (5,))
    target.extend(torch.randint(0, 61, (9,)))
    target.reset()
    assert target.length == 0
    assert_equal(target.extend(ids).logits, reference(model, ids)[0])


def test_misuse_is_refused() -> None:
    target = ModelTarget(tiny_model(), capacity=8)
    with pytest.raises(ValueError, match="nothing to commit"):
        target.commit(torch.arange(1))
    with pytest.raises(ValueError, match=r"0 committed tokens and 9 more exceed the cache's capacity of 8"):
        target.extend(torch.arange(9))
    with pytest.raises(ValueError, match="precede its token"):
        target.extend(torch.arange(3), torch.tensor([-1, 1, 0]))
    with pytest.raises(ValueError, match="at least one token"):
        target.extend(torch.arange(0))
    target.extend(torch.arange(6), PARENTS)
    with pytest.raises(ValueError, match="tokens are pending"):
        target.extend(torch.arange(1))
    for no_path in ([2], [0, 3], [2, 0], [6], [-1]):
        with pytest.raises(ValueError, match="path from a root"):
            target.commit(torch.tensor(no_path))
    target.commit(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="the model's context of 64 tokens, got 65"):
        ModelTarget(tiny_model(), capacity=65)


def test_ancestors_of_a_deep_chain_and_of_a_tree() -> None:
    assert torch.equal(ancestors_of(torch.arange(-1, 36)), torch.ones(37, 37).tril().bool())
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for path in PATHS:
        expected[path[-1], path] = True
    assert torch.equal(ancestors_of(PARENTS), expected)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    for attention in ATTENTION:
        model = tiny_model(attention)
        ids = torch.randint(0, 61, (6,))
        expected = reference(model, ids)[0]
        target = ModelTarget(model.cuda())
        prefill(target, ids[:2])
        step = target.extend(ids[2:], torch.arange(-1, 3))
        torch.testing.assert_close(step.logits.cpu(), expected[2:], rtol=1e-3, atol=1e-2)
