"""Published folders give the logits that their tensors define, whatever their layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import blockffn
from blockffn.checkpoints.files import CheckpointError
from blockffn.checkpoints.recognise import recognise
from blockffn.data.tokenizer import train_tokenizer
from blockffn.models.causal_lm import BlockFFNForCausalLM
from tests.checkpoints import published, straight_line

IDS = torch.arange(11) * 7 % published.VOCAB


def assert_gives_the_logits_of(folder: Path, name: str, **arguments: Any) -> None:
    expected = straight_line.logits(published.weights(name), published.config(name), IDS)
    with torch.no_grad():
        found = blockffn.load(folder, **arguments)(IDS[None]).logits[0]
    assert expected.std() > 0.1  # not trivially equal
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(published.SIZES))
@pytest.mark.parametrize("mmap", [False, True])
def test_each_published_repository_gives_its_logits(tmp_path: Path, name: str, mmap: bool) -> None:
    published.write_bin(tmp_path, published.weights(name), published.config(name))
    assert_gives_the_logits_of(tmp_path, name, mmap=mmap)


@pytest.mark.parametrize("name", ["small", "3b-sft"])
def test_shards_safetensors_and_three_dimensions_are_the_same_model(tmp_path: Path, name: str) -> None:
    state, settings = published.weights(name), published.config(name)
    solid = published.in_three_dimensions(state, name)
    assert_gives_the_logits_of(published.write_bin(tmp_path / "shards", state, settings, shards=3), name)
    assert_gives_the_logits_of(published.write_safetensors(tmp_path / "safe", state, settings), name, mmap=True)
    assert_gives_the_logits_of(published.write_bin(tmp_path / "block", solid, {**settings, "ffn_type": "block"}), name)


def test_names_with_a_weight_suffix_are_understood(tmp_path: Path) -> None:
    state = {k + ".weight" if k.endswith("_proj") else k: v for k, v in published.weights("small").items()}
    assert_gives_the_logits_of(published.write_bin(tmp_path, state, published.config("small")), "small")


@pytest.mark.parametrize("router_transposed", [False, True])
def test_a_latent_training_checkpoint_needs_no_configuration(tmp_path: Path, router_transposed: bool) -> None:
    state = published.as_training_checkpoint(published.weights("small"), router_transposed=router_transposed)
    torch.save(state, tmp_path / "step_10000.pt")
    model = blockffn.load(tmp_path)
    model.config.dim_model_base = 16  # the published value would be 256, which this width is too small for
    with torch.no_grad():
        found = model(IDS[None]).logits[0]
    expected = straight_line.logits(published.weights("small"), published.config("small"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_training_checkpoint_with_grouped_queries_takes_the_heads_from_its_configuration(tmp_path: Path) -> None:
    state = published.as_training_checkpoint(published.weights("3b-sft"))
    settings = {"dim_model": 64, "num_layers": 2, "num_heads": 4, "dim_head": 16, "eps": 1e-5, "dim_model_base": 16,
                "tie_lm_head": True, "attention_type": "vanilla"}  # fmt: skip
    assert_gives_the_logits_of(published.write_bin(tmp_path / "with", state, settings), "3b-sft")
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(CheckpointError, match="must say num_attention_heads"):
        blockffn.load(tmp_path)


def test_left_over_fields_are_ignored_and_mentioned(tmp_path: Path) -> None:
    published.write_bin(tmp_path, published.weights("xlarge"), published.config("xlarge"))
    oddities = " ".join(recognise(tmp_path).oddities)
    assert all(field in oddities for field in ("intermediate_size 5760", "num_key_value_heads 32", "ffn_gated"))


def test_from_pretrained_opens_a_published_folder_without_its_code(tmp_path: Path) -> None:
    published.write_bin(tmp_path, published.weights("small"), published.config("small"))
    model = BlockFFNForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config.lora_norm_eps == 1e-6


def test_bf16_weights_stay_bf16_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    published.write_bin(tmp_path, published.weights("small", dtype=torch.bfloat16), published.config("small"))
    assert blockffn.load(tmp_path).dtype == torch.bfloat16
    assert blockffn.load(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 7}, "num_experts 7, the weights have 6"),
        ({"expert_size": 8}, "moe_intermediate_size 8, the weights have 4"),
        ({"num_attention_heads": 4}, "num_attention_heads 4, the weights have 2"),
        ({"vocab_size": 99}, "vocab_size 99"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
        ({"router_act": "softmax"}, "router_act 'softmax'"),
        ({"norm_after_router": "sum"}, "norm_after_router 'sum'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    published.write_bin(tmp_path, published.weights("small"), {**published.config("small"), **change})
    with pytest.raises(CheckpointError, match=message):
        blockffn.load(tmp_path)


@pytest.mark.slow
def test_generate_runs_on_the_folder_as_downloaded(tmp_path: Path) -> None:
    published.write_bin(tmp_path / "theirs", published.weights("3b-sft"), published.config("3b-sft"), shards=2)
    tokenizer = train_tokenizer(["def main(): return 1"] * 50, vocab_size=published.VOCAB)
    tokenizer.save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_minicpm.MiniCPMTokenizer", None]}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "blockffn", "generate", "theirs", "-p", "def", "-n", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
