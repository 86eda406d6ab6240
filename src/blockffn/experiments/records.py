"""Records of runs: the few kilobytes of a run that are kept in the repository.

    config.yaml      resolved settings; folders of data by their last name only
    metrics.jsonl    the training log, thinned
    evaluation.json  what `blockffn evaluate` found on all held-out rows
    evidence.json    what `blockffn analyze` found of the routing; absent for dense models and in older records
    zero_shot.json   what `blockffn zero-shot` found, by task and field; absent if it was not asked
    record.json      outcome (done or failed), command, machine, date, tokens, seconds, tokens a second

A record is written whole or not at all. A failed run leaves a `record.json` that says why, and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

MOST_LOG_BYTES = 20_000
DIGITS = 6
_NUMBERS = re.compile(r'\[[^][{}"]*\]')  # a list of numbers goes on one line


def write_record(folder: Path, run: Path, facts: Mapping[str, Any]) -> None:
    """Keep the run at `run` (trained and evaluated) in `folder`; `facts` go into `record.json` beside the run's own."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    folders = config["data"]["folders"]
    config["data"]["folders"] = {Path(name).name: weight for name, weight in folders.items()}
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    outcome = read_json(run / "train.json")
    record = {
        "outcome": "done",
        **facts,
        "steps": outcome["step"],
        "tokens": outcome["tokens"],
        "seconds": round(outcome["seconds"], 1),
        "tokens_per_second": round(_median_rate([json.loads(line) for line in lines])),
    }
    files = {
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "metrics.jsonl": "".join(thinned_log(lines)),
        "evaluation.json": _json(read_json(run / "evaluation.json")),
        "record.json": _json(record),
    }
    files |= _optional(run)
    torn = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    for name, text in files.items():
        (torn / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    torn.rename(folder)


def add_optional(folder: Path, run: Path) -> None:
    """Add to a record what it lacks of zero-shot scores and evidence, as far as the run has them."""
    for name, text in _optional(run).items():
        if not (folder / name).is_file():
            (folder / name).write_text(text, encoding="utf-8")


def write_failure(folder: Path, facts: Mapping[str, Any], error: str) -> None:
    """Say in a record that the run failed, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(_json({"outcome": "failed", **facts, "error": error}), encoding="utf-8")


def machine_facts(*, gpu: bool) -> dict[str, Any]:
    """What the numbers of a run depend on besides its settings: date, processor, GPU, versions. No host name."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": _gpu_name() if gpu else None,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def thinned_log(lines: Sequence[str], *, most_bytes: int = MOST_LOG_BYTES) -> list[str]:
    """Lines of a log, evenly chosen so that they take at most `most_bytes` together; the first and the last stay."""
    short = [json.dumps(_rounded(json.loads(line)), separators=(",", ":")) + "\n" for line in lines]
    longest = max(map(len, short), default=1)
    count = min(len(short), max(2, most_bytes // longest))
    if count == len(short):
        return short
    return [short[round(i * (len(short) - 1) / (count - 1))] for i in range(count)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ValueError` naming the file if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and run again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected an object; delete it and run again")
    return values


def _optional(run: Path) -> dict[str, str]:
    """Files by name. Of the evidence only the numbers: tables and plots are made of them anew."""
    files = {}
    if (run / "zero_shot.json").is_file():
        files["zero_shot.json"] = _zero_shot(run)
    if (run / "evidence.json").is_file():
        files["evidence.json"] = _json(read_json(run / "evidence.json")["findings"])
    return files


def _zero_shot(run: Path) -> str:
    """By task and, for BLiMP, by field; its 67 paradigms would fill most of the record."""
    found = read_json(run / "zero_shot.json")
    tasks = {
        name: {key: value for key, value in task.items() if key != "paradigms"} for name, task in found["tasks"].items()
    }
    return _json({**found, "model": run.name, "tasks": tasks})


def _median_rate(rows: list[dict[str, Any]]) -> float:
    """The first line holds the compilation and does not count."""
    rates = sorted(row["tokens_per_second"] for row in rows[1:] or rows)
    return rates[len(rates) // 2]


def _json(values: Any) -> str:
    text = json.dumps(_rounded(values), indent=1, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


def _rounded(value: Any) -> Any:
    """Floats with `DIGITS` significant digits, at any depth: a record is read by people and kept in git."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _gpu_name() -> str:
    """Asked of the driver: a process that asks torch would hold memory on the GPU."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(found.stdout.splitlines()), "unknown").strip()
