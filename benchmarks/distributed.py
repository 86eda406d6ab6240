"""One process against several: tokens per second, loss curves, and checkpoints that change hands.

    python benchmarks/distributed.py --data DATA --processes 2 --json benchmarks/results/distributed.json
    python benchmarks/distributed.py --data DATA --size nano --device cpu --seconds 60      # with gloo, on a laptop

DATA is a folder that `blockffn prepare` made. Every run is `blockffn.training.loop.train` in processes of its own, with
the same rows a step:

    1 process       decides the number of steps: at least 32, then until its share of --seconds is over
    N, ddp / fsdp   the same steps under torchrun
    resumed         the 1-process checkpoint goes on with N (ddp), that of N (fsdp) with 1; both at the same time,
                    for the losses alone

The rate is the median over the steps after the first 16 (compiling, warming up) and without those that write a
checkpoint. The learning rate warms up over the 32 steps that every run has and stays, so curves do not depend on the
number of steps, and no loss jumps, after which rounding alone would keep them apart. Losses are compared
step by step; they cannot be equal to the last digit, since sums of bfloat16 products are taken in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEAST_STEPS, WARM_STEPS, CHECKPOINT_EVERY = 32, 16, 24
SHARE_OF_FIRST = 0.2  # of --seconds, for the steps of the first run with compiling; the rest are four starts and runs
TOLERANCE = 0.01  # relative, of every step's loss
# Rows of a step, and of a forward pass of one process: enough to fill a GPU with 80 GB.
ROWS = {"nano": (16, 8), "mini": (192, 48)}
OTHER_ROWS = (48, 12)


@dataclass(frozen=True)
class Run:
    """One training run: who ran it, how fast, and its loss by step. `first_step` is the one it was resumed at."""

    name: str
    processes: int
    parallel: str
    first_step: int
    seconds: float
    tokens_per_second: float
    losses: dict[int, float]


@dataclass(frozen=True)
class Difference:
    """Relative differences of two curves over the steps that both have."""

    steps: int
    largest: float
    mean: float

    @property
    def passed(self) -> bool:
        return self.largest <= TOLERANCE


def difference(run: dict[int, float], expected: dict[int, float]) -> Difference:
    """How far the losses of `run` lie from the expected ones.

    Raises:
        ValueError: no step in common.
    """
    common = sorted(set(run) & set(expected))
    if not common:
        raise ValueError("the two runs have no step in common")
    relative = [abs(run[step] / expected[step] - 1) for step in common]
    return Difference(len(common), max(relative), statistics.mean(relative))


def rate(step_seconds: dict[int, float], tokens_per_step: int) -> float:
    """Tokens per second of the median step after warming up. A step after a checkpoint also has waited for it."""
    kept = [
        seconds
        for step, seconds in step_seconds.items()
        if step > WARM_STEPS and step % CHECKPOINT_EVERY != 1 and step % CHECKPOINT_EVERY != 0
    ]
    return tokens_per_step / statistics.median(kept) if kept else float("nan")


# --- in the processes that train ------------------------------------------------------------------------------------


class StepTimer:
    """Seconds of each step, by events on the GPU that cost no waiting. Ends the run when its time is over."""

    def __init__(self, *, cuda: bool, stop_after: float | None) -> None:
        self.cuda, self.stop_after = cuda, stop_after
        self.start = time.perf_counter()
        self.marks: dict[int, Any] = {}

    def __call__(self, step: int) -> None:
        import signal

        import torch

        if self.cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks[step] = mark
        over = self.stop_after is not None and time.perf_counter() - self.start > self.stop_after
        if over and step >= LEAST_STEPS:
            signal.raise_signal(signal.SIGINT)  # the loop writes a checkpoint and returns

    def seconds(self) -> dict[int, float]:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        pairs = {step: (self.marks[step - 1], mark) for step, mark in self.marks.items() if step - 1 in self.marks}
        return {
            step: before.elapsed_time(mark) / 1e3 if self.cuda else mark - before
            for step, (before, mark) in pairs.items()
        }


def work(job: dict[str, Any]) -> None:
    """Train as `job` says; the main process writes what happened to `job["result"]`."""
    import torch

    from blockffn.evaluation.machine import describe_machine
    from blockffn.settings import merge
    from blockffn.training.checkpoint import checkpoint_folders, read_state
    from blockffn.training.config import train_settings
    from blockffn.training.loop import train

    settings = train_settings(job["size"], "blockffn", merge(settings_of(job), job["changes"]))
    device = job["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    timer = StepTimer(cuda=device == "cuda", stop_after=job["stop_after"])
    done = train(settings, Path(job["run"]), resume=job["resume"], device=device, progress=False, on_step=timer)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    # The history of all steps: one log line would hold their mean.
    history = read_state(checkpoint_folders(Path(job["run"]))[-1])["statistics"]["history"]
    first = done.step - len(history) + 1
    outcome = {
        "steps": done.step,
        "seconds": done.seconds,
        "losses": {first + i: record["language_model"] for i, record in enumerate(history)},
        "step_seconds": timer.seconds(),
        "tokens_per_step": settings.batch_size * settings.data.sequence_length,
        "micro_batch_size": settings.micro_batch_size,
        "machine": describe_machine(torch.device(device)),
        "torch": torch.__version__,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    Path(job["result"]).write_text(json.dumps(outcome))


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    rows, micro_rows = job["rows"]
    steps = job["steps"]
    return {
        "steps": steps, "batch_size": rows, "micro_batch_size": micro_rows, "parallel": job["parallel"],
        "log_every": steps, "checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": steps,
        "schedule": {"warmup_steps": LEAST_STEPS, "decay_fraction": 0.0},
        "data": {"folders": {job["data"]: 1.0}},
    }  # fmt: skip


# --- in the process that compares -----------------------------------------------------------------------------------


class Launcher:
    """Starts runs in folders below `work`, all with one cache of compiled kernels."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        rows, micro_rows = ROWS.get(arguments.size, OTHER_ROWS)
        rows = arguments.rows or rows
        if rows % arguments.processes:
            raise ValueError(f"--rows {rows} is not a multiple of --processes {arguments.processes}")
        self.rows = rows, min(arguments.micro_rows or micro_rows, rows // arguments.processes)
        threads = max(1, (os.cpu_count() or 1) // arguments.processes)  # as many for each process of every run
        self.environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"), **os.environ, "OMP_NUM_THREADS": str(threads)
        }  # fmt: skip

    def start(
        self,
        name: str,
        *,
        processes: int,
        parallel: str = "ddp",
        steps: int,
        stop_after: float | None = None,
        checkpoint: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Begin a run, from `checkpoint` if one is given."""
        run = self.work / name
        if checkpoint is not None:
            shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
        given = self.arguments
        job = {
            "size": given.size, "device": given.device, "data": str(given.data.resolve()),
            "changes": parse_changes(given.settings), "rows": self.rows,
            "run": str(run), "parallel": parallel, "steps": steps, "stop_after": stop_after,
            "resume": checkpoint is not None, "result": str(self.result_path(name)),
        }  # fmt: skip
        path = self.work / f"{name}.job.json"
        path.write_text(json.dumps(job))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--work", str(path)]
        print(f"{name} …", file=sys.stderr, flush=True)
        log = (self.work / f"{name}.log").open("w")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def result_path(self, name: str) -> Path:
        return self.work / f"{name}.result.json"

    def wait(self, name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What the run found.

        Raises:
            RuntimeError: it failed; the message ends as its output does.
        """
        status = process.wait()
        path = self.result_path(name)
        if not path.is_file():  # a process group that aborts while Python shuts down has done its work
            tail = (self.work / f"{name}.log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the run {name!r} failed with status {status}:\n{tail}")
        outcome: dict[str, Any] = json.loads(path.read_text())
        for key in ("losses", "step_seconds"):
            outcome[key] = {int(step): value for step, value in outcome[key].items()}
        return outcome


def parse_changes(settings: list[str]) -> dict[str, Any]:
    from blockffn.settings import parse_overrides

    return parse_overrides(settings)


def compare(launcher: Launcher, *, processes: int, seconds: float) -> dict[str, Any]:
    """All runs, and what their curves say."""
    outcomes: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}

    def keep(name: str, process: subprocess.Popen[str], processes: int, parallel: str, first_step: int = 1) -> None:
        outcome = outcomes[name] = launcher.wait(name, process)
        runs[name] = Run(
            name, processes, parallel, first_step, outcome["seconds"],
            rate(outcome["step_seconds"], outcome["tokens_per_step"]),
            {step: loss for step, loss in outcome["losses"].items() if step >= first_step},
        )  # fmt: skip

    keep("one", launcher.start("one", processes=1, steps=100_000, stop_after=SHARE_OF_FIRST * seconds), 1, "none")
    steps = outcomes["one"]["steps"]
    for parallel in ("ddp", "fsdp"):
        keep(
            parallel, launcher.start(parallel, processes=processes, parallel=parallel, steps=steps), processes, parallel
        )
    last = max(step for step in range(CHECKPOINT_EVERY, steps, CHECKPOINT_EVERY))
    changes = {"one-to-ddp": ("one", processes, "ddp"), "fsdp-to-one": ("fsdp", 1, "none")}
    started = {}
    for name, (source, number, _) in changes.items():
        checkpoint = launcher.work / source / "checkpoints" / f"step-{last:08d}"
        started[name] = launcher.start(name, processes=number, steps=steps, checkpoint=checkpoint)
    for name, process in started.items():
        _, number, parallel = changes[name]
        keep(name, process, number, parallel, last + 1)
    differences = {
        f"{run} against {expected}": difference(runs[run].losses, runs[expected].losses)
        for run, expected in (
            ("ddp", "one"), ("fsdp", "one"), ("one-to-ddp", "one"), ("fsdp-to-one", "fsdp")
        )
    }  # fmt: skip
    one = outcomes["one"]
    return {
        "machine": {
            "device": f"{processes} x {one['machine']}", "torch": one["torch"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "processor_cores": os.cpu_count(),
        },
        "size": launcher.arguments.size, "settings": launcher.arguments.settings, "steps": steps,
        "tokens_per_step": one["tokens_per_step"], "rows_of_a_pass": one["micro_batch_size"],
        "gigabytes": {name: outcome["gigabytes"] for name, outcome in outcomes.items()},
        "speedup": {p: runs[p].tokens_per_second / runs["one"].tokens_per_second for p in ("ddp", "fsdp")},
        "differences": {name: {**asdict(d), "passed": d.passed} for name, d in differences.items()},
        "runs": [asdict(run) for run in runs.values()],
    }  # fmt: skip


def print_comparison(result: dict[str, Any]) -> None:
    print(f"\n{result['size']}, {result['tokens_per_step']:,} tokens a step, {result['steps']} steps; "
          f"{result['machine']['device']}")  # fmt: skip
    print(f"{'run':<14}{'processes':>10}{'tokens/s':>12}{'times one':>11}{'last loss':>11}")
    for run in result["runs"]:
        timed = run["first_step"] == 1
        speedup = result["speedup"].get(run["name"], 1.0)
        last = run["losses"][max(run["losses"])]
        rates = f"{run['tokens_per_second']:>12,.0f}{speedup:>11.2f}" if timed else f"{'':>12}{'':>11}"
        print(f"{run['name']:<14}{run['processes']:>10}{rates}{last:>11.4f}")
    print(f"\n{'losses, relative difference':<32}{'steps':>6}{'largest':>10}{'mean':>10}")
    for name, d in result["differences"].items():
        verdict = "" if d["passed"] else f"   more than {TOLERANCE:.0%}"
        print(f"{name:<32}{d['steps']:>6}{d['largest']:>10.1e}{d['mean']:>10.1e}{verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings as for blockffn train: gradient_checkpointing=true")
    parser.add_argument("--data", type=Path, help="folder that blockffn prepare made")
    parser.add_argument("--size", default="mini", help="a preset of blockffn presets")
    parser.add_argument("--processes", type=int, default=2, help="how many to compare with one, on as many GPUs")
    parser.add_argument("--rows", type=int, help="rows of a step over all processes (default: by size)")
    parser.add_argument("--micro-rows", type=int, help="rows of a forward pass of one process (default: by size)")
    parser.add_argument("--seconds", type=float, default=150, help="about what all runs together may take on GPUs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="write what is printed, and every loss, as data")
    parser.add_argument("--out", type=Path, help="keep runs and logs in this folder (default: a temporary one)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(json.loads(arguments.work.read_text()))
        return 0
    if arguments.data is None:
        parser.error("give the folder that blockffn prepare made: --data FOLDER")
    if arguments.processes < 2:
        parser.error(f"--processes must be at least 2, got {arguments.processes}")
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="blockffn-distributed-"))
    if arguments.out is not None and folder.exists() and any(folder.iterdir()):
        parser.error(f"--out {folder} is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    try:
        result = compare(
            Launcher(arguments, folder.resolve()), processes=arguments.processes, seconds=arguments.seconds
        )
    finally:
        if arguments.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    result["command"] = " ".join(["python", *sys.argv])
    result["seconds"] = time.perf_counter() - begin
    print_comparison(result)
    print(f"{result['seconds']:.0f} s in all")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0 if all(d["passed"] for d in result["differences"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
