from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from blockffn.experiments.schedule import Task, device_slots, run_tasks


def task(folder: Path, name: str, *codes: str) -> Task:
    return Task(name, [(str(i), [sys.executable, "-c", code]) for i, code in enumerate(codes)], folder / f"{name}.log")


def quiet(line: str) -> None:
    """Says nothing."""


def test_slots_alternate_between_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(2, 2)] == ["0", "1", "0", "1"]


def test_slots_stay_within_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(2, 1)] == ["4", "6"]
    with pytest.raises(ValueError, match="names only 2"):
        device_slots(3, 1)


def test_no_gpu_is_hidden_gpus() -> None:
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(0, 2)] == ["", ""]


def test_commands_of_a_task_run_in_order_and_then_it_is_finished(tmp_path: Path) -> None:
    one = task(tmp_path, "a", "print('first')", "print('second')")
    finished = []
    one.finish = lambda: finished.append("a")
    outcome = run_tasks([one], [{}], say=quiet)
    assert outcome.done == finished == ["a"]
    lines = [line for line in (tmp_path / "a.log").read_text().splitlines() if not line.startswith("$")]
    assert lines == ["first", "second"]


def test_no_more_tasks_run_at_once_than_there_are_slots(tmp_path: Path) -> None:
    code = (
        f"import os, time; from pathlib import Path; place = Path({str(tmp_path)!r}) / os.environ['PLACE']; "
        "place.mkdir(); time.sleep(0.3); place.rmdir()"  # a second task in the same place fails
    )
    tasks = [task(tmp_path, f"t{i}", code) for i in range(4)]
    outcome = run_tasks(tasks, [{"PLACE": "x"}, {"PLACE": "y"}], say=quiet)
    assert sorted(outcome.done) == ["t0", "t1", "t2", "t3"], outcome.failed


def test_a_failure_has_the_tail_of_its_log_and_ends_only_its_own_task(tmp_path: Path) -> None:
    bad = task(tmp_path, "bad", "import sys; print('reason'); sys.exit(2)", "print('never')")
    told = []
    bad.fail = told.append
    outcome = run_tasks([bad, task(tmp_path, "good", "pass")], [{}], say=quiet)
    assert outcome.done == ["good"]
    assert told[0].endswith("reason")
    assert "bad" in outcome.failed


def test_when_time_is_up_nothing_begins_and_what_runs_is_interrupted(tmp_path: Path) -> None:
    sleeper = task(tmp_path, "sleeper", "import time; time.sleep(60)", "print('never')")
    begin = time.monotonic()
    outcome = run_tasks([sleeper, task(tmp_path, "later", "pass")], [{}], stop_after=0.5, say=quiet)
    assert time.monotonic() - begin < 20
    assert (outcome.stopped, outcome.waiting) == (["sleeper"], ["later"])


def test_what_ignores_the_interrupt_is_killed_after_the_grace(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    outcome = run_tasks([task(tmp_path, "deaf", deaf)], [{}], stop_after=1.0, grace=0.5, say=quiet)
    assert time.monotonic() - begin < 20
    assert outcome.stopped == ["deaf"]


def test_progress_is_said_now_and_then_with_the_name_of_the_command(tmp_path: Path) -> None:
    one = task(tmp_path, "a", "import time; time.sleep(1.0)")
    one.progress = lambda stage: f"stage {stage}, step 7"
    lines: list[str] = []
    run_tasks([one], [{}], progress_every=0.2, say=lines.append)
    assert "a: stage 0, step 7" in lines
