"""How often each token occurs in prepared data, and the reduced draft vocabulary that follows (FR-Spec).

A draft that scores only the most frequent tokens reads a fraction of the head; verification keeps the full vocabulary,
so nothing is lost but the acceptance of rare tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blockffn.data.manifest import load_manifest

FORMAT = "blockffn-token-frequencies"


def count_frequencies(folder: Path | str, *, split: str = "train") -> Tensor:
    """Occurrences `[V]` (int64) of each token in a split of a prepared folder.

    Raises:
        ValueError: the folder is damaged or has no such split.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if split not in manifest.splits:
        raise ValueError(f"{folder} has no split {split!r} but {sorted(manifest.splits)}")
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for shard in manifest.splits[split].shards:
        tokens = np.memmap(folder / f"{shard.name}.bin", dtype=dtype, mode="r")
        counts += np.bincount(tokens, minlength=manifest.vocab_size)
    return torch.from_numpy(counts)


def write_frequencies(path: Path | str, counts: Tensor) -> None:
    """Write counts `[V]` as JSON."""
    values = {"format": FORMAT, "vocab_size": len(counts), "counts": counts.tolist()}
    Path(path).write_text(json.dumps(values), encoding="utf-8")


def read_frequencies(path: Path | str, *, vocab_size: int) -> Tensor:
    """Counts `[V]` from a file.

    Raises:
        ValueError: not such a file, or of another vocabulary.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        found, counts = values["format"], torch.tensor(values["counts"], dtype=torch.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as token frequencies ({error})") from None
    if found != FORMAT:
        raise ValueError(f"{path} is {found!r}, not {FORMAT!r}")
    if len(counts) != vocab_size:
        raise ValueError(f"{path} counts {len(counts)} tokens, the model has {vocab_size}; count with its tokenizer")
    return counts


def most_frequent(counts: Tensor, size: int, *, always: tuple[int, ...] = ()) -> Tensor:
    """Ids `[size]` of the most frequent tokens, most frequent first; of equal counts the smaller id first.

    Args:
        always: ids that are in whatever their count, such as the end of a text.
    """
    if not len(always) <= size <= len(counts):
        raise ValueError(f"a draft vocabulary must have {len(always)} to {len(counts)} tokens, got {size}")
    order = counts.clone()
    order[list(always)] = torch.iinfo(torch.int64).max
    chosen = order.sort(descending=True, stable=True).indices[:size]
    return chosen[counts[chosen].sort(descending=True, stable=True).indices]
