from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from blockffn.data.standard_library import SHARED_LINES, standard_library_split, standard_library_texts

ROOT = Path(sysconfig.get_paths()["stdlib"])
LICENCE_HEADER = 600


def modules(paths: tuple[Path, ...]) -> set[str]:
    return {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in paths}


def test_no_module_is_in_both_splits() -> None:
    split = standard_library_split(ROOT)
    assert not modules(split["train"]) & modules(split["valid"])


def test_about_five_percent_of_the_bytes_are_held_out() -> None:
    size = {name: sum(path.stat().st_size for path in paths) for name, paths in standard_library_split(ROOT).items()}
    assert 0.04 < size["valid"] / sum(size.values()) < 0.06
    assert size["train"] > 4e6


def test_splits_share_no_run_of_text_longer_than_a_licence_header() -> None:
    """Independent of how the split is made: any shared run of 2 N characters holds an aligned block of N characters."""
    length = LICENCE_HEADER // 2
    held_out = set()
    for text in standard_library_texts("valid"):
        text = " ".join(text.split())
        held_out.update(text[i : i + length] for i in range(len(text) - length + 1))
    assert held_out
    shared = [
        text[i : i + length]
        for text in (" ".join(text.split()) for text in standard_library_texts("train"))
        for i in range(0, len(text) - length + 1, length)
        if text[i : i + length] in held_out
    ]
    assert not shared


def test_tests_tables_and_installed_packages_are_left_out() -> None:
    split = standard_library_split(ROOT)
    parts = {part for paths in split.values() for path in paths for part in path.relative_to(ROOT).parts}
    assert not parts & {"test", "tests", "encodings", "pydoc_data", "ensurepip", "site-packages", "__pycache__"}
    assert "argparse.py" in parts


def make_library(root: Path, **modules: str) -> Path:
    root.mkdir()
    for name, text in modules.items():
        (root / f"{name}.py").write_text(text)
    return root


def test_a_training_file_that_repeats_a_held_out_one_is_dropped(tmp_path: Path) -> None:
    texts = {f"m{i}": "".join(f"value_{i}_{line} = {line}\n" for line in range(40)) for i in range(30)}
    held_out = standard_library_split(make_library(tmp_path / "a", **texts))["valid"][0]
    lines = held_out.read_text().splitlines()
    names = {name: "".join(f"other_{name}_{i} = 1\n" for i in range(20)) for name in ("copy", "quote")}
    texts["copy_of_it"] = names["copy"] + "\n\n".join(f"    {line}" for line in lines[:SHARED_LINES])
    texts["short_quote"] = names["quote"] + "\n".join(lines[: SHARED_LINES - 1])
    split = standard_library_split(make_library(tmp_path / "b", **texts))
    assert held_out.stem in {path.stem for path in split["valid"]}
    train = {path.stem for path in split["train"]}
    assert "copy_of_it" not in train
    assert "short_quote" in train


def test_both_splits_are_read_without_naming_one(tmp_path: Path) -> None:
    texts = {f"m{i}": f"x = {i}\n" * 30 for i in range(30)}
    root = make_library(tmp_path / "a", **texts)
    split = standard_library_split(root)
    assert len(list(standard_library_texts(root=root))) == len(split["train"]) + len(split["valid"])


def test_a_python_without_source_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python source files in"):
        next(standard_library_texts("train", root=tmp_path))


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        next(standard_library_texts("dev"))
