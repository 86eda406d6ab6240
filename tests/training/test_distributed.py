"""Two processes on this machine: the same curve as one, under DDP and FSDP2, and checkpoints that change hands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockffn.settings import to_dict
from blockffn.training.config import TrainSettings
from blockffn.training.loop import train
from blockffn.training.results import read_metrics

pytestmark = pytest.mark.slow
Settings = Callable[..., TrainSettings]


def train_on_two(settings: TrainSettings, out: Path) -> None:
    """Train in two processes, from the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "blockffn"]
    command += ["train", *overrides(settings), "--out", str(out), "--device", "cpu"]
    # Without the GPUs that there may be: fewer than two would do, and FSDP looks for one a process even on the CPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "CUDA_VISIBLE_DEVICES": ""}
    for attempt in (1, 2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        if done.returncode == 0:
            return
        # The process group's own threads abort now and then while Python shuts down, after the work is done.
        if attempt == 2 or "(SIGABRT)" not in done.stderr:
            pytest.fail(done.stderr)
        shutil.rmtree(out)


def overrides(settings: TrainSettings) -> list[str]:
    """The settings as arguments of the command line."""
    values = to_dict(settings)
    keys = ("steps", "batch_size", "compile", "log_every", "checkpoint_every", "model", "data", "objectives",
            "schedule", "precision", "evaluate_every", "optimizer", "parallel", "micro_batch_size")  # fmt: skip
    return [f"{key}={values[key]}".replace("None", "null").replace("'", '"') for key in keys]


@pytest.mark.parametrize(
    ("parallel", "precision", "tolerance"),
    [("ddp", "float32", 1e-3), ("fsdp", "float32", 1e-3), ("fsdp", "bfloat16", 2e-2)],
)
def test_two_processes_give_the_losses_of_one(
    tmp_path: Path, settings: Settings, parallel: str, precision: str, tolerance: float
) -> None:
    same = {"steps": 4, "evaluate_every": 2, "precision": precision, "optimizer": {"learning_rate": 1e-3}}
    names = ["loss", "language_model_loss", "tls"]
    if precision == "bfloat16":
        # Rounded logits under a steep sigmoid give other gradients, and the first steps of Adam take only their signs.
        same |= {"objectives": {"sharpness": 5.0}, "optimizer": {"learning_rate": 3e-4}}
    else:
        names += ["grad_norm", "cls8", "max_load"]
    chosen = settings(parallel=parallel, micro_batch_size=3, **same)
    train_on_two(chosen, tmp_path / "two")
    train(settings(**same), tmp_path / "one", progress=False, device="cpu")
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for name in names:
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=tolerance), name
    assert two[3]["heldout_loss"] == pytest.approx(one[3]["heldout_loss"], rel=tolerance)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def test_a_run_of_two_processes_resumes_on_one(tmp_path: Path, settings: Settings) -> None:
    chosen = settings(steps=6, parallel="fsdp", checkpoint_every=3)
    train_on_two(chosen, tmp_path / "two")
    newest = tmp_path / "two" / "checkpoints" / "step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(chosen, tmp_path / "two", progress=False, device="cpu", resume=True)
    train(settings(steps=6), tmp_path / "one", progress=False, device="cpu")
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=2e-3)
