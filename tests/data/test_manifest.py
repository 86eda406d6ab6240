from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockffn.data.manifest import Manifest, is_prepared_folder, load_manifest


def change(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_manifest_survives_being_written_and_read(prepared: Path) -> None:
    manifest = load_manifest(prepared, check_hashes=True)
    assert isinstance(manifest, Manifest)
    assert (prepared / "manifest.json").read_text(encoding="utf-8") == manifest.to_json()


def test_a_truncated_shard_is_named_with_both_sizes(damaged: Path) -> None:
    path = damaged / "train-00001.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"train-00001\.bin is truncated: {size - 10} bytes instead of {size}"):
        load_manifest(damaged)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "valid-00000.idx.npy", "token_bytes.npy", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.* is missing"):
        load_manifest(damaged)


def test_an_altered_shard_is_found_when_hashes_are_checked(damaged: Path) -> None:
    path = damaged / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    load_manifest(damaged)
    with pytest.raises(ValueError, match=r"train-00000\.bin was altered: its SHA-256 is"):
        load_manifest(damaged, check_hashes=True)


def test_an_altered_manifest_is_found(damaged: Path) -> None:
    change(damaged, source_names=["dogs"])
    with pytest.raises(ValueError, match="fingerprint does not fit"):
        load_manifest(damaged)


def test_another_format_version_is_refused_with_both_numbers(damaged: Path) -> None:
    change(damaged, version=99)
    with pytest.raises(ValueError, match="format version 99, this program reads version 1"):
        load_manifest(damaged)
    assert is_prepared_folder(damaged)


def test_a_damaged_manifest_is_an_error(damaged: Path) -> None:
    path = damaged / "manifest.json"
    change(damaged, splits={"train": {}})
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load_manifest(damaged)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load_manifest(damaged)
    assert not is_prepared_folder(damaged)


def test_another_folder_is_not_a_prepared_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a prepared folder: it has no manifest\.json"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(ValueError, match="was not written by `blockffn prepare`"):
        load_manifest(tmp_path)
    assert not is_prepared_folder(tmp_path)
