from __future__ import annotations

from pathlib import Path

import pytest

from blockffn.data.documents import read_documents

datasets = pytest.importorskip("datasets")
TEXTS = ["one", "two"]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert [(d.text, d.source) for d in read_documents(tmp_path / "saved")] == [("one", "saved"), ("two", "saved")]


def test_of_several_saved_splits_the_training_split_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [d.text for d in read_documents(tmp_path / "saved")] == ["train"]


def test_saved_splits_without_a_training_split_are_an_error(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split 'train' but \['test'\]"):
        list(read_documents(tmp_path / "saved"))


def test_a_folder_of_parquet_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "train-00000.parquet")
    datasets.Dataset.from_dict({"text": ["held out"]}).to_parquet(folder / "test-00000.parquet")
    assert [d.text for d in read_documents(folder)] == TEXTS


def test_a_record_without_the_field_is_named_by_number(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved\[0\]: no field 'text'; the fields there are \['body'\]"):
        list(read_documents(tmp_path / "saved"))


def test_a_dataset_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot load 'some/corpus' \(split 'test'\).*no network"):
        list(read_documents("some/corpus::test"))


def test_an_id_names_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("some/corpus", "some/corpus:small", "some/corpus:small:validation"):
        assert next(read_documents(name)).source == name
    assert calls == [
        ("some/corpus", None, "train"),
        ("some/corpus", "small", "train"),
        ("some/corpus", "small", "validation"),
    ]
