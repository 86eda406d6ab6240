"""A run from settings to a saved model: it learns, stops and resumes, and does not depend on how a step is split."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockffn.training.checkpoint import CheckpointError, checkpoint_folders
from blockffn.training.config import TrainSettings
from blockffn.training.loop import DivergedError, train
from blockffn.training.results import read_metrics
from blockffn.training.run_log import hold_folder

Settings = Callable[..., TrainSettings]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock."""
    return {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}


def test_a_run_learns_logs_and_leaves_a_model_that_loads(tmp_path: Path, settings: Settings) -> None:
    result = train(settings(steps=40, evaluate_every=40), tmp_path, progress=False)
    records = read_metrics(tmp_path)
    assert not result.interrupted
    assert [r["step"] for r in records] == list(range(1, 41))
    assert records[-1]["language_model_loss"] < records[0]["language_model_loss"] - 1
    last = records[-1]
    assert set(last["terms"]) == {"activation_locality", "chunk_sparsification"}
    assert 0 < last["cls8"] <= last["tls"] < 100
    assert last["loss"] == pytest.approx(
        last["language_model_loss"] + sum(last["coefficients"][n] * last["terms"][n] for n in last["terms"])
    )
    assert 0 < last["heldout_loss"] < 10
    assert list((tmp_path / "tensorboard").iterdir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer("red green blue")["input_ids"]])
    assert model(ids).logits.isfinite().all()


ADAPTIVE = {"kind": "adaptive", "initial": 0.1, "hold_steps": 4, "adjust_every": 2, "rule": "reference"}


@pytest.mark.parametrize("term", [{}, ADAPTIVE], ids=["preset", "adaptive"])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(
    tmp_path: Path, settings: Settings, term: dict[str, Any]
) -> None:
    chosen = settings(steps=12, objectives={"chunk_length": 8, "terms": {"chunk_sparsification": term}})
    train(chosen, tmp_path / "whole", progress=False)

    def interrupt(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(chosen, tmp_path / "parts", progress=False, on_step=interrupt)
    assert stopped.interrupted
    assert stopped.step in (6, 7)
    resumed = train(chosen, tmp_path / "parts", progress=False, resume=True)
    assert resumed.step == 12
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [comparable(r) for r in parts] == [comparable(r) for r in whole]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / p / "model").state_dict() for p in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_between_log_lines_logs_the_same_means(tmp_path: Path, settings: Settings) -> None:
    chosen = settings(steps=12, log_every=5)
    train(chosen, tmp_path / "whole", progress=False)
    stop = [7]
    train(
        chosen,
        tmp_path / "parts",
        progress=False,
        on_step=lambda s: os.kill(os.getpid(), signal.SIGTERM) if s in stop else None,
    )
    train(chosen, tmp_path / "parts", progress=False, resume=True)
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [comparable(r) for r in parts] == [comparable(r) for r in whole]


def test_the_loss_does_not_depend_on_micro_batches(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=3), tmp_path / "whole", device="cpu", progress=False)
    train(settings(steps=3, micro_batch_size=3), tmp_path / "split", device="cpu", progress=False)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    whole, split = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "split")
    assert [r["grad_norm"] for r in split] == pytest.approx([r["grad_norm"] for r in whole], rel=1e-4)
    # One expert of one token that rounding switches on or off is 0.013 percent here.
    assert [r["tls"] for r in split] == pytest.approx([r["tls"] for r in whole], abs=0.04)


def test_a_dense_run_has_no_terms_and_no_sparsity(tmp_path: Path, settings: Settings) -> None:
    train(settings("dense", steps=3), tmp_path, progress=False)
    last = read_metrics(tmp_path)[-1]
    assert last["terms"] == {}
    assert last["tls"] is None
    assert "dead_experts" not in last


def test_bfloat16_stays_near_float32(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=3), tmp_path / "a", progress=False)
    train(settings(steps=3, precision="bfloat16"), tmp_path / "b", progress=False)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=0.03)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="already holds a run"):
        train(settings(steps=1), tmp_path, progress=False)


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        train(settings(), tmp_path, progress=False, resume=True)


def test_old_checkpoints_are_deleted(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=5, checkpoint_every=1, keep_checkpoints=2), tmp_path, progress=False)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000004", "step-00000005"]


def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import checkpoint as dcp

    save, calls = dcp.save, []

    def save_until_full(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["checkpoint_id"])
        if len(calls) == 2:
            (Path(kwargs["checkpoint_id"]) / "half-written").write_bytes(b"x" * 10)
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", save_until_full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000002 is intact"):
        train(settings(steps=6, checkpoint_every=2), tmp_path, progress=False)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(dcp, "save", save)
    assert train(settings(steps=6, checkpoint_every=2), tmp_path, progress=False, resume=True).step == 6


def test_a_disk_that_really_is_full_is_explained(tmp_path: Path, settings: Settings) -> None:
    """No stand-in: the operating system refuses to write files beyond a size."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def shrink(step: int) -> None:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"File too large.*step-00000002 is intact"):
            train(settings(steps=6, checkpoint_every=2), tmp_path, progress=False, on_step=shrink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=2), tmp_path, progress=False)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(settings(steps=4, model={"num_experts": 4}), tmp_path, progress=False, resume=True)
    extra = {"chunk_length": 8, "terms": {"l1": {"kind": "constant", "value": 0.1}}}
    with pytest.raises(ValueError, match="objectives cannot change on resume"):
        train(settings(steps=4, objectives=extra), tmp_path, progress=False, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before
    assert train(settings(steps=4), tmp_path, progress=False, resume=True).step == 4


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path, settings: Settings) -> None:
    with hold_folder(tmp_path), pytest.raises(ValueError, match="another process is training in"):
        train(settings(steps=1), tmp_path, progress=False)


def test_the_model_knows_the_tokens_of_the_data(tmp_path: Path, settings: Settings, data_folder: Path) -> None:
    train(settings(steps=1), tmp_path, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)  # fmt: skip


def test_held_out_loss_is_logged_at_its_own_steps(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=7, log_every=5, evaluate_every=3), tmp_path, progress=False)
    assert [r["step"] for r in read_metrics(tmp_path) if "heldout_loss" in r] == [3, 6, 7]


def test_a_coefficient_that_observes_nothing_is_refused_at_once(tmp_path: Path, settings: Settings) -> None:
    term = {"kind": "set_point", "initial": 0.05, "target": 90.0, "observes": "tlss"}
    objectives = {"chunk_length": 8, "terms": {"chunk_sparsification": term}}
    with pytest.raises(ValueError, match="observes 'tlss'; did you mean 'tls'"):
        train(settings(objectives=objectives), tmp_path, progress=False)


def test_a_truncated_checkpoint_is_named(tmp_path: Path, settings: Settings) -> None:
    train(settings(steps=4, checkpoint_every=2), tmp_path, progress=False)
    newest = checkpoint_folders(tmp_path)[-1]
    largest = max((f for f in newest.iterdir()), key=lambda f: f.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{largest.name} is truncated.*resume from step-00000002"):
        train(settings(steps=6), tmp_path, progress=False, resume=True)


def test_the_set_point_controller_drives_the_run(tmp_path: Path, settings: Settings) -> None:
    term = {"kind": "set_point", "initial": 0.05, "target": 90.0, "interval": 5, "warmup_steps": 0}
    chosen = settings(steps=20, objectives={"chunk_length": 8, "terms": {"chunk_sparsification": term}})
    train(chosen, tmp_path, progress=False)
    used = [r["coefficients"]["chunk_sparsification"] for r in read_metrics(tmp_path)]
    assert used[0] == pytest.approx(0.05)
    assert used[-1] > 0.05


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, settings: Settings
) -> None:
    chosen = settings(steps=60, checkpoint_every=1, optimizer={"learning_rate": 1e30, "gradient_clip": 1e30})
    with pytest.raises(DivergedError, match=r"the loss is .* at step \d+; lower optimizer.learning_rate"):
        train(chosen, tmp_path, progress=False)
    assert checkpoint_folders(tmp_path)
