"""Damaged and hostile folders: a clear error that names the file, in bounded memory and time, and nothing executed."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockffn
from blockffn.checkpoints.convert import convert
from blockffn.checkpoints.files import CheckpointError, open_file, open_tensors
from blockffn.checkpoints.recognise import recognise
from tests.checkpoints import published
from tests.models.conftest import tiny_model


class Payload:
    """What a pickle can do when it is loaded without care."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    """A folder in our layout."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return published.write_bin(tmp_path / "theirs", published.weights("small"), published.config("small"))


def write_header(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("position", ["beside tensors", "alone"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    theirs: Path, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(theirs)
    content: Any = Payload() if position == "alone" else {**published.weights("small"), "extra": Payload()}
    torch.save(content, theirs / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors.*safetensors"):
        blockffn.load(theirs)
    assert not (theirs / "executed").exists()


def test_programs_beside_the_weights_are_not_run(theirs: Path) -> None:
    (theirs / "modeling_minicpm.py").write_text("raise SystemExit('executed')")
    blockffn.load(theirs)
    assert "modeling_minicpm" not in " ".join(sys.modules)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\\b", "x\0"]
)
def test_an_index_cannot_reach_out_of_its_folder(safe: Path, shard: Any) -> None:
    (safe / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        blockffn.load(safe)


def test_a_shard_that_is_missing_or_lacks_its_tensor_is_named(safe: Path) -> None:
    index = safe / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        blockffn.load(safe)
    index.write_text(json.dumps({"weight_map": {"model.norm.bias": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors lacks tensor 'model.norm.bias'"):
        blockffn.load(safe)


@pytest.mark.parametrize(("header", "message"), [
    ({"x": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}, "truncated"),
    ({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]}}, "bytes do not have"),
    ({"x": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}, "bytes do not have"),
    ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, -8]}}, "bytes do not have"),
    ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "bytes do not have"),
    ({"x": {"dtype": "F4_E2M1", "shape": [4], "data_offsets": [0, 2]}}, "F4_E2M1"),
    ({"x": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "stores tensor"),
    ({"x": {"shape": [4]}}, "wrongly"),
    ({"x": 3}, "wrongly"),
    ([1, 2], "damaged header"),
    (b"{not json", "damaged header"),
    (b"[" * 100_000, "damaged header"),
])  # fmt: skip
def test_a_header_that_claims_what_the_file_does_not_have_is_refused(
    tmp_path: Path, header: Any, message: str
) -> None:  # fmt: skip
    write_header(tmp_path / "model.safetensors", header, bytes(64))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        open_file(tmp_path / "model.safetensors")


def test_a_header_of_terabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 42) + b"{}")
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        open_file(file)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 30))
        stream.truncate((1 << 30) + 8)  # a sparse file: the bytes are there, and cost nothing
    with pytest.raises(CheckpointError, match="claims a header of 1,073,741,824 bytes"):
        open_file(file)


def test_an_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match=r"10,000,000 bytes in record 'archive/data.pkl'; refused"):
        open_file(file)


def test_the_format_before_zip_archives_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6"):
        open_file(tmp_path / "old.bin")


def test_a_small_file_cannot_claim_a_large_tensor(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(1, 1).expand(1 << 20, 1 << 20)}, file)
    with pytest.raises(CheckpointError, match="claims more values for tensor 'x' than it stores"):
        open_file(file)
    shared = torch.ones(1000)
    torch.save({f"x{i}": shared for i in range(50)}, file)
    with pytest.raises(CheckpointError, match="claims more values for its tensors"):
        open_file(file)
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    write_header(tmp_path / "model.safetensors", {f"x{i}": entry for i in range(50)}, bytes(64))
    with pytest.raises(CheckpointError, match="same bytes for several tensors"):
        open_file(tmp_path / "model.safetensors")


def test_wrong_generation_defaults_are_named(safe: Path) -> None:
    (safe / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        blockffn.load(safe)


def test_truncated_files_are_named(safe: Path, theirs: Path) -> None:
    for file in (safe / "model.safetensors", theirs / "pytorch_model.bin"):
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size * 3 // 4)
        with pytest.raises(CheckpointError, match=rf"{file.name} is truncated.*copy"):
            blockffn.load(file.parent)


def test_missing_surplus_and_misshapen_tensors_are_named(safe: Path) -> None:
    name = "model.layers.1.mlp.router.proj.weight"
    original = load_file(safe / "model.safetensors")[name]
    for change, message in (
        ({name: None}, f"lacks 1 tensor, the first '{name}'"),
        ({name: original[:, :-1].contiguous()}, rf"'{name}' has shape \(6, 31\), config.json makes it \(6, 32\)"),
        ({name: original, "model.extra": torch.ones(2)}, "does not have, the first 'model.extra'"),
        ({"model.extra": None, name: original.to(torch.uint8)}, f"'{name}' is torch.uint8"),
    ):
        change_tensors(safe, change)
        with pytest.raises(CheckpointError, match=message):
            blockffn.load(safe)


def test_a_packed_file_of_another_size_is_refused(safe: Path, tmp_path: Path) -> None:
    from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig

    convert(safe, tmp_path / "packed", quantization=BlockFFNQuantizationConfig())
    name = "model.layers.0.mlp.routed_experts.packed"
    change_tensors(tmp_path / "packed", {name: torch.zeros(6, 64, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=f"'{name}' has shape"):
        blockffn.load(tmp_path / "packed")


def test_nan_is_found_when_asked_for_and_always_when_converting(safe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.routed_experts.down_proj"
    weights = load_file(safe / "model.safetensors")[name]
    weights[2, 1, 0] = torch.nan
    change_tensors(safe, {name: weights})
    for attempt in (lambda: blockffn.load(safe, check_finite=True), lambda: convert(safe, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{name}' holds NaN"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"), ("[]", "no JSON object"), ("{}", "model_type None"),
    ('{"model_type": "blockffn", "hidden_size": -1}', "hidden_size"),
    ('{"model_type": "blockffn", "num_hidden_layers": 1000000000}', "num_hidden_layers 1000000000"),
    ('{"model_type": "blockffn", "quantization_config": 3}', "quantization_config"),
    ('{"model_type": "blockffn", "num_hidden_layers": 2, "quantization_config": {"bits": 3}}', "quantization_config"),
])  # fmt: skip
def test_a_wrong_configuration_is_named(safe: Path, content: str, message: str) -> None:
    (safe / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        blockffn.load(safe)


@pytest.mark.parametrize("change", [
    {"rope_scaling": {"type": "unheard-of"}}, {"rope_scaling": {"type": "linear"}}, {"rope_scaling": [1]},
    {"max_position_embeddings": 1e30}, {"rope_theta": -1}, {"scale_depth": "deep"}, {"tie_word_embeddings": "maybe"},
])  # fmt: skip
def test_nonsense_in_a_published_configuration_is_an_error_or_harmless(theirs: Path, change: dict[str, Any]) -> None:
    (theirs / "config.json").write_text(json.dumps({**published.config("small"), **change}))
    opens_or_says_why(theirs)


def test_a_name_cannot_claim_a_billion_layers(theirs: Path) -> None:
    state = published.weights("small")
    for name in ("model.layers.999999999.mlp.up_proj", "model.layers.7.mlp.up_proj"):
        torch.save({**state, name: torch.ones(1)}, theirs / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"model\.layers\.999999999|none of layer 2"):
            blockffn.load(theirs)


def test_several_candidates_and_none_are_said(safe: Path, tmp_path: Path) -> None:
    (safe / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 candidates.*model\.safetensors, other\.safetensors"):
        open_tensors(safe)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_tensors(tmp_path)


def test_another_model_is_recognised_as_such(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="no BlockFFN model that is known here: its tensors are called"):
        recognise(tmp_path)


def flipped(original: bytes, flips: list[tuple[int, int]], keep: int) -> bytes:
    content = bytearray(original)
    for position, value in flips:
        content[position % len(content)] ^= value
    return bytes(content[: max(1, keep * len(content) // 100)])


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6)
KEEP = st.one_of(st.just(100), st.integers(0, 100))
FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens_or_says_why(folder: Path) -> None:
    """Damage either shows as our error, or changes values only: then all tensors can be read."""
    try:
        model = blockffn.load(folder)
    except CheckpointError as error:
        message = str(error)
    else:
        message = f"{folder} has {len(list(model.parameters()))} tensors"
    assert str(folder) in message


@pytest.mark.slow
@FUZZ
@given(flips=FLIPS, keep=KEEP)
@pytest.mark.parametrize("where", ["header", "anywhere"])
def test_damaged_safetensors_never_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, where: str, flips: list[tuple[int, int]], keep: int
) -> None:
    folder = fuzz_folder(tmp_path_factory, "safe")
    original = (folder / "original").read_bytes()
    if where == "header":
        flips = [(position % 600, value) for position, value in flips]
    (folder / "model.safetensors").write_bytes(flipped(original, flips, keep))
    opens_or_says_why(folder)


@pytest.mark.slow
@FUZZ
@given(flips=FLIPS, keep=KEEP)
@pytest.mark.parametrize("where", ["pickle", "anywhere", "directory"])
def test_damaged_torch_files_never_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, where: str, flips: list[tuple[int, int]], keep: int
) -> None:
    folder = fuzz_folder(tmp_path_factory, "bin")
    original = (folder / "original").read_bytes()
    if where == "pickle":
        start = original.index(b"data.pkl") + 64
        flips, keep = [(start + position % 2000, value) for position, value in flips], 100
    elif where == "directory":
        flips, keep = [(len(original) - 1 - position % 2500, value) for position, value in flips], 100
    (folder / "pytorch_model.bin").write_bytes(flipped(original, flips, keep))
    opens_or_says_why(folder)


@pytest.mark.slow
@FUZZ
@given(flips=FLIPS)
def test_damaged_configurations_never_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    folder = fuzz_folder(tmp_path_factory, "config")
    (folder / "config.json").write_bytes(flipped((folder / "original").read_bytes(), flips, 100))
    opens_or_says_why(folder)


def fuzz_folder(factory: pytest.TempPathFactory, kind: str) -> Path:
    """A folder whose intact file is kept as `original`; made once."""
    folder = factory.getbasetemp() / f"fuzz-{kind}"
    if not folder.exists():
        state, config = published.weights("small"), published.config("small")
        if kind == "bin":
            published.write_bin(folder, state, config)
        else:
            published.write_safetensors(folder, state, config)
        file = {"bin": "pytorch_model.bin", "safe": "model.safetensors", "config": "config.json"}[kind]
        (folder / "original").write_bytes((folder / file).read_bytes())
    return folder


def test_a_tensor_without_values_is_refused(theirs: Path) -> None:
    torch.save({"x": torch.empty(4, device="meta")}, theirs / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds 'x', which is not a dense tensor"):
        open_tensors(theirs)


def test_a_pickle_of_nothing_but_instructions_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"}" * (17 << 20) + b".")
    with pytest.raises(CheckpointError, match=r"a directory of 17,825,795 bytes"):
        open_file(file)
