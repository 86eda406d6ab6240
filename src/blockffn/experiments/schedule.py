"""Runs tasks side by side, so many on each device, until all are done or the time is up.

A task is a list of commands, one after another, each in a process of its own with its output in the task's log. This
module knows nothing of models: it starts, watches and stops processes.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from blockffn.wording import counted

STOPPED = (130, -signal.SIGINT, -signal.SIGKILL)
POLL_SECONDS = 0.2


@dataclass
class Task:
    """Commands to run in order, each with a name.

    Attributes:
        finish: called in this process after the last command has succeeded.
        fail: called with the tail of the log when a command has not.
        progress: given the name of the running command, how far it is in a few words; empty: nothing to say.
    """

    name: str
    commands: list[tuple[str, list[str]]]
    log: Path
    finish: Callable[[], None] = lambda: None
    fail: Callable[[str], None] = lambda tail: None
    progress: Callable[[str], str] = lambda stage: ""


@dataclass
class Outcome:
    """Names of the tasks by how they ended; `waiting` were never begun, `stopped` have more to do."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


@dataclass
class _Active:
    task: Task
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    index: int = 0


def device_slots(gpus: int, per_gpu: int) -> list[dict[str, str]]:
    """The environment of each place where a task can run; `gpus` 0 means `per_gpu` places on the processor.

    Neighbours in the list are on different GPUs. GPUs are numbered within `CUDA_VISIBLE_DEVICES` where that is set.
    The processor's threads are shared out, unless `OMP_NUM_THREADS` says otherwise.

    Raises:
        ValueError: more GPUs than are visible, or no place at all.
    """
    if gpus < 0 or per_gpu < 1:
        raise ValueError(f"at least one run must fit: got --gpus {gpus}, --per-gpu {per_gpu}")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and gpus > len(visible):
        raise ValueError(f"--gpus {gpus}, but CUDA_VISIBLE_DEVICES names only {len(visible)}")
    names = (visible or [str(i) for i in range(gpus)])[:gpus] or [""]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, available // (len(names) * per_gpu))
    threads = os.environ.get("OMP_NUM_THREADS", str(share))
    return [{"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": threads} for _ in range(per_gpu) for name in names]


def run_tasks(
    tasks: Sequence[Task],
    slots: Sequence[dict[str, str]],
    *,
    stop_after: float | None = None,
    grace: float = 90.0,
    progress_every: float = 30.0,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run the tasks in their order, as many at once as there are slots.

    Args:
        slots: what each adds to the environment.
        stop_after: seconds after which no command begins and running ones get SIGINT. Ctrl-C and SIGTERM do the same.
        grace: seconds from then to SIGKILL; writing a checkpoint must fit.
        progress_every: seconds between two rounds of progress lines.

    Returns:
        How each task ended. A command that fails ends its own task only.
    """
    waiting, outcome = list(tasks), Outcome()
    active: list[_Active] = []
    begin = said = time.monotonic()
    stop_at: float | None = None
    with _stop_requests() as requested:
        while active or (waiting and stop_at is None):
            now = time.monotonic()
            if stop_at is None and (requested() or (stop_after is not None and now - begin >= stop_after)):
                stop_at = now
                say(f"stopping: {counted(len(active), 'run')} asked to write a checkpoint")
                for one in active:
                    _signal(one, signal.SIGINT)
            if stop_at is not None and now - stop_at >= grace:
                for one in active:
                    _signal(one, signal.SIGKILL)
            free = [i for i in range(len(slots)) if all(one.slot != i for one in active)]
            while stop_at is None and waiting and free:
                task, slot = waiting.pop(0), free.pop(0)
                say(f"{task.name}: begins" + _where(slots[slot]))
                active.append(_start(task, slot, slots[slot]))
            for one in list(active):
                code = one.process.poll()
                if code is None:
                    continue
                active.remove(one)
                one.log.close()
                _advance(one, code, slots, active, outcome, stopping=stop_at is not None, say=say)
            if now - said >= progress_every:
                said = now
                for one in active:
                    text = one.task.progress(one.task.commands[one.index][0])
                    if text:
                        say(f"{one.task.name}: {text}")
            if active:
                time.sleep(POLL_SECONDS)
    outcome.waiting = [task.name for task in waiting]
    return outcome


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log that are not empty."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _advance(
    one: _Active,
    code: int,
    slots: Sequence[dict[str, str]],
    active: list[_Active],
    outcome: Outcome,
    *,
    stopping: bool,
    say: Callable[[str], None],
) -> None:
    """What follows the end of a command: the next one, the end of its task, or nothing more for now."""
    task, more = one.task, one.index + 1 < len(one.task.commands)
    if (stopping and code in STOPPED) or (code == 0 and more and stopping):
        outcome.stopped.append(task.name)
        say(f"{task.name}: stopped, to be continued")
    elif code != 0:
        _fail(task, log_tail(task.log) or f"exit status {code}", outcome, say)
    elif more:
        active.append(_start(task, one.slot, slots[one.slot], index=one.index + 1))
    else:
        try:
            task.finish()
        except (ValueError, OSError, KeyError) as error:
            _fail(task, f"{type(error).__name__}: {error}", outcome, say)
            return
        outcome.done.append(task.name)
        say(f"{task.name}: done")


def _fail(task: Task, tail: str, outcome: Outcome, say: Callable[[str], None]) -> None:
    task.fail(tail)
    outcome.failed[task.name] = tail
    indented = "\n".join(f"    {line}" for line in tail.splitlines())
    say(f"{task.name}: FAILED; the end of {task.log}:\n{indented}")


def _start(task: Task, slot: int, environment: dict[str, str], *, index: int = 0) -> _Active:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    log, command = task.log.open("ab"), task.commands[index][1]
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, **environment}, start_new_session=True,  # Ctrl-C reaches this process, which passes it on
    )  # fmt: skip
    return _Active(task, slot, process, log, index)


def _signal(one: _Active, number: signal.Signals) -> None:
    """SIGINT to the command, which ends its own children; SIGKILL to all of them."""
    try:
        if number == signal.SIGKILL:
            os.killpg(one.process.pid, number)
        else:
            one.process.send_signal(number)
    except ProcessLookupError:
        pass


def _where(slot: dict[str, str]) -> str:
    return f" on GPU {slot['CUDA_VISIBLE_DEVICES']}" if slot.get("CUDA_VISIBLE_DEVICES") else ""


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a flag while tasks run."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in numbers}
    except ValueError:  # not in the main thread: signals are the caller's business
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
