"""Hugging Face datasets, from a folder or from the hub. Needs the optional package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockffn.data.json_lines import record_text


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder was saved by `datasets.save_to_disk` or holds parquet files."""
    saved = (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
    return saved or next(folder.rglob("*.parquet"), None) is not None


def read_dataset_folder(
    folder: Path, *, text_field: str = "text", source_field: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """Text and source name (`None` without `source_field`) of each record; of several splits, `train` is read.

    Raises:
        ValueError: `datasets` is missing, there is no split `train`, or a record lacks a field.
    """
    datasets = _import_datasets(f"reading the dataset folder {folder}")
    if next(folder.rglob("*.parquet"), None) is not None:
        dataset = _load(datasets, str(folder), None, "train")
    else:
        dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise ValueError(f"{folder} has no split 'train' but {sorted(dataset)}; give the folder of one split")
        dataset = dataset["train"]
    return _records(dataset, str(folder), text_field, source_field)


def read_hub_dataset(
    name: str, *, text_field: str = "text", source_field: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """Records of a dataset on the hub, given as `name[:config[:split]]`; the split is `train` unless it is named.

    Raises:
        ValueError: `datasets` is missing, the dataset cannot be loaded, or a record lacks a field.
    """
    datasets = _import_datasets(f"there is no file or folder {name!r}, and reading it as a Hugging Face dataset")
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return _records(_load(datasets, repository, config or None, split or "train"), name, text_field, source_field)


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # many libraries' errors have one meaning here: it could not be loaded
        raise ValueError(
            f"cannot load {name!r} (split {split!r}) as a Hugging Face dataset, and it is no file of text: "
            f"{type(error).__name__}: {error}"
        ) from error


def _records(dataset: Any, where: str, text_field: str, source_field: str | None) -> Iterator[tuple[str, str | None]]:
    for number, record in enumerate(dataset):
        yield record_text(record, f"{where}[{number}]", text_field=text_field, source_field=source_field)


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{what} needs the package datasets: pip install 'blockffn[data]'") from None
    return datasets
