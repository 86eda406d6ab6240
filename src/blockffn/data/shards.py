"""Write a split as shards: flat token ids, the offsets of documents, and the source of each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from blockffn.data.manifest import Count, FileInfo, ShardInfo, Split


class ShardWriter:
    """Appends documents to `SPLIT-00000.bin`, `SPLIT-00001.bin`, … in a folder. A document lies in one shard.

    Args:
        shard_tokens: a shard is closed when it holds at least this many tokens.
        dtype: little-endian integer type of the ids.
    """

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[ShardInfo] = []
        self._totals: dict[int, list[int]] = {}  # by source: documents, tokens, bytes
        self._stream: io.BufferedWriter | None = None

    def add(self, ids: Sequence[int], *, source: int, num_bytes: int) -> None:
        """Append one document: its ids with BOS and EOS, the index of its source and the UTF-8 bytes of its text."""
        if self._stream is None:
            self._open()
        assert self._stream is not None
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._sources.append(source)
        total = self._totals.setdefault(source, [0, 0, 0])
        for i, amount in enumerate((1, len(ids), num_bytes)):
            total[i] += amount
        if self._offsets[-1] >= self._shard_tokens:
            self._close_shard()

    def finish(self, source_names: Sequence[str]) -> Split:
        """Close the last shard and say what was written."""
        if self._stream is not None:
            self._close_shard()
        counts = {source_names[i]: Count(*total) for i, total in sorted(self._totals.items())}
        documents, tokens, num_bytes = (sum(total[i] for total in self._totals.values()) for i in range(3))
        return Split(documents, tokens, num_bytes, counts, tuple(self._shards))

    def abandon(self) -> None:
        """Close the open file, if any, without caring for what could not be written."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()

    def _open(self) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}"
        self._stream = (self._folder / f"{self._name}.bin").open("wb")
        self._hash = hashlib.sha256()
        self._offsets = [0]
        self._sources: list[int] = []

    def _close_shard(self) -> None:
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        tokens = self._offsets[-1]
        files = {
            f"{self._name}.bin": FileInfo(tokens * self._dtype.itemsize, self._hash.hexdigest()),
            f"{self._name}.idx.npy": self._write_array("idx", np.array(self._offsets, dtype="<i8")),
            f"{self._name}.src.npy": self._write_array("src", np.array(self._sources, dtype="<i2")),
        }
        self._shards.append(ShardInfo(self._name, len(self._sources), tokens, files))

    def _write_array(self, kind: str, array: np.ndarray) -> FileInfo:
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        (self._folder / f"{self._name}.{kind}.npy").write_bytes(data)
        return FileInfo(len(data), hashlib.sha256(data).hexdigest())
