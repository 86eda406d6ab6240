"""Every method trains: a few steps over prepared data, with the objectives of its preset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockffn.presets import METHODS
from blockffn.training.config import TrainSettings
from blockffn.training.loop import train

BASELINES = sorted(set(METHODS) - {"blockffn"})


@pytest.fixture
def records(tmp_path: Path) -> Callable[[TrainSettings], list[dict]]:
    def run(settings: TrainSettings) -> list[dict]:
        train(settings, tmp_path / "run", progress=False, device="cpu")
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("method", BASELINES)
def test_three_steps_of_every_baseline_lower_the_loss(
    method: str, settings: Callable[..., TrainSettings], records: Callable[[TrainSettings], list[dict]], tmp_path: Path
) -> None:
    rows = records(settings(method, steps=3))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (1, 7)


@pytest.mark.parametrize("method", ["topk", "deepseek", "grin"])
def test_the_log_of_a_top_k_method_shows_exactly_its_sparsity(
    method: str, settings: Callable[..., TrainSettings], records: Callable[[TrainSettings], list[dict]]
) -> None:
    rows = records(settings(method, steps=2))
    assert [row["tls"] for row in rows if "tls" in row] == pytest.approx([100 * (1 - 6 / 8)] * 2)


def test_the_load_in_the_log_is_that_of_routed_experts(
    settings: Callable[..., TrainSettings], records: Callable[[TrainSettings], list[dict]]
) -> None:
    """8 experts of which 2 are shared and all 6 others chosen: an even load, though shared experts are not counted."""
    rows = records(settings("deepseek", steps=1, model={"num_experts_per_tok": 8}))
    assert rows[-1]["max_load"] == pytest.approx(1.0)
    assert rows[-1]["dead_experts"] == 0
