"""Batches of packed rows: endless and exactly resumable for training, one ordered pass for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockffn.data.batch import Batch
from blockffn.data.packed_split import EMPTY_ROW, PackedSplit


class BatchLoader:
    """Endless batches from one or several prepared folders.

    The sequence of rows is a function of the folders, their weights, the lengths and the seed. Each step takes the next
    `global_batch_size` rows of it and gives every rank its contiguous part, so the number of ranks does not matter.
    Within a folder, every row comes once an epoch, in an order that is new in each epoch.

    Args:
        folders: prepared folders, with the share of tokens (any positive scale) that each contributes.
        split: `train` or `valid`.
        sequence_length: tokens of a row, a multiple of `align`.
        global_batch_size: rows of a step over all ranks, a multiple of `world_size`.
        align: every segment begins at a multiple of this; the chunk length of the objectives.
        seed: of the order of rows.
        rank, world_size: which part of a step this process gets.

    `source_names` are the names behind `source_ids`, over all folders; with one folder, its manifest's.

    Raises:
        ValueError: a size that does not divide, weights that are not positive, a damaged folder, or folders with
            different tokenizers (each with the values).
    """

    def __init__(
        self,
        folders: Mapping[Path, float] | Mapping[str, float],
        *,
        split: str = "train",
        sequence_length: int,
        global_batch_size: int,
        align: int = 64,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not folders:
            raise ValueError("no data folders are given; make one with `blockffn prepare`")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a positive multiple of world_size {world_size}; "
                "every rank needs the same number of rows"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among the {world_size} ranks 0 to {world_size - 1}")
        for folder, weight in folders.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"the weight of {folder} is {weight}; weights must be positive, leave the folder out instead"
                )
        self._splits = [PackedSplit(folder, split, sequence_length=sequence_length, align=align) for folder in folders]
        _check_same_tokenizer(list(folders), self._splits)
        self.source_names = tuple(dict.fromkeys(name for s in self._splits for name in s.manifest.source_names))
        self._source_maps = [_source_map(s.manifest.source_names, self.source_names) for s in self._splits]
        weights = np.array(list(folders.values()), dtype=np.float64)
        rows = weights / weights.sum() / [s.tokens_per_row for s in self._splits]
        self._row_shares = (rows / rows.sum()).tolist()
        self._global_batch_size = global_batch_size
        rows_per_rank = global_batch_size // world_size
        self._mine = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        self._seed = seed
        self._drawn = [0] * len(self._splits)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._data: dict[str, Any] = {
            "fingerprints": [s.manifest.fingerprint for s in self._splits],
            "weights": (weights / weights.sum()).tolist(),
            "split": split,
            "sequence_length": sequence_length,
            "align": align,
            "seed": seed,
        }

    def next(self) -> Batch:
        """This rank's `[global_batch_size / world_size, sequence_length]` rows of the next step, on the CPU."""
        step = [self._draw() for _ in range(self._global_batch_size)][self._mine]
        parts, positions = [], []
        for index, split in enumerate(self._splits):
            here = [position for position, (folder, _) in enumerate(step) if folder == index]
            if here:
                batch = split.batch(np.array([self._row(index, step[position][1]) for position in here]))
                parts.append(self._with_common_sources(batch, index))
                positions += here
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor(positions).argsort()
        return Batch(*(torch.cat(tensors)[order] for tensors in zip(*(vars(part).values() for part in parts))))

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as plain values. The same on every rank, and valid for any number of ranks."""
        return {"data": dict(self._data), "rows_drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position, so that `next` returns what it would have returned there.

        Raises:
            ValueError: the state belongs to other data or another order; the message names both.
        """
        saved = state["data"]
        differences = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self._data.items()
            if saved.get(key) != value
        ]
        if differences:
            raise ValueError(
                f"cannot resume on different data: {'; '.join(differences)}; resume with the data and settings of the "
                "checkpoint, or begin a new run"
            )
        self._drawn = list(state["rows_drawn"])

    def _draw(self) -> tuple[int, int]:
        """The folder of the next row, and how many rows were drawn from that folder before.

        The folder that is furthest behind its share comes next, so any stretch of rows has the shares asked for.
        """
        total = sum(self._drawn) + 1
        behind = [share * total - drawn for share, drawn in zip(self._row_shares, self._drawn)]
        folder = behind.index(max(behind))
        self._drawn[folder] += 1
        return folder, self._drawn[folder] - 1

    def _row(self, folder: int, drawn: int) -> int:
        epoch, position = divmod(drawn, self._splits[folder].num_rows)
        if folder not in self._orders or self._orders[folder][0] != epoch:
            self._orders[folder] = epoch, shuffled(self._splits[folder].num_rows, self._seed, folder, epoch)
        return int(self._orders[folder][1][position])

    def _with_common_sources(self, batch: Batch, folder: int) -> Batch:
        source_ids = self._source_maps[folder][batch.source_ids.long()]
        return Batch(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids, source_ids)


def iterate_split(
    folder: Path | str,
    split: str,
    *,
    sequence_length: int,
    batch_size: int,
    align: int = 64,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """One pass over a split in order, for evaluation.

    Args:
        batch_size: rows of every batch; the last one is filled up with empty rows.
        max_rows: take this many rows, evenly spaced over the split, instead of all.

    Raises:
        ValueError: as `PackedSplit`, or a size that is not positive.
    """
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"batch_size {batch_size} and max_rows {max_rows} must be positive")
    packed = PackedSplit(folder, split, sequence_length=sequence_length, align=align)
    return _batches(packed, batch_size, min(max_rows or packed.num_rows, packed.num_rows))


def shuffled(num_rows: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `num_rows` rows that depends on the key alone, on every platform and with every library version.

    Rows are sorted by a hash (the finaliser of SplitMix64) of their number and the key.
    """
    state = np.uint64(0)
    for part in key:
        state = _mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    with np.errstate(over="ignore"):
        hashes = _mix(np.arange(num_rows, dtype=np.uint64) + state)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _mix(x: Any) -> Any:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _batches(packed: PackedSplit, batch_size: int, num_rows: int) -> Iterator[Batch]:
    rows = np.arange(num_rows) * packed.num_rows // num_rows
    padded = np.full(-(-num_rows // batch_size) * batch_size, EMPTY_ROW, dtype=np.int64)
    padded[:num_rows] = rows
    for start in range(0, len(padded), batch_size):
        yield packed.batch(padded[start : start + batch_size])


def _check_same_tokenizer(folders: list[Any], splits: list[PackedSplit]) -> None:
    first = splits[0].manifest.tokenizer_hash
    for folder, split in zip(folders, splits):
        if split.manifest.tokenizer_hash != first:
            raise ValueError(
                f"{folders[0]} and {folder} were tokenised differently (tokenizer {first[:12]} and "
                f"{split.manifest.tokenizer_hash[:12]}); prepare {folder} again with --tokenizer {folders[0]}"
            )


def _source_map(names: tuple[str, ...], common: tuple[str, ...]) -> torch.Tensor:
    """Index into `common` by index into `names`; the last entry serves index -1, padding."""
    return torch.tensor([*(common.index(name) for name in names), -1], dtype=torch.int16)
