"""The language model as Hugging Face sees it, and what packing, caching and compiling must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import blockffn
from blockffn.models.causal_lm import BlockFFNForCausalLM, BlockFFNModel
from blockffn.presets import METHODS, SIZES, preset_config
from tests.models.conftest import tiny_model


@torch.no_grad()
def test_a_model_equals_its_parts_written_out() -> None:
    """Embedding, residual and logit scales, norms and experts, for one layer."""
    model = tiny_model("gqa", num_hidden_layers=1)
    config, layer = model.config, model.model.layers[0]
    ids = torch.randint(0, 61, (1, 6))
    x = model.model.embed_tokens.weight[ids] * 12
    attended, _ = layer.self_attn(layer.input_layernorm(x), model.model.rotary_emb(x, torch.arange(6)[None]))
    x = x + 1.4 * attended
    h = layer.post_attention_layernorm(x)
    y = torch.zeros_like(x)
    for e in range(config.num_experts):
        relu = torch.relu(h @ layer.mlp.router.proj.weight.T)
        weight = relu[..., e] / (relu.pow(2).mean(-1) + 1e-5).sqrt()
        up = h @ layer.mlp.routed_experts.up_proj[e].T
        y = y + weight[..., None] * ((up * torch.sigmoid(up)) @ layer.mlp.routed_experts.down_proj[e])
    x = model.model.norm(x + 1.4 * y)
    torch.testing.assert_close(model(ids).logits, x / (32 / 256) @ model.lm_head.weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("attention", "method"), [("mla", "blockffn"), *(("gqa", method) for method in METHODS)])
def test_save_and_load_gives_identical_logits(tmp_path: Path, attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is BlockFFNForCausalLM
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_auto_classes_know_the_model_after_importing_blockffn() -> None:
    assert blockffn.__version__
    config = preset_config("nano", vocab_size=10)
    assert type(AutoConfig.for_model("blockffn")) is type(config)
    assert type(AutoModel.from_config(config)) is BlockFFNModel


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(("attention", "method"), [("mla", "blockffn"), *(("gqa", method) for method in METHODS)])
def test_generate_with_cache_equals_without(attention: str, method: str) -> None:
    model = tiny_model(attention, method)
    ids = torch.randint(3, 61, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_generate_from_left_padded_prompts_equals_each_alone(model: BlockFFNForCausalLM) -> None:
    short, long = torch.randint(3, 61, (1, 4)), torch.randint(3, 61, (1, 9))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0, 5:], ids[1] = short, long
    together = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(together[0, 9:], model.generate(short, **options)[0, 4:])
    assert torch.equal(together[1, 9:], model.generate(long, **options)[0, 9:])


@torch.no_grad()
def test_packed_documents_give_the_logits_of_each_alone(model: BlockFFNForCausalLM) -> None:
    ids = torch.randint(0, 61, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    packed = model(ids, document_ids=documents).logits[0]
    torch.testing.assert_close(packed[:5], model(ids[:, :5]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[5:9], model(ids[:, 5:9]).logits[0], atol=1e-5, rtol=1e-5)
    assert packed.isfinite().all()


def test_document_ids_with_a_mask_are_refused(model: BlockFFNForCausalLM) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, document_ids=ids, attention_mask=torch.ones_like(ids))


def test_routing_is_returned_per_layer_on_request_only(model: BlockFFNForCausalLM) -> None:
    ids = torch.randint(0, 61, (2, 5))
    assert model(ids).routings is None
    routings = model(ids, output_routing=True).routings
    assert [tuple(r.weights.shape) for r in routings] == [(2, 5, 6)] * 2


def test_a_forward_pass_leaves_no_state_on_any_module(model: BlockFFNForCausalLM) -> None:
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(torch.randint(0, 61, (2, 5)), output_routing=True)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_gradient_checkpointing_changes_no_gradient(model: BlockFFNForCausalLM) -> None:
    ids = torch.randint(0, 61, (2, 8))
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids, output_routing=True)
        (out.loss + sum(r.shares.square().mean() for r in out.routings)).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for with_checkpointing, without in zip(gradients(), plain):
        torch.testing.assert_close(with_checkpointing, without)


def test_a_layer_compiles_without_graph_breaks(model: BlockFFNForCausalLM) -> None:
    layer = model.model.layers[0].train()
    x = torch.randn(2, 8, 32)
    cos_sin = model.model.rotary_emb(x, torch.arange(8)[None])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, actual = layer(x, position_embeddings=cos_sin), compiled(x, position_embeddings=cos_sin)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2].weights, expected[2].weights)


def test_hidden_states_end_with_the_normed_one(model: BlockFFNForCausalLM) -> None:
    out = model.model(torch.randint(0, 61, (1, 5)), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert out.hidden_states[-1] is out.last_hidden_state


def test_tuple_output_is_the_dict_output_in_order(model: BlockFFNForCausalLM) -> None:
    ids = torch.randint(0, 61, (1, 5))
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_builds(size: str, method: str) -> None:
    with torch.device("meta"):
        BlockFFNForCausalLM(preset_config(size, method))


@pytest.mark.parametrize(("size", "published"), [("0.1b", 119_383_552), ("0.5b", 494_721_848),
                                                 ("0.8b", 817_236_992), ("1.2b", 1_187_830_952)])  # fmt: skip
def test_non_embedding_parameters_equal_the_published_count(size: str, published: int) -> None:
    with torch.device("meta"):
        model = BlockFFNForCausalLM(preset_config(size))
    embeddings = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - embeddings == published


@pytest.mark.parametrize("size", sorted(SIZES))
def test_all_methods_have_the_same_number_of_parameters(size: str) -> None:
    def count(method: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in BlockFFNForCausalLM(preset_config(size, method)).parameters())

    counts = {method: count(method) for method in METHODS}
    # The published dense widths of 0.5B to 1.2B are round numbers, up to 0.3 % off.
    for method in counts:
        rel = 3e-3 if method == "dense" else 1e-3
        assert counts[method] == pytest.approx(counts["blockffn"], rel=rel), method
    if size in ("nano", "mini", "0.1b", "3b"):
        assert counts["dense"] == pytest.approx(counts["blockffn"], rel=1e-3)


def test_an_unknown_preset_or_field_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'nano'"):
        preset_config("nanp")
    with pytest.raises(ValueError, match="did you mean 'num_experts'"):
        preset_config("nano", num_expert=3)


WRONG = [("attention_type", "mqa"), ("ffn_type", "swiglu"), ("router_type", "top"), ("num_experts", 0),
         ("num_key_value_heads", 3), ("head_dim", 7), ("num_experts", -3), ("vocab_size", "abc"),
         ("routing_threshold", -0.5)]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_configuration_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        preset_config("nano", **{field: value})


@pytest.mark.parametrize(("method", "fields", "message"), [
    ("topk", {"num_experts_per_tok": 33}, "num_experts_per_tok must be .* at most num_experts .32., got 33"),
    ("topk", {"num_experts_per_tok": 0}, "num_experts_per_tok must be .*, got 0"),
    ("deepseek", {"num_experts_per_tok": 2}, "above num_shared_experts .2. and .*, got 2"),
    ("blockffn", {"num_shared_experts": 32}, "num_shared_experts must be .*; got 32"),
    ("grin", {"router_jitter_noise": -1.0}, "router_jitter_noise must be finite and at least 0, got -1.0"),
    ("deco", {"first_k_dense_replace": 4}, "first_k_dense_replace must be .*; got 4 of num_hidden_layers 4"),
    ("deco", {"expert_gated": True}, "gated experts have the activation silu, got 'norm_silu'"),
    ("blockffn", {"router_dtype": "bfloat16"}, "router_dtype must be one of model, float32; got 'bfloat16'"),
    ("blockffn", {"expert_activation": "gelu"}, "expert_activation must be one of silu, norm_silu; got 'gelu'"),
])  # fmt: skip
def test_wrong_routing_is_refused(method: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset_config("nano", method, **fields)


def test_routers_other_than_top_k_ignore_the_number_of_experts_per_token() -> None:
    assert preset_config("nano", num_experts=3).num_experts_per_tok == 6


def test_a_first_dense_layer_has_no_routing() -> None:
    model = tiny_model("gqa", "deco")
    assert len(model(torch.zeros(1, 4, dtype=torch.long), output_routing=True).routings) == 1


def test_decos_scale_starts_at_a_tenth_and_baselines_draw_routers_narrowly() -> None:
    deco = tiny_model("gqa", "deco").model.layers[1].mlp.router
    assert torch.equal(deco.scale.weight, torch.full((5,), 0.1))
    router = BlockFFNForCausalLM(preset_config("nano", "topk", num_hidden_layers=1)).model.layers[0].mlp.router
    assert router.proj.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_weights_start_with_the_published_spread() -> None:
    model = BlockFFNForCausalLM(
        preset_config("mini", num_hidden_layers=1, kv_b_initializer_range=0.02, router_scale_initializer=0.3,
                      router_initializer_range=None)
    )  # fmt: skip
    scaled = 0.1 / (512 / 256) ** 0.5
    layer = model.model.layers[0]
    expected = {
        model.model.embed_tokens.weight: 0.1,
        model.lm_head.weight: 0.1,
        layer.self_attn.q_b_proj.weight: scaled,
        layer.self_attn.kv_b_proj.weight: 0.02,
        layer.mlp.router.proj.weight: scaled,
        layer.mlp.routed_experts.up_proj: scaled,
        layer.mlp.routed_experts.down_proj: scaled,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(layer.mlp.router.norm.weight, torch.full((48,), 0.3))
