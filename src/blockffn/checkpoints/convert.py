"""Writes a model folder anew: quantised, in another dtype, in other shards. A folder is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blockffn.checkpoints.load import load, model_folder
from blockffn.checkpoints.publish import check_publishable, write_published
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import attach, is_packed, pack_model, stored_weights
from blockffn.ops.quantization import StoredWeight

# What travels beside the weights. Programs (*.py) do not.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "*.md",
)  # fmt: skip


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "ours",
    quantization: BlockFFNQuantizationConfig | None = None,
    dtype: torch.dtype | str = "auto",
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> list[StoredWeight]:
    """Write the model of `source`, which may be anything that `load` opens, to the new folder `out` as safetensors.

    Every weight is checked to be finite.

    Args:
        to: `ours`, or `published`: names, shapes and configuration of the SparseLLM/BlockFFN repositories.
        quantization: what is packed; `None` leaves all weights as they are.
        dtype: of the weights that are not packed.
        max_shard_size: largest file, such as `15MB`. A single tensor that is larger gets a file of its own.
        progress: show bars.

    Returns:
        A line for each tensor written.

    Raises:
        ValueError: `source` is no model or damaged, it cannot be written as asked, `out` exists, or a weight is NaN.
    """
    if to not in ("ours", "published"):
        raise ValueError(f"a model is written as ours or published, not as {to!r}")
    model = load(source, dtype=dtype, check_finite=True, progress=progress)
    packed = is_packed(model)
    if packed and quantization is not None:
        raise ValueError(f"{source} is quantised already; quantise the model that it was made from")
    if to == "published":
        if packed or quantization is not None:
            raise ValueError("the published layout has no quantised weights; convert the model that is not quantised")
        check_publishable(model)
    rows = stored_weights(model, {}) if quantization is None else pack_model(model, quantization, progress=progress)
    if quantization is not None:
        attach(model, quantization)
    with new_folder(out) as folder:
        if to == "published":
            write_published(model, folder, max_shard_size=max_shard_size)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companions(model_folder(source), folder)
    return rows


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends, and vanishes when it fails.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; name a new folder, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, licence and card of a model to `out`, unless a file of that name is there."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)


def receipt(rows: list[StoredWeight]) -> dict[str, Any]:
    """Plain data for `--json`: every tensor, and the total of bytes."""
    return {
        "bytes": sum(row.num_bytes for row in rows),
        "tensors": [
            {"name": row.name, "shape": list(row.shape), "format": row.format, "bytes": row.num_bytes,
             "padding_bytes": row.padding_bytes, "relative_error": row.error}
            for row in rows
        ],
    }  # fmt: skip
