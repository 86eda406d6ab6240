"""What is left of an experiment: nothing, an error, or the commands that take it from where it stands to its record."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.experiments.agreement import differences, resolved_settings, saved_settings
from blockffn.experiments.records import read_json
from blockffn.experiments.suite import Experiment
from blockffn.presets import METHODS

BLOCKFFN = (sys.executable, "-m", "blockffn")


class DiffersError(ValueError):
    """A record or a half-made run has other settings than the experiment."""


@dataclass(frozen=True)
class Places:
    """Where things lie: prepared data, runs in the making, records, tasks for zero-shot scores; device and program."""

    data: Path
    work: Path
    records: Path
    eval_data: Path | None = None
    device: str | None = None
    program: tuple[str, ...] = BLOCKFFN

    def run(self, experiment: Experiment) -> Path:
        return self.work / experiment.suite / experiment.name

    def record(self, experiment: Experiment) -> Path:
        return self.records / experiment.suite / experiment.name


@dataclass(frozen=True)
class Stage:
    """One command of a run; `makes` exists once it has succeeded."""

    name: str
    command: list[str]
    makes: Path


@dataclass(frozen=True)
class Plan:
    """What to do for an experiment; nothing if it has no stages. `recorded`: only optional parts are missing."""

    stages: list[Stage]
    recorded: bool = False


def plan(experiment: Experiment, places: Places) -> Plan:
    """What is left to do, judged by the files that are there.

    Raises:
        DiffersError: a record or run of this name has other settings or data; the message names the differences.
        ValueError: the experiment's settings cannot be resolved (an unknown method, say).
    """
    run, record = places.run(experiment), places.record(experiment)
    wanted = resolved_settings(experiment, places.data)
    if recorded_outcome(record) == "done":
        facts = read_json(record / "record.json")
        _require_same(record, wanted, _other_data(facts["data"], data_facts(places.data)))
        if not (run / "model").is_dir():
            return Plan([], recorded=True)
        optional = [*_analysis(experiment, places), *_zero_shot(experiment, places)]
        return Plan([stage for stage in optional if not (record / stage.makes.name).is_file()], recorded=True)
    stages = []
    if (run / "model").is_dir() and (run / "train.json").is_file():
        _require_same(run, wanted, [])
    else:
        stages.append(_training(experiment, places, wanted))
    if stages or not (run / "evaluation.json").is_file():
        stages.append(Stage("evaluate", _command(places, "evaluate", str(run)), run / "evaluation.json"))
    return Plan([*stages, *_analysis(experiment, places), *_zero_shot(experiment, places)])


def recorded_outcome(record: Path) -> str | None:
    """`done` or `failed`, as a record says; `None` if there is none."""
    path = record / "record.json"
    return read_json(path).get("outcome") if path.is_file() else None


def data_facts(folder: Path) -> dict[str, Any]:
    """Name and identity of a prepared folder, for the record."""
    from blockffn.data.manifest import load_manifest

    manifest = load_manifest(folder)
    sizes = {f"{name}_tokens": split.tokens for name, split in manifest.splits.items()}
    return {"name": folder.name, "fingerprint": manifest.fingerprint, **sizes}


def _training(experiment: Experiment, places: Places, wanted: dict[str, Any]) -> Stage:
    from blockffn.training.checkpoint import checkpoint_folders

    run = places.run(experiment)
    ends = ["--out", str(run), "--json", str(run / "train.json")]
    if checkpoint_folders(run):
        _require_same(run, wanted, [])
        return Stage("train", _command(places, "train", "--resume", *ends), run / "model")
    command = _command(places, "train", "--preset", experiment.size, "--method", experiment.method,
                       "--data", str(places.data), *ends, *experiment.overrides)  # fmt: skip
    return Stage("train", command, run / "model")


def _analysis(experiment: Experiment, places: Places) -> list[Stage]:
    """What `blockffn analyze` says of the routing; without drafted trees, which take longer than all the rest."""
    run = places.run(experiment)
    out = run / "evidence.json"
    if METHODS.get(experiment.method, {}).get("ffn_type") == "dense" or out.is_file():
        return []
    return [Stage("analyze", _command(places, "analyze", str(run), "--trees", "0", "--json", str(out)), out)]


def _zero_shot(experiment: Experiment, places: Places) -> list[Stage]:
    run = places.run(experiment)
    out = run / "zero_shot.json"
    if places.eval_data is None or out.is_file():
        return []
    command = _command(places, "zero-shot", str(run), "--tasks-dir", str(places.eval_data), "--json", str(out))
    return [Stage("zero-shot", command, out)]


def _require_same(folder: Path, wanted: dict[str, Any], other: list[str]) -> None:
    unlike = other + differences(saved_settings(folder / "config.yaml"), wanted)
    if unlike:
        raise DiffersError(
            f"{folder} holds another run than the wanted one ({'; '.join(unlike)}); "
            "move it away, or ask for its settings"
        )


def _other_data(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    if found["fingerprint"] == wanted["fingerprint"]:
        return []
    names = f"found {found['name']} ({found['fingerprint'][:8]}), wanted {wanted['name']} ({wanted['fingerprint'][:8]})"
    return [f"data: {names}"]


def _command(places: Places, *arguments: str) -> list[str]:
    device = [] if places.device is None else ["--device", places.device]
    return [*places.program, *arguments, *device]
