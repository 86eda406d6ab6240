"""What the distributed benchmark concludes from its runs, and that a run ends, is timed and goes on as it says."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from distributed import CHECKPOINT_EVERY, LEAST_STEPS, WARM_STEPS, difference, rate, work

from blockffn.data.prepare import prepare

SMALL = {
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_experts": 4, "moe_intermediate_size": 4, "head_dim": 8,
              "intermediate_size": 18},
    "data": {"sequence_length": 32, "align": 8}, "objectives": {"chunk_length": 8}, "compile": False,
}  # fmt: skip


def test_curves_are_compared_over_the_steps_that_both_have() -> None:
    found = difference({3: 2.0, 4: 1.99}, {2: 5.0, 3: 2.0, 4: 2.0})
    assert (found.steps, found.passed) == (2, True)
    assert found.largest == pytest.approx(0.005)
    assert found.mean == pytest.approx(0.0025)
    assert not difference({1: 1.02}, {1: 1.0}).passed


def test_curves_without_a_common_step_are_refused() -> None:
    with pytest.raises(ValueError, match="no step in common"):
        difference({1: 1.0}, {2: 1.0})


def test_the_rate_leaves_out_warming_up_and_checkpoints() -> None:
    seconds = dict.fromkeys(range(2, 31), 0.5)
    seconds |= dict.fromkeys(range(2, WARM_STEPS + 1), 9.0)
    seconds |= {CHECKPOINT_EVERY: 7.0, CHECKPOINT_EVERY + 1: 7.0}
    assert rate(seconds, 100) == pytest.approx(200)


def test_a_run_stops_when_its_time_is_over_and_its_checkpoint_goes_on_as_it_did(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(["red", "green", "blue", "cat", "dog"], k=30)) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "data", vocab_size=300, valid_fraction=0.1, progress=False)

    def run(name: str, steps: int, *, resume: bool = False) -> dict[str, Any]:
        job = {"size": "nano", "device": "cpu", "data": str(tmp_path / "data"), "changes": SMALL, "rows": (4, 2),
               "parallel": "ddp", "steps": steps, "stop_after": None if resume else 0.0, "resume": resume,
               "run": str(tmp_path / name), "result": str(tmp_path / f"{name}.json")}  # fmt: skip
        work(job)
        outcome: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return outcome

    whole = run("whole", 10_000)
    assert whole["steps"] == LEAST_STEPS
    assert [int(step) for step in whole["losses"]] == list(range(1, LEAST_STEPS + 1))
    assert all(seconds > 0 for seconds in whole["step_seconds"].values())
    checkpoint = f"checkpoints/step-{CHECKPOINT_EVERY:08d}"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    resumed = run("resumed", LEAST_STEPS, resume=True)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert min(int(step) for step in resumed["step_seconds"]) == CHECKPOINT_EVERY + 2
