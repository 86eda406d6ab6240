from __future__ import annotations

import errno
import filecmp
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockffn.data import prepare as prepare_module
from blockffn.data.manifest import Count, load_manifest
from blockffn.data.prepare import prepare
from blockffn.data.shards import ShardWriter
from blockffn.data.tokenizer import load_tokenizer
from tests.data.conftest import sentences, write_json_lines


def documents_of(folder: Path, split: str) -> list[list[int]]:
    manifest = load_manifest(folder)
    found = []
    for shard in manifest.splits[split].shards:
        tokens = np.fromfile(folder / f"{shard.name}.bin", dtype=manifest.token_dtype)
        offsets = np.load(folder / f"{shard.name}.idx.npy")
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return found


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents_of(folder, split)]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_document_is_stored_between_bos_and_eos(prepared: Path) -> None:
    documents = documents_of(prepared, "train") + documents_of(prepared, "valid")
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "valid")) == sorted(sentences(200, seed=1))
    assert all(ids[0] == 1 and ids[-1] == 2 and 1 not in ids[1:] and 2 not in ids[:-1] for ids in documents)


def test_bars_are_in_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json_lines(tmp_path / "cats.jsonl", sentences(200, seed=1))
    prepare([str(tmp_path / "cats.jsonl")], tmp_path / "out", vocab_size=300, progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"reading [\d.]+k?B, ", shown)
    assert re.search(r"tokenising .*\| [\d.]+k?B of [\d.]+k?B, ", shown)


def test_the_manifest_counts_what_is_there(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert manifest.source_names == ("cats",)
    assert manifest.vocab_size == 300
    assert manifest.token_dtype == "uint16"
    assert (manifest.pad_token_id, manifest.bos_token_id, manifest.eos_token_id) == (0, 1, 2)
    for name, split in manifest.splits.items():
        documents = documents_of(prepared, name)
        assert split.documents == len(documents)
        assert split.tokens == sum(map(len, documents))
        assert split.bytes == sum(len(text.encode()) for text in texts_of(prepared, name))
        assert split.sources == {"cats": Count(split.documents, split.tokens, split.bytes)}


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(prepared: Path) -> None:
    token_bytes = np.load(prepared / "token_bytes.npy")
    for name, split in load_manifest(prepared).splits.items():
        assert sum(token_bytes[ids].sum() for ids in documents_of(prepared, name)) == split.bytes


def test_shards_close_at_the_size_asked_for_and_documents_stay_whole(prepared: Path) -> None:
    shards = load_manifest(prepared).splits["train"].shards
    longest = max(map(len, documents_of(prepared, "train")))
    assert len(shards) > 3
    assert all(2000 <= shard.tokens < 2000 + longest for shard in shards[:-1])


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", sentences(50, seed=3))
    manifests = [prepare([source], tmp_path / name, vocab_size=280, valid_fraction=0.1) for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    for name in tree(tmp_path / "one"):
        if (tmp_path / "one" / name).is_file():
            assert filecmp.cmp(tmp_path / "one" / name, tmp_path / "two" / name, shallow=False)


def test_the_fingerprint_changes_with_the_text(prepared: Path, other: Path) -> None:
    assert load_manifest(prepared).fingerprint != load_manifest(other).fingerprint
    assert load_manifest(prepared).tokenizer_hash == load_manifest(other).tokenizer_hash


def test_batches_of_any_size_give_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", sentences(50, seed=3))
    one = prepare([source], tmp_path / "one", vocab_size=280, valid_fraction=0.1)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1)
    assert prepare([source], tmp_path / "two", vocab_size=280, valid_fraction=0.1) == one


def test_sources_are_counted_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": f"text number {i}", "kind": "maths" if i % 3 else "code"} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare([path], tmp_path / "out", vocab_size=260, valid_fraction=0, source_field="kind")
    assert manifest.source_names == ("code", "maths")
    assert {name: count.documents for name, count in manifest.splits["train"].sources.items()} == {
        "code": 30,
        "maths": 60,
    }
    assert np.load(tmp_path / "out" / "train-00000.src.npy").tolist() == [0, 1, 1] * 30


def test_held_out_sources_make_the_validation_split(tmp_path: Path) -> None:
    train = write_json_lines(tmp_path / "train.jsonl", sentences(20, seed=3))
    valid = write_json_lines(tmp_path / "valid.jsonl", sentences(5, seed=4))
    prepare([train], tmp_path / "out", vocab_size=280, valid_sources=[valid])
    assert texts_of(tmp_path / "out", "train") == sentences(20, seed=3)
    assert texts_of(tmp_path / "out", "valid") == sentences(5, seed=4)


def test_without_held_out_text_there_is_no_validation_split(tmp_path: Path) -> None:
    manifest = prepare(
        write_json_lines(tmp_path / "a.jsonl", ["x y z"]), tmp_path / "out", vocab_size=260, valid_fraction=0
    )
    assert list(manifest.splits) == ["train"]


def test_a_single_text_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(sentences(30, seed=5)), encoding="utf-8")
    manifest = prepare([tmp_path / "book.txt"], tmp_path / "out", vocab_size=280, valid_fraction=0.05)
    assert manifest.splits["train"].documents == manifest.splits["valid"].documents == 1
    assert 0.04 < manifest.splits["valid"].bytes / manifest.splits["train"].bytes < 0.12


def test_text_that_spells_special_tokens_stays_text(tmp_path: Path, prepared: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", ["<eos><bos> x <pad>"])
    for tokenizer in (None, prepared):
        prepare([source], tmp_path / "out", vocab_size=260, tokenizer=tokenizer, valid_fraction=0)
        assert texts_of(tmp_path / "out", "train") == ["<eos><bos> x <pad>"]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<eos>", *alphabet, *(f"unused{i}" for i in range(1 << 16)), "ab"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    source = write_json_lines(tmp_path / "a.jsonl", ["abc"])
    manifest = prepare([source], tmp_path / "out", tokenizer=tmp_path / "tokenizer", valid_fraction=0)
    assert manifest.token_dtype == "uint32"
    assert manifest.vocab_size == len(words)
    assert documents_of(tmp_path / "out", "train") == [[0, len(words) - 1, words.index("c"), 0]]


def test_a_prepared_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", sentences(20, seed=3))
    prepare([source], tmp_path / "out", vocab_size=280, valid_fraction=0, shard_tokens=50)
    manifest = prepare([source], tmp_path / "out", vocab_size=270, valid_fraction=0)
    assert load_manifest(tmp_path / "out") == manifest
    assert not (tmp_path / "out" / "train-00001.bin").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that `blockffn prepare` did not write"):
        prepare(["synthetic"], tmp_path / "out")
    assert tree(tmp_path / "out") == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        prepare(["synthetic"], tmp_path / "out" / "thesis.tex")


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no field 'text'"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(ValueError, match="vocab_size is 10"):
        prepare(["synthetic"], tmp_path / "out", vocab_size=10)
    assert tree(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_is_explained_and_the_earlier_folder_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", sentences(20, seed=3))
    if existing:
        before = prepare([source], tmp_path / "out", vocab_size=280, valid_fraction=0)

    def full(self: ShardWriter, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write_array", full)
    with pytest.raises(OSError, match="the disk is full; nothing was left behind") as caught:
        prepare([source], tmp_path / "out", vocab_size=270, valid_fraction=0)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"} | ({"out"} if existing else set())
    if existing:
        assert load_manifest(tmp_path / "out", check_hashes=True) == before


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "token_byte_lengths", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(write_json_lines(tmp_path / "a.jsonl", ["x"]), tmp_path / "out", vocab_size=260, valid_fraction=0)
    assert tree(tmp_path) == ["a.jsonl"]


def test_a_shard_size_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        prepare(["synthetic"], tmp_path / "out", shard_tokens=0)
