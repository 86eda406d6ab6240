from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockffn.data.prepare import prepare
from blockffn.settings import merge
from blockffn.training.config import TrainSettings, train_settings

SMALL = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 8, "head_dim": 8,
              "intermediate_size": 45},
    "data": {"sequence_length": 64, "align": 8},
    "objectives": {"chunk_length": 8},
    "schedule": {"warmup_steps": 3},
    "steps": 8, "batch_size": 8, "compile": False, "log_every": 1, "checkpoint_every": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents over a small vocabulary, prepared."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randrange(10, 90))) for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([str(folder / "text.jsonl")], folder / "data", vocab_size=300, valid_fraction=0.1, progress=False)
    return folder / "data"


@pytest.fixture
def settings(data_folder: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of seconds; keyword arguments and nested dicts change them."""

    def make(method: str = "blockffn", **changes: Any) -> TrainSettings:
        base = merge(SMALL, {"data": {"folders": {str(data_folder): 1.0}}})
        return train_settings("nano", method, merge(base, changes))

    return make
