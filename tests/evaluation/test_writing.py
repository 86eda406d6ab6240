from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from blockffn.data.prepare import prepare
from blockffn.data.tokenizer import load_tokenizer
from blockffn.evaluation.writing import openings_of, write_documents
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import preset_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("writing")
    draw = random.Random(0)
    lines = [" ".join(draw.choice(["red", "cat", "runs", "two"]) for _ in range(80)) for _ in range(60)]
    (made / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([made / "text.jsonl"], made / "data", vocab_size=280, valid_fraction=0.1)
    return made / "data"


def write(folder: Path, *, count: int = 3, **options: int) -> list[str]:
    torch.manual_seed(0)
    model = BlockFFNForCausalLM(preset_config("nano", "dense", hidden_size=32, num_hidden_layers=1, vocab_size=280))
    openings = openings_of(folder, count=count, length=4)
    return list(write_documents(model, load_tokenizer(folder), openings, **{"max_new_tokens": 8, **options}))


def test_documents_begin_with_the_text_and_go_on_differently_each_time(folder: Path) -> None:
    texts = write(folder, count=200, batch_size=64)
    assert len(texts) == 200
    assert len(set(texts)) > 190
    openings = {
        load_tokenizer(folder).decode(row, skip_special_tokens=True) for row in openings_of(folder, count=200, length=4)
    }
    assert all(any(text.startswith(opening) for opening in openings) for text in texts)


def test_the_same_seed_writes_the_same(folder: Path) -> None:
    assert write(folder, seed=1) == write(folder, seed=1) != write(folder, seed=2)


def test_what_exceeds_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="4 tokens and 1021 new ones exceed the model's context of 1024"):
        write(folder, max_new_tokens=1021)
