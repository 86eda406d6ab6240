"""One split of a prepared folder as rows that can be read in any order, straight from memory-mapped shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from blockffn.data.batch import IGNORED_LABEL, Batch
from blockffn.data.manifest import load_manifest
from blockffn.data.packing import check_alignment, pack

EMPTY_ROW = -1


class PackedSplit:
    """Rows of `sequence_length` tokens, packed as `blockffn.data.packing.pack` says.

    Args:
        folder: a prepared folder.
        split: `train` or `valid`.

    Raises:
        ValueError: the folder is damaged, has no such split, or the lengths do not fit together.
    """

    def __init__(self, folder: Path | str, split: str, *, sequence_length: int, align: int) -> None:
        check_alignment(sequence_length, align)
        folder = Path(folder)
        self.manifest = load_manifest(folder)
        if split not in self.manifest.splits:
            raise ValueError(
                f"{folder} has no split {split!r} but {sorted(self.manifest.splits)}; prepare it with held-out text"
            )
        self.sequence_length = sequence_length
        shards = self.manifest.splits[split].shards
        dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._tokens = [np.memmap(folder / f"{shard.name}.bin", dtype=dtype, mode="r") for shard in shards]
        offsets = [np.load(folder / f"{shard.name}.idx.npy") for shard in shards]
        self._shard_of_document = np.repeat(np.arange(len(shards)), [shard.documents for shard in shards])
        self._offset_of_document = np.concatenate([o[:-1] for o in offsets])
        self._source_of_document = np.concatenate([np.load(folder / f"{shard.name}.src.npy") for shard in shards])
        self._packing = pack(
            np.concatenate([np.diff(o) for o in offsets]), sequence_length=sequence_length, align=align
        )

    @property
    def num_rows(self) -> int:
        return self._packing.num_rows

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens in a row, without padding."""
        return float(self._packing.lengths.sum() / self.num_rows)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The rows with these numbers, on the CPU; `EMPTY_ROW` gives a row of padding."""
        shape = (len(rows), self.sequence_length)
        input_ids = np.full(shape, self.manifest.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        position_ids = np.tile(np.arange(self.sequence_length, dtype=np.int64), (len(rows), 1))
        document_ids = np.full(shape, -1, dtype=np.int32)
        source_ids = np.full(shape, -1, dtype=np.int16)
        packing = self._packing
        for b, row in enumerate(rows.tolist()):
            if row == EMPTY_ROW:
                continue
            for number, segment in enumerate(range(packing.row_starts[row], packing.row_starts[row + 1])):
                document, length = packing.documents[segment], packing.lengths[segment]
                start = self._offset_of_document[document] + packing.starts[segment]
                begin = packing.columns[segment]
                end = begin + length
                input_ids[b, begin:end] = self._tokens[self._shard_of_document[document]][start : start + length]
                labels[b, begin + 1 : end] = input_ids[b, begin + 1 : end]
                position_ids[b, begin:] = position_ids[b, : self.sequence_length - begin]
                document_ids[b, begin:end] = number
                source_ids[b, begin:end] = self._source_of_document[document]
        return Batch(*map(torch.from_numpy, (input_ids, labels, position_ids, document_ids, source_ids)))
