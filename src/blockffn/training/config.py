"""Settings of a training run. The resolved settings are saved with the run as `config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockffn.presets import RECIPES, did_you_mean, objective_terms_of
from blockffn.settings import from_dict, merge
from blockffn.training.coefficients import make_coefficient


@dataclass(frozen=True)
class DataSettings:
    """Prepared folders (`blockffn prepare`) and how rows are made of them.

    `folders` gives each a weight: `{"runs/books": 0.7, "runs/code": 0.3}`. Documents are padded to multiples of
    `align`, so that no chunk holds two of them.
    """

    folders: dict[str, float] = field(default_factory=dict)
    sequence_length: int = 4096
    align: int = 64


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. `learning_rate` is that of embeddings and norms; matrices get it over `hidden_size / dim_model_base`.

    The router has its own rate (`None`: as the other matrices) and is clipped on its own, as in the published recipe.
    """

    learning_rate: float = 0.01
    router_learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


@dataclass(frozen=True)
class ScheduleSettings:
    """Warm-up, stable, decay: the last `decay_fraction` of the steps falls linearly to `final_fraction` of the peak."""

    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is penalised beside the language-model loss.

    `terms` maps the name of an objective to its coefficient, as `blockffn.training.coefficients.make_coefficient`
    takes it: `{"activation_locality": {"kind": "constant", "value": 2e-3}}`; `null` switches one of the preset's off.
    """

    chunk_length: int = 64
    sharpness: float = 100.0
    terms: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherSettings:
    """A model to learn from, in the folder `folder`; without one, text alone teaches.

    `share` of the language model's loss is the divergence from the teacher's predictions, the rest is the cross
    entropy of the text. `hidden` weighs the relative squared difference of the layers' states, mean over layers.
    """

    folder: str | None = None
    share: float = 1.0
    hidden: float = 0.0


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a run, apart from the machine it runs on.

    Attributes:
        size, method: rows of `blockffn.presets`.
        model: overrides of the model's configuration.
        start_from: folder of a model to go on from, with its own architecture; `size` then only names the recipe.
        steps: optimiser steps.
        max_seconds: end sooner if the machine is too slow for all of them, with the schedule shortened to match; for
            one process, and not reproducible to the step.
        batch_size: rows a step, over all ranks.
        micro_batch_size: rows a forward pass and rank (`None`: all of them).
        precision: `float32`, or `bfloat16` (autocast over float32 weights).
        compile: compile each decoder layer and the loss.
        parallel: `ddp` or `fsdp`, when run under torchrun.
        log_every, evaluate_every, checkpoint_every: in steps; 0 means at the end only.
        keep_checkpoints: older ones are deleted.
    """

    size: str = "nano"
    method: str = "blockffn"
    model: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    objectives: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    steps: int = 1000
    max_seconds: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    seed: int = 2345
    precision: str = "float32"
    compile: bool = True
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_rows: int = 64
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        for name, choices in (("precision", ("float32", "bfloat16")), ("parallel", ("ddp", "fsdp"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name, value, least in (
            ("optimizer.learning_rate", self.optimizer.learning_rate, 0.0),
            ("optimizer.router_learning_rate", self.optimizer.router_learning_rate, 0.0),
            ("optimizer.weight_decay", self.optimizer.weight_decay, 0.0),
            ("optimizer.gradient_clip", self.optimizer.gradient_clip, 1e-12),
            ("schedule.warmup_steps", self.schedule.warmup_steps, 0),
            ("schedule.final_fraction", self.schedule.final_fraction, 0.0),
            ("data.sequence_length", self.data.sequence_length, 2),
            ("data.align", self.data.align, 1),
            ("max_seconds", self.max_seconds, 1e-12),
            ("teacher.hidden", self.teacher.hidden, 0.0),
            ("evaluate_every", self.evaluate_every, 0),
            ("evaluate_rows", self.evaluate_rows, 1),
            ("checkpoint_every", self.checkpoint_every, 0),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value}")
        if not 0.0 <= self.teacher.share <= 1.0:
            raise ValueError(f"teacher.share must lie in 0…1, got {self.teacher.share}")
        if self.start_from is not None and self.model:
            raise ValueError(
                f"start_from ({self.start_from}) brings its own architecture; leave model.{next(iter(self.model))} out"
            )
        from blockffn.objectives import OBJECTIVES

        for name, spec in self.objectives.terms.items():
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective {name!r} in objectives.terms{did_you_mean(name, OBJECTIVES)}")
            try:
                make_coefficient(spec)
            except ValueError as error:
                raise ValueError(f"objectives.terms.{name}: {error}") from error
        uses_chunks = "chunk_sparsification" in self.objectives.terms
        length, chunk = self.data.sequence_length, self.objectives.chunk_length
        if uses_chunks and length % chunk:
            raise ValueError(
                f"data.sequence_length ({length}) must be a multiple of objectives.chunk_length ({chunk}); "
                f"nearest: {max(length // chunk, 1) * chunk}"
            )
        if not 0.0 <= self.schedule.decay_fraction <= 1.0:
            raise ValueError(f"schedule.decay_fraction must lie in 0…1, got {self.schedule.decay_fraction}")


def check_data_of_run(run: Path, folder: str | Path, *, otherwise: str = "") -> None:
    """Raise `ValueError` unless a run's data folder, which may be relative, is there from here.

    Args:
        otherwise: what else may be done about it.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{run} was trained on {folder}, and there is no such folder from here; change to the folder where its "
            f"training began{otherwise}"
        )


def train_settings(size: str, method: str = "blockffn", changes: dict[str, Any] | None = None) -> TrainSettings:
    """Settings of a preset: the size's recipe, the method's objectives, then `changes` (nested) on top.

    Raises:
        ValueError: unknown size, method or setting, with the nearest valid name.
    """
    terms = objective_terms_of(size, method)
    values = merge({"size": size, "method": method}, RECIPES[size])
    values["objectives"] = {**values["objectives"], "terms": terms}
    return changed_settings(values, changes or {})


def changed_settings(values: dict[str, Any], changes: dict[str, Any]) -> TrainSettings:
    """Settings `values` (nested plain data) with `changes` on top.

    In `objectives.terms`, `null` switches an objective off, and a coefficient of another kind replaces the one that was
    there, since each kind has fields of its own.

    Raises:
        ValueError: unknown or wrong setting.
    """
    terms_before = values["objectives"]["terms"]
    values = merge(values, changes)
    terms = values["objectives"]["terms"] if isinstance(values["objectives"], dict) else None
    if isinstance(terms, dict):
        changed = changes.get("objectives", {}).get("terms", {})
        for name, spec in changed.items():
            if isinstance(spec, dict) and spec.get("kind") != terms_before.get(name, {}).get("kind") and "kind" in spec:
                terms[name] = spec
        values["objectives"] = {**values["objectives"], "terms": {k: v for k, v in terms.items() if v is not None}}
    return from_dict(TrainSettings, values)
