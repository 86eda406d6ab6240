"""Token frequencies of prepared data, and the draft vocabulary that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from blockffn.data.frequencies import (
    count_frequencies,
    most_frequent,
    read_frequencies,
    write_frequencies,
)
from blockffn.data.manifest import load_manifest
from blockffn.data.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frequencies")
    lines = (json.dumps({"text": f"the cat {'sat ' * (i % 5)}on the mat\n" * 3}) for i in range(60))
    (root / "cats.jsonl").write_text("\n".join(lines))
    prepare([root / "cats.jsonl"], root / "data", vocab_size=290, valid_fraction=0.2, shard_tokens=300)
    return root / "data"


def test_every_token_of_a_split_is_counted_over_all_shards(folder: Path) -> None:
    manifest = load_manifest(folder)
    counts = count_frequencies(folder)
    assert len(manifest.splits["train"].shards) > 1
    assert counts.sum() == manifest.splits["train"].tokens
    assert len(counts) == manifest.vocab_size
    by_hand = np.concatenate([np.fromfile(f, dtype=manifest.token_dtype) for f in sorted(folder.glob("train-*.bin"))])
    assert counts[int(by_hand[0])] == (by_hand == by_hand[0]).sum()
    assert count_frequencies(folder, split="valid").sum() == manifest.splits["valid"].tokens


def test_an_unknown_split_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'"):
        count_frequencies(folder, split="test")


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    counts = torch.tensor([4, 0, 9])
    write_frequencies(tmp_path / "counts.json", counts)
    assert read_frequencies(tmp_path / "counts.json", vocab_size=3).tolist() == [4, 0, 9]
    with pytest.raises(ValueError, match="counts 3 tokens, the model has 4"):
        read_frequencies(tmp_path / "counts.json", vocab_size=4)
    (tmp_path / "other.json").write_text('{"format": "something", "counts": [1]}')
    with pytest.raises(ValueError, match="'something'"):
        read_frequencies(tmp_path / "other.json", vocab_size=1)
    with pytest.raises(ValueError, match="cannot be read"):
        read_frequencies(tmp_path / "missing.json", vocab_size=1)


def test_the_most_frequent_tokens_come_first_and_some_are_always_in() -> None:
    counts = torch.tensor([5, 9, 0, 5, 7])
    assert most_frequent(counts, 3).tolist() == [1, 4, 0]
    assert most_frequent(counts, 3, always=(2,)).tolist() == [1, 4, 2]
    with pytest.raises(ValueError, match="must have 1 to 5 tokens, got 6"):
        most_frequent(counts, 6, always=(2,))
