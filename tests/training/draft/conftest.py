"""A language that a model of seconds masters and n-grams do not: fifty words that follow each other in a circle.

No text is long enough to come round twice, so nothing in it ever repeats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockffn.checkpoints.load import load
from blockffn.data.prepare import prepare
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.settings import from_dict, merge
from blockffn.training.config import train_settings
from blockffn.training.draft.settings import DraftTrainSettings
from blockffn.training.loop import train
from tests.training.conftest import SMALL as SMALL_MODEL

SMALL = {
    "data": {"sequence_length": 64, "align": 8},
    "optimizer": {"learning_rate": 0.002},
    "schedule": {"warmup_steps": 3},
    "acceptance": {"prompts": 2, "prompt_tokens": 12, "new_tokens": 24},
    "steps": 8, "batch_size": 8, "log_every": 1, "evaluate_rows": 8, "stored_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="session")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language's texts, prepared."""
    folder = tmp_path_factory.mktemp("circle")
    draw = random.Random(0)
    words = [first + second for first in "bdfgklmnpr" for second in "aeiou"]
    draw.shuffle(words)
    texts = [(draw.randrange(50), draw.randrange(30, 50)) for _ in range(400)]
    lines = [" ".join(words[(start + i) % 50] for i in range(length)) for start, length in texts]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([str(folder / "text.jsonl")], folder / "data", vocab_size=320, valid_fraction=0.1, progress=False)
    return folder / "data"


@pytest.fixture(scope="session")
def target_run(circle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the language."""
    own = {"data": {"folders": {str(circle): 1.0}}, "steps": 60, "log_every": 20, "objectives": {"terms": {
        "activation_locality": None, "chunk_sparsification": None}}}  # fmt: skip
    run = tmp_path_factory.mktemp("target")
    train(train_settings("nano", "blockffn", merge(SMALL_MODEL, own)), run, progress=False)
    return run


@pytest.fixture(scope="session")
def target(target_run: Path) -> BlockFFNForCausalLM:
    return load(target_run)


def settings_of(circle: Path, target_run: Path, **changes: Any) -> DraftTrainSettings:
    base = merge(SMALL, {"target": str(target_run), "data": {"folders": {str(circle): 1.0}}})
    return from_dict(DraftTrainSettings, merge(base, changes))


@pytest.fixture
def settings(circle: Path, target_run: Path) -> Callable[..., DraftTrainSettings]:
    """Settings of a run of seconds; keyword arguments and nested dicts change them."""
    return lambda **changes: settings_of(circle, target_run, **changes)
