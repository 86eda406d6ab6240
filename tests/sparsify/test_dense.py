from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from blockffn.configuration import BlockFFNConfig
from blockffn.data.tokenizer import load_tokenizer
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import preset_config
from blockffn.sparsify.dense import from_llama, open_dense
from tests.sparsify.conftest import MakeLlama

TOKENS = torch.arange(3, 45).view(2, 21)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 16}, {"rms_norm_eps": 1e-2},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
], ids=["untied", "tied", "full heads", "wide heads", "large epsilon", "scaled rope"])  # fmt: skip
@torch.no_grad()
def test_a_llama_in_our_architecture_has_the_same_logits(make_llama: MakeLlama, changes: dict[str, object]) -> None:
    llama = make_llama(**changes)
    ours = from_llama(llama)
    torch.testing.assert_close(ours(TOKENS).logits, llama(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert ours.config.tie_word_embeddings == llama.config.tie_word_embeddings


def test_a_model_with_biases_is_refused(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match=r"not Llama-like.*bias"):
        from_llama(make_llama(attention_bias=True))


def test_a_scale_that_only_the_configuration_knows_is_found() -> None:
    granite = GraniteForCausalLM(GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.5, initializer_range=0.2,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="logits differ by"):
        from_llama(granite)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="'gpt2' is not Llama-like"):
        from_llama(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)))


def test_another_activation_is_refused(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        from_llama(make_llama(hidden_act="gelu"))


def test_a_folder_opens_with_its_tokenizer(llama_folder: Path) -> None:
    model, tokenizer, difference = open_dense(llama_folder)
    assert isinstance(model.config, BlockFFNConfig)
    assert len(tokenizer) <= 300
    assert 0 <= difference < 1e-5
    original = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert torch.equal(original.lm_head.weight, model.lm_head.weight)


def test_a_missing_tokenizer_is_said(make_llama: MakeLlama, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        open_dense(tmp_path / "bare")


def test_a_missing_gguf_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.gguf is not a file"):
        open_dense(tmp_path / "none.gguf")


def test_a_model_with_experts_is_refused(text: Path, tmp_path: Path) -> None:
    sparse = preset_config("nano", hidden_size=32, num_hidden_layers=1, num_experts=4, vocab_size=300)
    BlockFFNForCausalLM(sparse).save_pretrained(tmp_path / "sparse")
    load_tokenizer(text).save_pretrained(tmp_path / "sparse")
    with pytest.raises(ValueError, match="has experts already"):
        open_dense(tmp_path / "sparse")
