"""What a run writes while it trains: `metrics.jsonl`, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]

SECONDS_BETWEEN_LINES = 15.0
NARROW, SHORTEST_BAR = 80, 4  # columns
# What the bar shows: key of a record, its label, its format.
LANGUAGE_MODEL = (("language_model_loss", "loss", "{:.3f}"), ("tls", "TLS", "{:.1f}%"), ("cls8", "CLS8", "{:.1f}%"))


class _Bar(tqdm):
    """Its estimate of the time left leaves out the first step of this process, which compiles the model.

    Of what it has to show, the last is left out where the line would be longer than the terminal is wide.
    """

    _first: tuple[int, float] | None = None
    shown: Sequence[str] = ()

    def update(self, n: float | None = 1) -> bool | None:
        updated = super().update(n)
        if self._first is None:
            self._first = int(self.n), time.monotonic()
        return updated

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        left = ""
        if self._first is not None and self.n > self._first[0] and self.total is not None:
            per_step = (time.monotonic() - self._first[1]) / (self.n - self._first[0])
            left = f", {tqdm.format_interval(per_step * (self.total - self.n))} left"
        rest = f"{self.n}/{self.total} | {tqdm.format_interval(values['elapsed'])}{left}"
        room = (values["ncols"] or NARROW) - len(rest) - SHORTEST_BAR
        return {**values, "left": left, "shown": _fitting(self.shown, room)}


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many of the parts, each behind a comma, as have room."""
    line = ""
    for part in parts:
        if len(line) + len(part) + 2 > room:
            break
        line += f", {part}"
    return line


class RunLog:
    """Append-only log of a run. Only the main process opens one.

    On resume, lines after the step that is resumed from are dropped, so that a step is never logged twice.

    Args:
        progress: show a bar on a terminal, and elsewhere a line every 15 seconds.
        shown: what stands there of a record, beside the tokens a second.
    """

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        steps: int,
        tensorboard: bool = True,
        progress: bool = True,
        shown: Sequence[tuple[str, str, str]] = LANGUAGE_MODEL,
    ) -> None:
        self.path = run / "metrics.jsonl"
        self._drop_after(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._shown = shown
        self._steps, self._lines = steps, progress and not sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._bar = _Bar(
            total=steps, initial=first_step, unit="step", disable=not progress or self._lines, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {bar}| {elapsed}{left}{shown}",
        )  # fmt: skip

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # the line that was being written when the run was killed
                break
            kept.append(line)
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(self.path)

    def step(self) -> None:
        self._bar.update()

    def write(self, record: dict[str, Any]) -> None:
        """One record: a line of JSON, TensorBoard scalars, and the bar's text."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in _flat(record):
                self._events.add_scalar(name, value, record["step"])
        shown = {label: text.format(record[key]) for key, label, text in self._shown if record.get(key) is not None}
        shown["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        self._bar.shown = [f"{label} {text}" for label, text in shown.items()]
        self._bar.refresh()
        if self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            parts = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {record['step']:,}/{self._steps:,}  {parts}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()


def hold_folder(run: Path) -> IO[str]:
    """Keep other processes from training in `run` until the returned file is closed (or this process ends).

    Raises:
        ValueError: another process holds it.
    """
    file = (run / ".lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(f"another process is training in {run}; wait for it or choose another folder") from None
    return file


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            pairs.append((prefix + key, float(value)))
    return pairs
