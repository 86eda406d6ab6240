"""Two processes on this machine: the same curve as one, under DDP and FSDP2, and checkpoints that change hands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockffn.settings import to_dict
from blockffn.training.config import TrainSettings
from blockffn.training.loop import read_metrics, train

pytestmark = pytest.mark.slow
Settings = Callable[..., TrainSettings]


def torchrun(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*command, "-m", "blockffn", "train", *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def overrides(settings: TrainSettings) -> list[str]:
    """The settings as arguments of the command line."""
    values = to_dict(settings)
    keys = ("steps", "batch_size", "compile", "log_every", "checkpoint_every", "model", "data", "objectives",
            "schedule", "parallel", "micro_batch_size")  # fmt: skip
    return [f"{key}={values[key]}".replace("None", "null").replace("'", '"') for key in keys]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, settings: Settings, parallel: str) -> None:
    chosen = settings(steps=4, parallel=parallel, micro_batch_size=3)
    torchrun(2, *overrides(chosen), "--out", str(tmp_path / "two"), "--device", "cpu")
    train(settings(steps=4), tmp_path / "one", progress=False, device="cpu")
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for name in ("loss", "language_model_loss", "grad_norm", "tls", "cls8", "max_load"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-3), name
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def test_a_run_of_two_processes_resumes_on_one(tmp_path: Path, settings: Settings) -> None:
    chosen = settings(steps=6, parallel="fsdp", checkpoint_every=3)
    torchrun(2, *overrides(chosen), "--out", str(tmp_path / "two"), "--device", "cpu")
    newest = tmp_path / "two" / "checkpoints" / "step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(chosen, tmp_path / "two", progress=False, device="cpu", resume=True)
    train(settings(steps=6), tmp_path / "one", progress=False, device="cpu")
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=2e-3)
