"""`load` gives what Hugging Face's `from_pretrained` gives, and leaves files alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import blockffn
from blockffn.checkpoints import files
from blockffn.checkpoints.files import open_tensors
from blockffn.checkpoints.inspect import inspect
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.presets import METHODS
from tests.checkpoints import published
from tests.models.conftest import tiny_model

IDS = torch.arange(24).view(2, 12) % 61


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("mmap", [False, True])
def test_every_method_is_loaded_as_hugging_face_loads_it(tmp_path: Path, method: str, mmap: bool) -> None:
    tiny_model("mla", method).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = blockffn.load(tmp_path, mmap=mmap)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert not found.training


@pytest.mark.parametrize("safetensors", [False, True])
def test_tensors_that_are_read_in_pieces_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safetensors: bool
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    weights = published.weights("xlarge")
    write = published.write_safetensors if safetensors else published.write_bin
    stored = open_tensors(write(tmp_path / "theirs", weights, published.config("xlarge")))
    assert any(tensor.num_bytes > 2000 and tensor.num_bytes % 1000 for tensor in stored.values())
    assert all(torch.equal(tensor.read(), weights[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("missing", [1, 100, 200])
def test_a_file_that_became_shorter_is_named_whichever_piece_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 60)
    folder = published.write_safetensors(tmp_path / "theirs", published.weights("xlarge"), published.config("xlarge"))
    stored = max(open_tensors(folder).values(), key=lambda tensor: (tensor.offset or 0) + tensor.num_bytes)
    assert stored.num_bytes > 200  # several pieces, one of which fails in a thread
    content = stored.file.read_bytes()
    stored.file.write_bytes(content[:-missing])
    with pytest.raises(files.CheckpointError, match="ended within tensor"):
        stored.read()


def test_scaled_rotary_frequencies_and_generation_defaults_come_along(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    model = tiny_model(rope_parameters=rope)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.8, temperature=0.7)
    model.save_pretrained(tmp_path)
    found = blockffn.load(tmp_path)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    assert found.generation_config.temperature == 0.7


def test_writing_to_a_mapped_model_leaves_the_file_alone(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = blockffn.load(tmp_path, mmap=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_reading_and_mapping_a_tensor_agree(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "safe")
    published.write_bin(tmp_path / "bin", published.weights("small"), published.config("small"))
    for folder in (tmp_path / "safe", tmp_path / "bin"):
        for tensor in open_tensors(folder).values():
            assert tensor.offset is not None  # so that reading does not map a second copy
            assert torch.equal(tensor.read(), tensor.map())


def test_views_and_shared_values_of_a_torch_file_are_read_right(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    content = {"b": torch.ones(3), "turned": whole.T, "row": whole[2], "whole": whole, "empty": torch.ones(0)}
    torch.save(content, tmp_path / "pytorch_model.bin")
    found = open_tensors(tmp_path)
    assert all(torch.equal(found[name].read(), value) for name, value in content.items())


def test_a_misspelt_field_is_refused_and_what_it_means_is_said(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps"', '"rms_norm_esp"'))
    with pytest.raises(files.CheckpointError, match="unknown field 'rms_norm_esp'; did you mean 'rms_norm_eps'"):
        blockffn.load(tmp_path)
    # Hugging Face's own fields stay what they are.
    assert blockffn.BlockFFNConfig(torch_dtype="float32", num_labels=2, auto_map={}).num_labels == 2


def test_a_wrong_dtype_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be"):
        blockffn.load(tmp_path, dtype="int8")


def test_inspecting_tells_sizes_layout_and_oddities(tmp_path: Path) -> None:
    published.write_bin(tmp_path, published.weights("xlarge"), published.config("xlarge"))
    found = inspect(tmp_path, tls_percent=80.0)
    total = sum(tensor.numel() for tensor in published.weights("xlarge").values())
    assert (found["kind"], found["layout"]) == ("model", "published")
    assert found["parameters"]["total"] == total
    assert found["bytes"] == 4 * total
    assert found["bits_per_weight"] == 32
    assert found["active_parameters"] < found["parameters"]["non_embedding"]
    assert any("programs, which are never run" in oddity for oddity in found["oddities"])


def test_inspecting_a_packed_folder_counts_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    config = BlockFFNQuantizationConfig()
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "q")
    plain, packed = (inspect(tmp_path / name, tls_percent=80.0) for name in ("plain", "q"))
    assert packed["parameters"] == plain["parameters"]
    assert packed["bytes"] < plain["bytes"]
    assert packed["quantization"]["ffn"] == "int8"


def test_inspecting_a_draft_says_so(tmp_path: Path) -> None:
    published.write_bin(tmp_path, published.draft_weights(), published.DRAFT)
    found = inspect(tmp_path, tls_percent=80.0)
    assert found["kind"] == "draft"
    assert any("embed_tokens.weight is stored, but not read" in oddity for oddity in found["oddities"])
    assert any("programs, which are never run" in oddity for oddity in found["oddities"])


@pytest.mark.slow
def test_convert_and_inspect_on_the_command_line(tmp_path: Path) -> None:
    published.write_bin(tmp_path / "theirs", published.weights("medium"), published.config("medium"))
    for command, expected in (
        (["convert", "theirs", "--out", "ours", "--quantize", "int4", "--json", "receipt.json"], "written to ours"),
        (["inspect", "ours", "--json", "ours.json"], "nothing: this is our layout"),
        (["inspect", "theirs"], "names, and the order of axes"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "blockffn", *command], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert (tmp_path / "receipt.json").is_file()
    assert (tmp_path / "ours.json").is_file()
