"""The running Python's standard library as a corpus: about 9 MB of homogeneous source code that every machine has.

The split is leak-free: whole top-level modules are held out, and what repeats them is dropped from the training part.
Generated tables and tests are left out; tables repeat themselves so much that they flatter every measurement.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

TESTS_AND_OTHERS = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test")
TABLES_AND_BUNDLES = ("encodings", "pydoc_data", "ensurepip", "lib2to3")
EXCLUDED_FOLDERS = frozenset({*TESTS_AND_OTHERS, *TABLES_AND_BUNDLES})
HELD_OUT_SHARE = 0.05
SHARED_LINES = 6


def standard_library_texts(split: str | None = None, *, root: Path | None = None) -> Iterator[str]:
    """Source files as text, sorted by path.

    Args:
        split: `train`, `valid`, or `None` for both, `train` first.
        root: folder of a standard library; `None` is the running Python's.

    Raises:
        ValueError: an unknown split, or a Python whose library is not there as source files.
    """
    if split not in (None, "train", "valid"):
        raise ValueError(f"the standard library has no split {split!r}; use 'train' or 'valid'")
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts = standard_library_split(root)
    for name in ("train", "valid") if split is None else (split,):
        for path in parts[name]:
            yield _read_source(path)


@lru_cache(maxsize=4)
def standard_library_split(root: Path) -> dict[str, tuple[Path, ...]]:
    """Files of each split. Deterministic for a given library.

    Top-level modules and packages, in the order of a hash of their names, are held out as long as they stay within 5 %
    of the bytes. A training file that has `SHARED_LINES` consecutive lines in common with a held-out one is dropped.
    """
    texts = {path: text for path in _files(root) if (text := _read_source(path)).strip()}
    if not texts:
        raise ValueError(
            f"no Python source files in {root}; this Python comes without its library's source, name a corpus"
        )
    modules: dict[str, list[Path]] = {}
    for path in texts:
        modules.setdefault(path.relative_to(root).parts[0].removesuffix(".py"), []).append(path)
    remaining = HELD_OUT_SHARE * sum(map(len, texts.values()))
    valid: set[Path] = set()
    for module in sorted(modules, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        size = sum(len(texts[path]) for path in modules[module])
        if size <= remaining:
            remaining -= size
            valid.update(modules[module])
    held_out = {run for path in valid for run in _line_runs(texts[path])}
    train = [path for path in texts if path not in valid and held_out.isdisjoint(_line_runs(texts[path]))]
    return {"train": tuple(train), "valid": tuple(path for path in texts if path in valid)}


def _files(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in EXCLUDED_FOLDERS and not f.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # the build's settings, as a table
                yield Path(parent, name)


def _read_source(path: Path) -> str:
    """Text with its own line ends; empty for the rare file in another encoding."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _line_runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of `SHARED_LINES` consecutive lines, without blank lines and indentation."""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    return zip(*(lines[i:] for i in range(SHARED_LINES)))
