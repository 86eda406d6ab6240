"""Small prepared folders, made once. Tests must not write into them; those that damage one copy it first."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from blockffn.data.prepare import prepare

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "then",
    "façade",
    "über",
    "東京",
    "return",
)


def sentences(num_documents: int, *, seed: int, max_lines: int = 12) -> list[str]:
    """Documents of very different lengths."""
    rng = random.Random(seed)
    lines = [rng.randint(1, max_lines) for _ in range(num_documents)]
    return ["".join(" ".join(rng.choices(WORDS, k=8)) + ".\n" for _ in range(count)) for count in lines]


def write_json_lines(path: Path, texts: Sequence[str], **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents in several shards, a tenth held out."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_json_lines(folder / "cats.jsonl", sentences(200, seed=1))
    prepare([source], folder / "data", vocab_size=300, valid_fraction=0.1, shard_tokens=2000)
    return folder / "data"


@pytest.fixture(scope="session")
def other(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller folder with the tokenizer of `prepared` and short documents."""
    folder = tmp_path_factory.mktemp("other")
    source = write_json_lines(folder / "dogs.jsonl", sentences(60, seed=2, max_lines=3))
    prepare([source], folder / "data", tokenizer=prepared, valid_fraction=0.1)
    return folder / "data"


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "damaged"))
