"""The language model as Hugging Face sees it, and what packing, caching and compiling must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import blockffn
from blockffn.models.causal_lm import BlockFFNForCausalLM, BlockFFNModel
from blockffn.presets import SIZES, preset_config
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


@pytest.mark.parametrize(("attention", "method"), [("gqa", "blockffn"), ("mla", "blockffn"), ("gqa", "dense")])
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


def test_generate_with_cache_equals_without(model: BlockFFNForCausalLM) -> None:
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
@pytest.mark.parametrize("method", ["blockffn", "dense"])
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
def test_the_dense_twin_has_the_same_number_of_parameters(size: str) -> None:
    def count(method: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in BlockFFNForCausalLM(preset_config(size, method)).model.layers.parameters())

    # The published dense widths are round numbers, up to 0.3 % off.
    assert count("dense") == pytest.approx(count("blockffn"), rel=3e-3)


def test_an_unknown_preset_or_field_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'nano'"):
        preset_config("nanp")
    with pytest.raises(ValueError, match="did you mean 'num_experts'"):
        preset_config("nano", num_expert=3)


WRONG = [("attention_type", "mqa"), ("ffn_type", "swiglu"), ("router_type", "top"), ("num_experts", 0),
         ("num_key_value_heads", 3), ("head_dim", 7)]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_configuration_is_refused(field: str, value: object) -> None:
    with pytest.raises(Exception, match=str(value)):
        preset_config("nano", **{field: value})
