"""Where our lm-evaluation-harness tasks get their records: a local file, a folder of files, or a dataset on the hub.

The harness calls `load` with a task's `dataset_kwargs` and with what `--metadata` holds. `data` there, or
`BLOCKFFN_EVAL_DATA` in the environment, names the place; without either, the hub's own dataset is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockffn.data.compressed import COMPRESSED_SUFFIXES
from blockffn.data.json_lines import read_records

ENVIRONMENT = "BLOCKFFN_EVAL_DATA"


def load(*, task: str, hub: str, field: str | None = None, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The harness's dataset: `{"test": Dataset}`.

    Args:
        task: name of the file in a folder: `{task}.jsonl`, plain or compressed.
        hub: dataset to use if no place is named, as `repository[:configuration[:split]]`; configuration `*` is all.
        field: keep only the records of this field of BLiMP.
        data: a JSON-lines file, a folder, or a hub dataset written as `hub` is.

    Raises:
        ValueError: there is no such file, or no record is left.
    """
    import datasets

    place = data or os.environ.get(ENVIRONMENT) or hub
    records = list(_local(Path(place), task) if Path(place).exists() else _from_hub(datasets, place))
    if field is not None:
        records = [record for record in records if record["field"].replace("/", "_") == field]
    if not records:
        raise ValueError(f"{place} holds no record for {task}" + (f" in field {field}" if field else ""))
    return {"test": datasets.Dataset.from_list(records)}


def _local(place: Path, task: str) -> Iterator[dict[str, Any]]:
    names = [f"{task}.jsonl{suffix}" for suffix in ("", *COMPRESSED_SUFFIXES)]
    files = [place] if place.is_file() else [place / name for name in names if (place / name).is_file()]
    if not files:
        raise ValueError(f"{place} holds none of {', '.join(names)}")
    for _, record in read_records(files[0]):
        yield record


def _from_hub(datasets: Any, place: str) -> Iterator[dict[str, Any]]:
    repository, _, rest = place.partition(":")
    configuration, _, split = rest.partition(":")
    names = datasets.get_dataset_config_names(repository) if configuration == "*" else [configuration or None]
    for name in names:
        yield from datasets.load_dataset(repository, name, split=split or "test")
