"""The log of a run: what a resume keeps, and what is shown where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from blockffn.training import run_log
from blockffn.training.run_log import RunLog


def record(step: int) -> dict[str, object]:
    return {"step": step, "language_model_loss": 3.21, "tls": 70.04, "cls8": None, "tokens_per_second": 12345.6}


def test_a_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    lines = [json.dumps(record(step)) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = RunLog(tmp_path, first_step=2, steps=5, tensorboard=False, progress=False)
    log.write(record(3))
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_without_a_terminal_progress_is_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_LINES", 0.0)
    log = RunLog(tmp_path, first_step=0, steps=1500, tensorboard=False)
    log.step()
    log.write(record(1))
    log.close()
    assert capsys.readouterr().err == "step 1/1,500  loss 3.210  TLS 70.0%  tok/s 12,346\n"


def test_the_time_left_leaves_out_the_first_step_in_which_the_model_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((100.0, 102.0))
    bar = run_log._Bar(total=5, file=io.StringIO())
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(times))
    bar.update()
    assert bar.format_dict["left"] == ""
    bar.n = 2
    assert bar.format_dict["left"] == ", 00:06 left"
    monkeypatch.undo()
    bar.close()


@pytest.mark.parametrize(("columns", "last"), [(80, "held out 2.71"), (120, "tok/s 1,234,567")])
def test_a_bar_never_exceeds_the_terminal_and_drops_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, last: str
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(run_log.sys, "stderr", screen)
    shown = (("loss", "loss", "{:.3f}"), ("accepted", "tokens/step", "{:.2f}"), ("heldout", "held out", "{:.2f}"))
    log = RunLog(tmp_path, first_step=0, steps=10_000, tensorboard=False, shown=shown)
    log._bar.ncols, log._bar.dynamic_ncols = columns, None
    log._bar._first = 0, run_log.time.monotonic() - 60
    log._bar.n = 5000
    log.write({"step": 5000, "loss": 12.3456, "accepted": 2.5, "heldout": 2.71, "tokens_per_second": 1234567.0})
    line = screen.getvalue().split("\r")[-1]
    log.close()
    assert len(line) <= columns
    assert line.rstrip().endswith(last), line
    assert "left, loss 12.346, tokens/step 2.50, held out 2.71" in line
