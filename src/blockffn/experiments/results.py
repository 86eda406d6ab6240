"""What the records say, as plain values: one `Result` per experiment of a list, recorded or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockffn.experiments.records import read_json
from blockffn.experiments.suite import Experiment
from blockffn.reporting.run import Run, load_run


@dataclass(frozen=True)
class Result:
    """An experiment with what its record holds. Percentages are in percent, losses in nats a token.

    Attributes:
        folder: of the record, whether it is there or not.
        record: `record.json`, empty if there is none.
        run: configuration, log and evaluation; `None` unless the run is done.
        cost: parameters and what a token costs, as `blockffn evaluate` counts them.
        zero_shot: accuracy by task.
        evidence: what `blockffn analyze` found of the routing; empty if the record has none.
    """

    experiment: Experiment
    folder: Path
    record: dict[str, Any]
    run: Run | None
    cost: dict[str, float]
    zero_shot: dict[str, float]
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """`done`, `failed` or `missing`."""
        return self.record.get("outcome", "missing")

    @property
    def values(self) -> dict[str, float | None]:
        """The numbers of a run that tables show; `None` where a model has none (a dense one's sparsity, say)."""
        if self.run is None or self.run.evaluation is None:
            return {}
        found = self.run.evaluation
        dead = [layer.dead_experts for layer in found.layers if layer.dead_experts is not None]
        return {
            "heldout_loss": found.heldout_loss,
            "perplexity": found.perplexity,
            "tls": found.tls,
            "cls8": found.cls.get(8),
            "reuse_ratio": found.reuse_ratio,
            "dead_experts": float(sum(dead)) if dead else None,
            "blimp": self.zero_shot.get("blimp"),
            "lambada": self.zero_shot.get("lambada"),
            "weights": self.cost.get("non_embedding_parameters"),
            "active": self.cost.get("active_parameters"),
        }


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, and half the distance between the largest and the smallest (0 for one seed)."""

    mean: float
    spread: float
    count: int


def read_results(records: Path, experiments: Iterable[Experiment]) -> list[Result]:
    """One result per experiment, in their order.

    Raises:
        ValueError: a record is garbled; the message names file and field.
    """
    return [_read(records / e.suite / e.name, e) for e in experiments]


def unlisted(records: Path, experiments: Iterable[Experiment]) -> list[Path]:
    """Folders of records that belong to no experiment of the list."""
    listed = {(e.suite, e.name) for e in experiments}
    found = sorted(path.parent for path in records.glob("*/*/record.json"))
    return [folder for folder in found if (folder.parent.name, folder.name) not in listed]


def done(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.run is not None]


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by method, in order of first appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.experiment.method, []).append(result)
    return groups


def mean(results: Sequence[Result], name: str) -> Mean | None:
    """A quantity's mean over those of the results that have it."""
    found = [value for value in (result.values.get(name) for result in results) if value is not None]
    if not found:
        return None
    return Mean(sum(found) / len(found), (max(found) - min(found)) / 2, len(found))


def _read(folder: Path, experiment: Experiment) -> Result:
    path = folder / "record.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("outcome") != "done":
        return Result(experiment, folder, record, None, {}, {})
    scores = folder / "zero_shot.json"
    tasks = read_json(scores)["tasks"] if scores.is_file() else {}
    cost = read_json(folder / "evaluation.json").get("cost", {})
    accuracy = {name: task["accuracy"] for name, task in tasks.items()}
    analysed = folder / "evidence.json"
    evidence = read_json(analysed) if analysed.is_file() else {}
    return Result(experiment, folder, record, load_run(folder), cost, accuracy, evidence)
