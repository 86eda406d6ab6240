"""Cost of a configuration: against published counts, the real model, and sums by hand."""

from __future__ import annotations

import pytest
import torch

from blockffn.metrics import active_parameters, flops_per_token, parameter_counts, weight_bytes_per_token
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import METHODS, SIZES, preset_config

TINY = {
    "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "attention_type": "gqa", "num_experts": 3, "moe_intermediate_size": 8, "intermediate_size": 10, "vocab_size": 20,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "published"),
    [("0.1b", 119_383_552), ("0.5b", 494_721_848), ("0.8b", 817_236_992), ("1.2b", 1_187_830_952)],
)
def test_non_embedding_parameters_of_the_published_sizes(size, published):
    assert parameter_counts(preset_config(size)).non_embedding == published


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_counts_equal_the_parameters_of_the_model(size, method):
    _assert_equals_model(preset_config(size, method))


@pytest.mark.parametrize(
    "change", [{"router_type": "relu"}, {"expert_gated": True}, {"tie_word_embeddings": True}, {"ffn_type": "dense"}]
)
def test_counts_follow_every_option(change):
    _assert_equals_model(preset_config("nano", **{**TINY, **change}))


def _assert_equals_model(config) -> None:
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = parameter_counts(config)
    assert counts.total == sum(sizes.values())
    assert counts.attention == sum(n for name, n in sizes.items() if ".self_attn." in name)
    assert counts.router == sum(n for name, n in sizes.items() if ".router." in name)
    assert counts.experts == sum(n for name, n in sizes.items() if name.endswith(("up_proj", "down_proj", "gate_proj")))
    assert counts.embedding == sizes["model.embed_tokens.weight"]
    assert counts.lm_head == sizes.get("lm_head.weight", 0)


def test_the_router_of_shared_experts_and_of_a_dense_layer_is_not_counted_as_work():
    def flops(**change):
        return flops_per_token(preset_config("nano", **{**TINY, **change}), context=0)

    assert flops() - flops(num_shared_experts=1) == 2 * 2 * 8
    dense_layer = 3 * 10 * 8 - (3 * 8 + 3 * 2 * 8 * 8)
    assert flops(first_k_dense_replace=1) - flops() == 2 * dense_layer


def test_inactive_experts_are_not_active_parameters():
    config = preset_config("nano", **TINY)
    experts = 2 * 3 * 2 * 8 * 8
    rest = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8) + 2 * (3 * 8 + 3) + 5 * 8
    assert active_parameters(config, 0) == rest + experts
    assert active_parameters(config, 75) == pytest.approx(rest + experts / 4)


def test_flops_of_a_token_by_hand():
    config = preset_config("nano", **TINY)
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8) + 20 * 8
    experts, attention = 2 * 3 * 2 * 8 * 8, 2 * 2 * (4 + 4) * 10
    assert flops_per_token(config, context=10) == 2 * (matrices + experts + attention)
    assert flops_per_token(config, context=10, tls_percent=50) == 2 * (matrices + experts / 2 + attention)
    assert flops_per_token(config, context=10, training=True) == 6 * (matrices + experts + attention)


def test_flops_of_latent_attention_count_both_head_widths():
    config = preset_config("0.1b")
    per_position = flops_per_token(config, context=1) - flops_per_token(config, context=0)
    assert per_position == 2 * 16 * 6 * (128 + 64 + 128)


def test_bytes_of_a_token_by_hand():
    config = preset_config("nano", **TINY)
    counts = parameter_counts(config)
    always = counts.non_embedding - counts.experts + counts.lm_head + 8
    assert weight_bytes_per_token(config) == 2 * (always + counts.experts)
    assert weight_bytes_per_token(config, bits_per_weight=4.5, tls_percent=80) == pytest.approx(
        4.5 / 8 * (always + 0.2 * counts.experts)
    )


def test_a_tied_head_is_read_like_any_other():
    tied, untied = (preset_config("nano", **{**TINY, "tie_word_embeddings": tie}) for tie in (True, False))
    assert weight_bytes_per_token(tied) == weight_bytes_per_token(untied)
    assert flops_per_token(tied, context=4) == flops_per_token(untied, context=4)


def test_a_dense_model_has_no_sparsity_to_gain():
    config = preset_config("nano", "dense", **TINY)
    assert parameter_counts(config).dense_ffn == 2 * 3 * 8 * 10
    assert flops_per_token(config, context=4, tls_percent=90) == flops_per_token(config, context=4)


def test_values_out_of_range_are_errors():
    config = preset_config("nano", **TINY)
    with pytest.raises(ValueError, match="between 0 and 100; got 120"):
        active_parameters(config, 120)
    with pytest.raises(ValueError, match="context must not be negative, got -1"):
        flops_per_token(config, context=-1)
    with pytest.raises(ValueError, match="bits_per_weight must be positive, got 0"):
        weight_bytes_per_token(config, bits_per_weight=0)
