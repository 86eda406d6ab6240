"""The command line of a suite: `python experiments/quality.py --data FOLDER …`, the same for every suite."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from blockffn.experiments.records import add_optional, machine_facts, write_failure, write_record
from blockffn.experiments.schedule import Outcome, Task, device_slots, run_tasks
from blockffn.experiments.stages import BLOCKFFN, Places, Plan, data_facts, plan
from blockffn.experiments.suite import PUBLISHED_SIZE, Experiment
from blockffn.wording import counted

RECORDS = Path("experiments/records")
WORK_LEFT = 3
Suite = Callable[[str], Sequence[Experiment]]

EPILOG = f"""
A run is trained, evaluated on all held-out rows, its routing analysed, and with --eval-data scored on BLiMP and
LAMBADA; what is kept of it lies in RECORDS/SUITE/RUN. Started again, the command skips what is recorded, adds to a
record what it lacks if the model is still there, and goes on with what was stopped. A record of other settings is an
error that names them.

Exit status: 0 all is recorded, 1 a run failed or differs, {WORK_LEFT} time is up and work is left (start it again).
"""


def main(
    suite: Suite, description: str, arguments: Sequence[str] | None = None, *, program: tuple[str, ...] = BLOCKFFN
) -> int:
    """Run a suite as the command line says; returns the exit status.

    Args:
        suite: the experiments of a size.
        arguments: the command line; `None`: that of the process.
        program: the command that trains and evaluates.
    """
    begin = time.monotonic()
    given = _parse(description, arguments)
    chosen = _chosen(suite, given)
    places = Places(
        data=given.data,
        work=given.work,
        records=given.records or _records_folder(given),
        eval_data=given.eval_data,
        device="cpu" if given.cpu else None,
        program=program,
    )
    slots = device_slots(0 if given.cpu else given.gpus, given.per_gpu)
    if given.eval_data is None:
        print("no zero-shot scores: give --eval-data FOLDER with blimp.jsonl.xz and lambada.jsonl.xz to have them")
    print(f"{counted(len(chosen), 'run')}, {len(slots)} at a time; records in {places.records}")
    facts = {"data": data_facts(places.data), **machine_facts(gpu=not given.cpu), "runs_per_device": given.per_gpu}
    tasks, refused = [], {}
    for experiment in chosen:
        try:
            todo = plan(experiment, places)
        except ValueError as error:
            refused[experiment.name] = str(error)
            print(f"{experiment.name}: FAILED: {error}")
            continue
        task = _task(experiment, todo, places, facts)
        if todo.stages:
            tasks.append(task)
        elif not todo.recorded and not given.list:  # stopped between its last stage and the record
            task.finish()
            print(f"{experiment.name}: done before, now recorded")
        else:
            print(f"{experiment.name}: recorded already")
    if given.list:
        for task in tasks:
            print(f"{task.name}:", *(f"\n    {shlex.join(command)}" for _, command in task.commands))
        return 1 if refused else 0
    left = None if given.stop_after is None else given.stop_after - (time.monotonic() - begin)
    outcome = run_tasks(tasks, slots, stop_after=left, progress_every=given.progress_every, say=_say)
    outcome.failed |= refused
    return _conclude(outcome, len(chosen))


def _parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings to change in every run")
    parser.add_argument("--data", type=Path, required=True, help="folder made by blockffn prepare")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="checkpoints, models and logs")
    parser.add_argument("--records", type=Path, help=f"default: {RECORDS}; WORK/records where settings are changed")
    parser.add_argument("--eval-data", type=Path, help="folder with blimp.jsonl.xz and lambada.jsonl.xz")
    parser.add_argument("--size", default=PUBLISHED_SIZE, help=f"preset, default {PUBLISHED_SIZE}")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--only", action="append", metavar="TEXT", help="runs with TEXT in their name; repeat it")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on each GPU (or, with --cpu, in all)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="then stop with checkpoints")
    parser.add_argument("--progress-every", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--list", action="store_true", help="say what would be run, and stop")
    return parser.parse_intermixed_args(arguments)


def _chosen(suite: Suite, given: argparse.Namespace) -> list[Experiment]:
    """The suite's experiments, with what the command line changes in all of them."""
    found = [e for e in suite(given.size) if not given.only or any(text in e.name for text in given.only)]
    steps = {} if given.steps is None else {"steps": given.steps}
    return [replace(e, changes=(*e.changes, *given.changes), **steps) for e in found]


def _records_folder(given: argparse.Namespace) -> Path:
    """Runs that are not the published ones do not mix with the records that the repository keeps."""
    published = given.size == PUBLISHED_SIZE and given.steps is None and not given.changes
    return RECORDS if published else given.work / "records"


def _task(experiment: Experiment, todo: Plan, places: Places, facts: dict[str, object]) -> Task:
    run, record = places.run(experiment), places.record(experiment)
    own = _facts(experiment, facts)

    def finish() -> None:
        if todo.recorded:
            add_optional(record, run)
        else:
            write_record(record, run, own)

    def fail(tail: str) -> None:
        if not todo.recorded:
            last = tail.splitlines()[-1] if tail else ""
            write_failure(record, own, last.replace(str(places.work), "WORK").replace(str(places.data), "DATA"))

    return Task(
        experiment.name,
        [(stage.name, stage.command) for stage in todo.stages],
        log=run.with_name(run.name + ".log"),
        finish=finish,
        fail=fail,
        progress=lambda stage: _progress(run) if stage == "train" else stage,
    )


def _facts(experiment: Experiment, facts: dict[str, object]) -> dict[str, object]:
    command = ["blockffn", "train", "--preset", experiment.size, "--method", experiment.method]
    command += ["--data", "DATA", "--out", "RUN", *experiment.overrides]
    return {
        "label": experiment.label,
        "method": experiment.method,
        "size": experiment.size,
        "seed": experiment.seed,
        "command": shlex.join(command),
        **facts,
    }


def _progress(run: Path) -> str:
    """The last line of a run's log, in words."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return "no step yet (the first one compiles the model)"
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        row = json.loads(lines[-1])
    except (IndexError, ValueError):  # the line is being written
        return ""
    text = f"step {row['step']:,}  loss {row['language_model_loss']:.3f}"
    if row.get("tls") is not None:
        text += f"  TLS {row['tls']:.1f} %  CLS8 {row['cls8']:.1f} %"
    return f"{text}  {row['tokens_per_second']:,.0f} tokens/s"


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def _conclude(outcome: Outcome, total: int) -> int:
    left = [*outcome.stopped, *outcome.waiting]
    recorded = total - len(left) - len(outcome.failed)
    print(f"{recorded} of {total} recorded, {len(outcome.failed)} failed, {len(left)} left")
    for name in outcome.failed:
        print(f"  failed: {name}")
    if left:
        print(f"  left: {', '.join(left)}; the same command goes on")
    if outcome.failed:
        return 1
    return WORK_LEFT if left else 0
