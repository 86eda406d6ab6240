"""`manifest.json`: what a prepared folder holds. Reading it checks that the files are all there and whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "blockffn-data"
VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """A shard: `NAME.bin` (token ids), `NAME.idx.npy` (document offsets) and `NAME.src.npy` (document sources)."""

    name: str
    documents: int
    tokens: int
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class Count:
    """Documents, tokens (with BOS and EOS) and UTF-8 bytes of text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """A split: totals as in `Count`, the same by source name, and its shards."""

    documents: int
    tokens: int
    bytes: int
    sources: dict[str, Count]
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Source:
    """Where text came from: what the user gave, and whether it was split or belongs to one split."""

    origin: str
    split: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a prepared folder.

    Attributes:
        tokenizer_hash: equal for two folders whose token ids mean the same.
        token_dtype: `uint16` or `uint32`, little endian.
        source_names: names behind `Batch.source_ids`.
        splits: `train` and, unless nothing is held out, `valid`.
        origins: what was read.
        fingerprint: SHA-256 over tokens, documents, sources and tokenizer.
    """

    tokenizer_hash: str
    vocab_size: int
    token_dtype: str
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    source_names: tuple[str, ...]
    splits: dict[str, Split]
    origins: tuple[Source, ...]

    @property
    def fingerprint(self) -> str:
        hashes = {
            split: [info.sha256 for shard in content.shards for info in shard.files.values()]
            for split, content in self.splits.items()
        }
        content = {"tokenizer": self.tokenizer_hash, "sources": self.source_names, "files": hashes}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        values = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False)


def load_manifest(folder: Path | str, *, check_hashes: bool = False) -> Manifest:
    """Read the manifest of a prepared folder and check that its files are there with the right sizes.

    Args:
        check_hashes: also read every shard and compare its SHA-256 (slow on large data).

    Raises:
        ValueError: not a prepared folder, another version, or a file that is missing, truncated or altered (named).
    """
    folder = Path(folder)
    manifest = _parse(_read(folder), folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            for name, info in shard.files.items():
                _check_file(folder / name, info, check_hashes)
    for name in ("token_bytes.npy", "tokenizer/tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing; prepare the data again")
    return manifest


def is_prepared_folder(folder: Path) -> bool:
    """Whether a folder was written by `prepare`, whole or not, in this version or another."""
    try:
        return json.loads((folder / FILE_NAME).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared folder: it has no {FILE_NAME}; make one with `blockffn prepare`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the data again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `blockffn prepare`; give a folder that was")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {values.get('version')}, this program reads version {VERSION}; "
            "prepare the data again"
        )
    return values


def _parse(values: dict[str, Any], folder: Path) -> Manifest:
    fields = {key: value for key, value in values.items() if key not in ("format", "version", "fingerprint")}
    try:
        splits = {name: _parse_split(content) for name, content in fields.pop("splits").items()}
        origins = tuple(Source(**origin) for origin in fields.pop("origins"))
        names = tuple(fields.pop("source_names"))
        manifest = Manifest(**fields, source_names=names, splits=splits, origins=origins)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / FILE_NAME} is damaged ({error}); prepare the data again") from None
    if manifest.fingerprint != values.get("fingerprint"):
        raise ValueError(f"{folder / FILE_NAME} was altered: its fingerprint does not fit; prepare the data again")
    return manifest


def _parse_split(content: dict[str, Any]) -> Split:
    shards = tuple(
        ShardInfo(**{**shard, "files": {name: FileInfo(**info) for name, info in shard["files"].items()}})
        for shard in content["shards"]
    )
    sources = {name: Count(**count) for name, count in content["sources"].items()}
    return Split(content["documents"], content["tokens"], content["bytes"], sources, shards)


def _check_file(path: Path, info: FileInfo, check_hashes: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the data again")
    size = path.stat().st_size
    if size != info.size:
        what = "truncated" if size < info.size else "too long"
        raise ValueError(f"{path} is {what}: {size} bytes instead of {info.size}; prepare the data again")
    if check_hashes:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != info.sha256:
            raise ValueError(
                f"{path} was altered: its SHA-256 is {found} instead of {info.sha256}; prepare the data again"
            )
