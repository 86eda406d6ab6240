"""A suite as a user runs it, with a stand-in for the trainer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from blockffn.experiments.agreement import resolved_settings
from blockffn.experiments.command import main
from blockffn.experiments.suite import Experiment

ROOT = Path(__file__).parents[2]
Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path, data_folder: Path) -> Start:
    """Runs a suite of the given experiments in `tmp_path` and returns its exit status."""
    configs = tmp_path / "configs"
    configs.mkdir()

    def start(experiments: list[Experiment], *arguments: str) -> int:
        for e in experiments:
            text = yaml.safe_dump(resolved_settings(e, data_folder)) if e.method in ("blockffn", "dense") else ""
            (configs / f"{e.name}.yaml").write_text(text)
        given = ["--data", str(data_folder), "--cpu", "--size", "nano", "--work", str(tmp_path / "work"), *arguments]
        stub = (sys.executable, str(Path(__file__).with_name("stub_program.py")), str(configs))
        return main(lambda size: experiments, "a suite", given, program=stub)

    return start


def run(name: str, seed: int = 1, *, method: str = "blockffn", changes: tuple[str, ...] = ()) -> Experiment:
    return Experiment("s", name, name, method=method, size="nano", seed=seed, changes=changes)


def record(tmp_path: Path, name: str) -> dict[str, object]:
    return json.loads((tmp_path / "work" / "records" / "s" / name / "record.json").read_text())


def test_a_run_becomes_a_record_and_is_skipped_the_next_time(
    tmp_path: Path, start: Start, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([run("a"), run("b", 2)], "--per-gpu", "2") == 0
    assert record(tmp_path, "a")["tokens"] == 4096
    folder = tmp_path / "work" / "records" / "s" / "a"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "evaluation.json", "evidence.json", "record.json"
    }  # fmt: skip
    assert str(data_folder.parent) not in "".join(path.read_text() for path in folder.iterdir())
    before = (folder / "record.json").stat().st_mtime_ns
    capsys.readouterr()
    assert start([run("a"), run("b", 2)]) == 0
    assert "a: recorded already" in capsys.readouterr().out
    assert (folder / "record.json").stat().st_mtime_ns == before


def test_a_record_of_other_settings_is_an_error_that_names_them(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([run("a")]) == 0
    assert start([run("a", changes=("optimizer.learning_rate=0.002",))]) == 1
    assert "optimizer.learning_rate: found 0.005, wanted 0.002" in capsys.readouterr().out


def test_what_only_the_machine_decides_does_not_matter(start: Start) -> None:
    assert start([run("a")]) == 0
    assert start([run("a", changes=("compile=false", "micro_batch_size=2"))]) == 0


def test_a_failure_is_told_and_does_not_stop_the_others(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([run("bad", 13), run("unknown", method="nothing-yet"), run("good")]) == 1
    out = capsys.readouterr().out
    assert "the loss is nan at step 3" in out
    assert "unknown method 'nothing-yet'" in out
    assert "1 of 3 recorded, 2 failed, 0 left" in out
    assert record(tmp_path, "good")["outcome"] == "done"
    assert record(tmp_path, "bad")["error"] == "error: the loss is nan at step 3"


def test_time_up_leaves_a_checkpoint_from_which_the_next_invocation_goes_on(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    waits_for = tmp_path / "work" / "s" / "long" / "waiting"
    stop_when(waits_for.exists)
    assert start([run("long", 7), run("next")]) == 3
    assert "0 of 2 recorded, 0 failed, 2 left" in capsys.readouterr().out
    assert start([run("long", 7), run("next")]) == 0
    log = (tmp_path / "work" / "s" / "long.log").read_text()
    assert log.count("train --preset nano") == 1
    assert log.count("train --resume") == 1


def test_a_half_made_run_of_other_settings_is_not_resumed(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_when((tmp_path / "work" / "s" / "long" / "waiting").exists)
    assert start([run("long", 7)]) == 3
    assert start([run("long", 7, changes=("steps=5",))]) == 1
    assert "steps: found 900, wanted 5" in capsys.readouterr().out


def test_zero_shot_scores_are_added_to_a_record_that_lacks_them(tmp_path: Path, start: Start) -> None:
    assert start([run("a")]) == 0
    assert start([run("a")], "--eval-data", str(tmp_path)) == 0
    scores = json.loads((tmp_path / "work" / "records" / "s" / "a" / "zero_shot.json").read_text())
    assert scores["tasks"] == {"blimp": {"accuracy": 60.5}}


def test_evidence_is_part_of_a_record_and_added_to_one_that_lacks_it(tmp_path: Path, start: Start) -> None:
    assert start([run("a")]) == 0
    path = tmp_path / "work" / "records" / "s" / "a" / "evidence.json"
    assert json.loads(path.read_text()) == {"reuse_ratio": 91.5}
    path.unlink()
    (tmp_path / "work" / "s" / "a" / "evidence.json").unlink()
    assert start([run("a")]) == 0
    assert json.loads(path.read_text()) == {"reuse_ratio": 91.5}


def test_a_record_without_evidence_is_complete_where_its_model_is_gone(tmp_path: Path, start: Start) -> None:
    assert start([run("a")]) == 0
    path = tmp_path / "work" / "records" / "s" / "a" / "evidence.json"
    path.unlink()
    shutil.rmtree(tmp_path / "work" / "s" / "a")
    assert start([run("a")]) == 0
    assert not path.exists()


def test_a_run_that_was_stopped_before_its_record_is_recorded_the_next_time(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([run("a")]) == 0
    shutil.rmtree(tmp_path / "work" / "records" / "s" / "a")
    assert start([run("a")], "--list") == 0
    assert not (tmp_path / "work" / "records" / "s" / "a").exists()
    assert start([run("a")]) == 0
    assert "a: done before, now recorded" in capsys.readouterr().out
    assert record(tmp_path, "a")["outcome"] == "done"


def test_a_list_shows_commands_and_runs_none(tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start([run("a"), run("b", 2)], "--list", "--only", "b", "steps=3") == 0
    out = capsys.readouterr().out
    assert "train --preset nano --method blockffn" in out
    assert "seed=2 steps=3" in out
    assert "seed=1" not in out
    assert not (tmp_path / "work").exists()


def stop_when(condition: Callable[[], bool]) -> None:
    """Ctrl-C, as soon as the condition holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_a_real_suite_from_a_source_checkout(tmp_path: Path, data_folder: Path) -> None:
    """Train and evaluate two methods for a few steps, then write their page."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    small = ["model.num_hidden_layers=1", "batch_size=2", "compile=false", "log_every=1"]

    def python(script: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = python("quality.py", "--size", "nano", "--cpu", "--steps", "3", "--data", str(data_folder), "--per-gpu", "2",
                 "--only", "blockffn-seed1", "--only", "dense-seed1", *small)  # fmt: skip
    assert "2 of 2 recorded" in out
    records = tmp_path / "runs" / "experiments" / "records"
    assert sum(path.stat().st_size for path in (records / "quality" / "nano-blockffn-seed1").iterdir()) < 40_000
    assert (records / "quality" / "nano-blockffn-seed1" / "evidence.json").is_file()
    assert not (records / "quality" / "nano-dense-seed1" / "evidence.json").exists()
    page = tmp_path / "page" / "results.md"
    python("results.py", "--size", "nano", "--records", str(records), "--out", str(page))
    assert "| BlockFFN |" in page.read_text()
    assert "### Magnitude by depth" in page.read_text()
    assert (page.parent / "images" / "results-evidence-magnitude-by-depth.png").stat().st_size > 10_000
    assert (page.parent / "images" / "results-curves.png").stat().st_size > 10_000
