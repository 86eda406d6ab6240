"""Converting there and back loses no bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import blockffn
from blockffn.checkpoints.convert import convert
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from tests.checkpoints import published, straight_line
from tests.models.conftest import tiny_model

IDS = torch.arange(11) * 7 % published.VOCAB


@pytest.mark.parametrize("name", sorted(published.SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state, settings = published.weights(name, dtype=dtype), published.config(name)
    published.write_bin(tmp_path / "theirs", state, settings, shards=2)
    convert(tmp_path / "theirs", tmp_path / "ours", max_shard_size="10KB")
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == dtype for key in state)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    ignored = {"auto_map", "torch_dtype", "intermediate_size", "num_key_value_heads", "ffn_gated"}
    assert {k: v for k, v in settings.items() if k not in ignored}.items() <= written.items()
    assert not list((tmp_path / "back").glob("*.py"))


def test_a_converted_folder_is_an_ordinary_hugging_face_model(tmp_path: Path) -> None:
    state, settings = published.weights("medium"), published.config("medium")
    published.write_bin(tmp_path / "theirs", state, settings)
    convert(tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = straight_line.logits(state, settings, IDS)
    torch.testing.assert_close(model(IDS[None]).logits[0], expected, rtol=1e-5, atol=1e-5)


def test_a_sharded_published_folder_is_opened_again(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="published", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ids = IDS[None] % 61
    assert torch.equal(blockffn.load(tmp_path / "theirs")(ids).logits, tiny_model_logits(tmp_path / "ours", ids))


def tiny_model_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


def test_the_tokenizer_travels_and_programs_do_not(tmp_path: Path) -> None:
    source = published.write_bin(tmp_path / "theirs", published.weights("small"), published.config("small"))
    (source / "tokenizer.model").write_bytes(b"pieces")
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"pieces"
    assert not list((tmp_path / "ours").glob("*.py"))


def test_a_published_folder_is_quantised_in_one_step(tmp_path: Path) -> None:
    source = published.write_bin(tmp_path / "theirs", published.weights("3b-sft"), published.config("3b-sft"))
    convert(source, tmp_path / "ours", quantization=BlockFFNQuantizationConfig())
    expected = straight_line.logits(published.weights("3b-sft"), published.config("3b-sft"), IDS)
    found = blockffn.load(tmp_path / "ours")(IDS[None]).logits[0]
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("method", "overrides", "message"), [
    ("dense", {}, "ffn_type 'moe' only"),
    ("blockffn", {"router_type": "relu"}, "router_type"),
    ("blockffn", {"expert_gated": True}, "expert_gated"),
    ("blockffn", {"router_norm_eps": 1.0}, "one epsilon for all norms"),
])  # fmt: skip
def test_what_the_published_layout_cannot_hold_is_refused(
    tmp_path: Path, method: str, overrides: dict[str, object], message: str
) -> None:
    tiny_model(method=method, **overrides).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "out", to="published")
    assert not (tmp_path / "out").exists()
