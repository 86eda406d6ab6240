from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from blockffn.data import documents
from blockffn.data.documents import read_documents, source_name
from tests.data.conftest import write_json_lines

TEXTS = ["first\n", "second ü\n", "third 東京\n"]


def texts_of(source: str | Path, **options: str) -> list[str]:
    return [document.text for document in read_documents(source, **options)]


def test_a_text_file_is_one_document_with_its_own_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes("one\r\n\r\ntwo ü\n".encode())
    (document,) = read_documents(path)
    assert document.text == "one\r\n\r\ntwo ü\n"
    assert document.source == "story"


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts_of(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize("suffix", ["", ".xz", ".zst"])
def test_a_large_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 64)
    text = "".join(f"line {i} ü\n" for i in range(50))
    path = tmp_path / f"large.txt{suffix}"
    path.write_bytes(compress(text.encode(), suffix))
    parts = texts_of(path)
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts)
    assert max(len(part.encode()) for part in parts) <= 128


def test_a_file_without_line_ends_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 16)
    text = "東京😀ü" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "".join(texts_of(tmp_path / "a.txt")) == text


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines_read_the_same_however_they_are_compressed(tmp_path: Path, suffix: str) -> None:
    plain = write_json_lines(tmp_path / "plain.jsonl", TEXTS)
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(compress(plain.read_bytes() + b"\n", suffix))
    assert texts_of(path) == TEXTS
    assert {document.source for document in read_documents(path)} == {"corpus"}


def test_json_lines_longer_than_a_read_block_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockffn.data.json_lines.BLOCK_BYTES", 7)
    assert texts_of(write_json_lines(tmp_path / "a.jsonl", TEXTS)) == TEXTS


def test_the_second_of_two_concatenated_zst_frames_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compress(b"one\n", ".zst") + compress(b"two\n", ".zst"))
    assert texts_of(path) == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(bytes(range(32, 127)) * 50, suffix)[:-6])
    with pytest.raises(ValueError, match=r"a\.txt.*damaged or cut short"):
        texts_of(path)


def test_other_fields_can_hold_the_text_and_the_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "kind": "maths"}\n{"body": "y", "kind": "code"}\n')
    found = list(read_documents(path, text_field="body", source_field="kind"))
    assert [(d.text, d.source) for d in found] == [("x", "maths"), ("y", "code")]


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\ud800b"}))
    assert texts_of(tmp_path / "a.jsonl") == ["a\ufffdb"]


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/y.md", ".git/config.txt", "a/__pycache__/x.py", "image.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    write_json_lines(tmp_path / "c.jsonl", ["from json"])
    assert texts_of(tmp_path) == ["b.txt", "from json", "a/y.md", "a/z.py"]
    assert [d.text for d in read_documents(tmp_path, extensions={".py"})] == ["a/z.py"]
    assert next(read_documents(tmp_path)).source == tmp_path.name


def test_binary_files_in_a_folder_are_skipped_with_a_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    (tmp_path / "c.txt").write_bytes(b"\xff\xff")
    with pytest.warns(UserWarning, match=r"skipped 2 files.*b\.txt"):
        assert texts_of(tmp_path) == ["text"]


def test_a_zero_byte_in_a_text_file_is_named_with_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"12345678\n" * 3 + b"12\0")
    with pytest.raises(ValueError, match=r"a\.txt is not text: a zero byte at offset 29"):
        texts_of(tmp_path / "a.txt")


def test_a_byte_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "latin.txt").write_bytes(b"12345678\n" * 3 + "für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 0xfc at offset 28"):
        texts_of(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', r"a\.jsonl:2: no field 'text'; the fields there are \['body', 'id'\]"),
        ('{"text": 3}', r"a\.jsonl:2: field 'text' holds a int"),
        ('{"text": "x"', r"a\.jsonl:2: not JSON"),
        ('["text"]', r"a\.jsonl:2: a JSON list"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["missing.txt", "no/such/place", "./here", "missing.jsonl.xz"])
def test_a_path_that_does_not_exist_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="there is no file or folder"):
        texts_of(name)


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for source in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(ValueError, match="holds no text"):
            texts_of(source)


def test_a_missing_zstandard_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'blockffn\[data\]'"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_a_missing_datasets_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no file or folder 'some/corpus'.*pip install 'blockffn\[data\]'"):
        texts_of("some/corpus")


def test_sources_are_named_after_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "books.v2.jsonl.xz").touch()
    assert source_name(tmp_path / "books.v2.jsonl.xz") == "books.v2"
    assert source_name(tmp_path) == tmp_path.name
    assert source_name("stdlib") == "stdlib"
    assert source_name("user/corpus") == "user/corpus"


def test_built_in_corpora_are_read_by_name() -> None:
    document = next(read_documents("synthetic", split="valid"))
    assert document.source == "synthetic"
    assert next(read_documents("stdlib", split="valid")).source == "stdlib"
