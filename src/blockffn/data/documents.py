"""Read documents from whatever holds text: files, JSON lines, folders, Hugging Face datasets, and two built-in corpora.

Reading streams: one document is in memory at a time, and a large plain-text file is cut into several.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blockffn.data.compressed import COMPRESSED_SUFFIXES, open_compressed
from blockffn.data.hub import is_dataset_folder, read_dataset_folder, read_hub_dataset
from blockffn.data.json_lines import read_json_lines
from blockffn.data.standard_library import standard_library_texts
from blockffn.data.synthetic import synthetic_texts
from blockffn.wording import counted

OWN_SPLITS = ("stdlib", "synthetic")
"""Built-in corpora; each brings its own `train` and `valid` split."""

JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
TEXT_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("txt", "md", "rst", "tex", "org", "html", "xml", "css", "toml", "yaml", "yml", "ini", "cfg"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cuh", "java", "kt", "scala", "go", "rs", "swift"),
        *("js", "jsx", "ts", "tsx", "rb", "php", "jl", "r", "lua", "pl", "sh", "sql"),
    )
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
MAX_DOCUMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class Document:
    """A text and the name of the source it came from."""

    text: str
    source: str


class BinaryFileError(ValueError):
    """A file that was read as text is not UTF-8 text."""


def read_documents(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    text_field: str = "text",
    source_field: str | None = None,
    extensions: Collection[str] | None = None,
) -> Iterator[Document]:
    """Read every document of a source, in an order that depends on the source alone.

    What the source is, is recognised by what is there:

    * `stdlib` and `synthetic`, the built-in corpora;
    * a JSON-lines file (`.jsonl`, `.ndjson`, `.json`), one document a line;
    * any other file: UTF-8 text, one document; a file over 4 MiB is cut at line ends into documents of about that size;
    * a folder saved by `datasets`, or one that holds parquet files;
    * any other folder: its text and JSON-lines files, recursively and sorted; binary files are skipped with a warning;
    * else an id on the Hugging Face hub, `name[:config[:split]]`.

    Files may be compressed (.gz, .xz, .zst). Documents without text are left out.

    Args:
        split: `train` or `valid` of a built-in corpus; `None` is both. Other sources have no split of their own.
        text_field: field of JSON lines and of datasets that holds the text.
        source_field: field that names a document's source; without it the source is named after the file or folder.
        extensions: suffixes to read in a folder, such as `{".py"}`, instead of `TEXT_SUFFIXES` and JSON lines.

    Raises:
        ValueError: nothing is there, a file is not text (named, with the offset of the first bad byte), a JSON line is
            not an object with that field (named by file and line), or the source holds no text at all.
    """
    name, default = str(path_or_id), source_name(path_or_id)
    num_documents = 0
    for text, source in _read(name, split, text_field, source_field, extensions):
        if text.strip():
            num_documents += 1
            yield Document(text, source or default)
    if not num_documents:
        raise ValueError(f"{name!r} holds no text; give a source with at least one document that is not empty")


def source_name(path_or_id: str | Path) -> str:
    """Name of a source: `books` for `corpora/books.jsonl.xz`, the folder's own name for a folder."""
    text = str(path_or_id)
    path = Path(text)
    if text in OWN_SPLITS or not path.exists():
        return text
    path = path.resolve()
    if path.is_dir():
        return path.name
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED_SUFFIXES else path.name
    return Path(name).stem


Records = Iterator[tuple[str, str | None]]
"""Texts with the name of their source, or `None` for the default."""


def _read(
    name: str, split: str | None, text_field: str, source_field: str | None, extensions: Collection[str] | None
) -> Records:
    if name in OWN_SPLITS:
        texts = standard_library_texts(split) if name == "stdlib" else synthetic_texts(split)
        return ((text, None) for text in texts)
    path = Path(name)
    if path.is_file():
        return _read_file(path, text_field, source_field)
    if path.is_dir() and is_dataset_folder(path):
        return read_dataset_folder(path, text_field=text_field, source_field=source_field)
    if path.is_dir():
        return _read_folder(path, text_field, source_field, extensions)
    if _looks_like_a_path(name):
        raise ValueError(f"there is no file or folder {name!r}; check the path")
    return read_hub_dataset(name, text_field=text_field, source_field=source_field)


def _looks_like_a_path(name: str) -> bool:
    known = TEXT_SUFFIXES | JSON_LINES_SUFFIXES | frozenset(COMPRESSED_SUFFIXES)
    return not name or name[0] in "./~" or "\\" in name or name.count("/") > 1 or Path(name).suffix.lower() in known


def _suffix(path: Path) -> str:
    """Suffix of the content, whatever it is compressed with: `.jsonl` for `a.jsonl.xz`."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def _read_file(path: Path, text_field: str, source_field: str | None) -> Records:
    if _suffix(path) in JSON_LINES_SUFFIXES:
        return read_json_lines(path, text_field=text_field, source_field=source_field)
    return ((text, None) for text in _read_text_file(path))


def _read_text_file(path: Path) -> Iterator[str]:
    with open_compressed(path) as stream:
        offset, carry = 0, b""
        while True:
            data = carry + _read_fully(stream, MAX_DOCUMENT_BYTES)
            if not data:
                return
            end = len(data) if len(data) < MAX_DOCUMENT_BYTES else _last_boundary(data)
            text = _decode(data[:end], path, offset)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset, carry = offset + end, data[end:]


def _read_fully(stream: IO[bytes], size: int) -> bytes:
    """`size` bytes, or what is left; a decompressor's `read` may return less than is there."""
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _last_boundary(data: bytes) -> int:
    """Where to cut: behind the last line end, else before the last UTF-8 character."""
    end = data.rfind(b"\n") + 1
    if end:
        return end
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _decode(data: bytes, path: Path, offset: int) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise BinaryFileError(
            f"{path} is not text: a zero byte at offset {offset + zero}; convert it to UTF-8 text or leave it out"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BinaryFileError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
            f"({error.reason}); convert it to UTF-8 or leave it out"
        ) from None


def _read_folder(
    folder: Path, text_field: str, source_field: str | None, extensions: Collection[str] | None
) -> Records:
    wanted = frozenset(extensions) if extensions is not None else TEXT_SUFFIXES | JSON_LINES_SUFFIXES - {".json"}
    skipped: list[BinaryFileError] = []
    for path in _files(folder):
        if _suffix(path) in wanted:
            try:
                yield from _read_file(path, text_field, source_field)
            except BinaryFileError as error:
                skipped.append(error)
    if skipped:
        warnings.warn(
            f"{folder}: skipped {counted(len(skipped), 'file')} (not text); the first: {skipped[0]}", stacklevel=2
        )


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, sorted, without hidden folders and caches."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED_FOLDERS)
        yield from (path for name in sorted(names) if (path := Path(parent, name)).is_file())
