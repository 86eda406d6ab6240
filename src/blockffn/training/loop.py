"""The training loop, from settings to a saved model, in the order in which it happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockffn.errors import UserFacingError
from blockffn.settings import save_yaml
from blockffn.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from blockffn.training.clock import Clock, stop_signals
from blockffn.training.coefficients import Coefficient, make_coefficient
from blockffn.training.config import TrainSettings
from blockffn.training.distillation import open_teacher
from blockffn.training.distributed import World, open_world, wrap
from blockffn.training.gradients import step_gradients
from blockffn.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from blockffn.training.preparation import check_observations, make_loader, make_model, with_vocabulary
from blockffn.training.results import heldout_loss, save_model
from blockffn.training.run_log import RunLog, hold_folder
from blockffn.training.schedule import StepBudget, learning_rate_factor
from blockffn.training.statistics import StepStatistics
from blockffn.training.step import TrainingModel


class DivergedError(UserFacingError):
    """The loss is no longer a number; nothing is saved from then on."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. `interrupted`: a signal stopped it after a checkpoint; `resume=True` goes on from there."""

    run: Path
    step: int
    interrupted: bool
    seconds: float
    tokens: int


def train(
    settings: TrainSettings,
    run: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a model as `settings` say; everything it makes lies in the folder `run`.

    `run/` holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end, `model/` with the
    weights and the tokenizer in Hugging Face's layout. Ctrl-C finishes the step, writes a checkpoint and returns.

    Args:
        resume: go on from the newest checkpoint, exactly as if the run had not stopped.
        on_step: called after each step with its number; for tests and demos.

    Raises:
        ValueError: settings or data do not fit, or `run` holds a run and `resume` is false.
        CheckpointError: a checkpoint cannot be written or read.
        DivergedError: the loss is not finite.
    """
    with open_world(device) as world, ExitStack() as held:
        return _train(
            settings, run, world, held, resume=resume, progress=progress, on_step=on_step or (lambda step: None)
        )


def _train(
    settings: TrainSettings,
    run: Path,
    world: World,
    held: ExitStack,
    *,
    resume: bool,
    progress: bool,
    on_step: Callable[[int], None],
) -> TrainResult:
    if settings.max_seconds is not None and world.size > 1:
        raise ValueError(f"max_seconds ({settings.max_seconds}) is for one process; set steps for {world.size}")
    checkpoints = checkpoint_folders(run)
    if checkpoints and not resume:
        raise ValueError(f"{run} already holds a run (step {checkpoints[-1].name}); resume it or choose another folder")
    if resume and not checkpoints:
        raise ValueError(f"{run} holds no checkpoint to resume from; start it without resume")
    settings = with_vocabulary(settings)
    loader = make_loader(settings, world)
    run.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        held.enter_context(hold_folder(run))

    torch.manual_seed(settings.seed)
    model = make_model(settings)
    config = model.config
    model.to(device=world.device)  # type: ignore[call-arg]  # the wrapper that annotates it hides its arguments
    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    teacher = open_teacher(settings.teacher, model, precision=settings.precision, compile=settings.compile)
    module = TrainingModel(
        model, settings.objectives, precision=settings.precision, compile=settings.compile, teacher=teacher
    )
    wrapped = wrap(module, model.model.layers, world, parallel=settings.parallel, precision=settings.precision)
    optimizer = make_optimizer(model, settings.optimizer)
    coefficients = {name: make_coefficient(spec) for name, spec in settings.objectives.terms.items()}
    check_observations(coefficients)
    is_moe = config.ffn_type != "dense"
    names = ["language_model", *coefficients, "grad_norm", "num_targets", "num_tokens"]
    statistics = StepStatistics(
        names
        + (["distillation"] if teacher is not None else [])
        + (["active", "active_in_windows", "num_windows"] if is_moe else []),
        keep=max(settings.log_every, *(c.interval or 0 for c in coefficients.values()), 1),
        num_layers=config.num_moe_layers,
        num_experts=config.num_experts if is_moe else 0,
        num_shared_experts=config.num_shared_experts,
        world=world,
    )

    first_step, tokens, seconds_before = 0, 0, 0.0
    if resume:
        state = load_checkpoint(checkpoints[-1], wrapped, optimizer, world)
        first_step, tokens, seconds_before = state["step"], state["tokens"], state["seconds"]
        loader.load_state_dict(state["loader"])
        statistics.load_state_dict(state["statistics"])
        if set(state["coefficients"]) != set(coefficients):
            raise ValueError(
                f"{checkpoints[-1]} was written with the objectives {sorted(state['coefficients'])}, the settings name "
                f"{sorted(coefficients)}; objectives cannot change on resume"
            )
        for name, coefficient in coefficients.items():
            coefficient.load_state_dict(state["coefficients"][name])
    # Only now: a resume that is refused leaves the run as it was.
    if world.is_main:
        save_yaml(settings, run / "config.yaml")
    log = None
    if world.is_main:
        log = RunLog(run, first_step=first_step, steps=settings.steps, progress=progress)
        held.callback(log.close)

    def write_checkpoint(step: int) -> None:
        state = {
            "tokens": tokens,
            "seconds": seconds_before + clock.seconds,
            "loader": loader.state_dict(),
            "statistics": statistics.state_dict(),
            "coefficients": {name: c.state_dict() for name, c in coefficients.items()},
        }
        _check_finite(statistics.history[-1]["language_model"], step, settings)
        save_checkpoint(run, step, wrapped, optimizer, state, world, keep=settings.keep_checkpoints)

    clock = Clock()
    budget = StepBudget(settings.steps, settings.max_seconds, first_step=first_step)
    step, stop = first_step, False
    with stop_signals() as stopped:
        for step in range(first_step + 1, settings.steps + 1):
            total = budget.total(step, clock.seconds)
            # Randomness (of routers that sample) depends on the step alone, so a resumed run draws the same numbers.
            torch.manual_seed(settings.seed + 1_000_003 * step + world.rank)
            batch = loader.next()
            factor = learning_rate_factor(step - 1, steps=total, schedule=settings.schedule)
            set_learning_rate(optimizer, factor)
            values, loads = step_gradients(wrapped, batch, settings, coefficients, step, world)
            values["grad_norm"] = clip_gradients(optimizer, settings.optimizer.gradient_clip) / world.size
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            statistics.append(values, loads)
            tokens += batch.input_ids.numel() * world.size
            if log is not None:
                log.step()

            for coefficient in coefficients.values():
                if coefficient.interval and step % coefficient.interval == 0:
                    statistics.flush()
                    coefficient.observe(step, statistics.mean(coefficient.interval))
            evaluates = settings.evaluate_every and (step % settings.evaluate_every == 0 or step == total)
            if step == 1 or step % settings.log_every == 0 or step == total or evaluates:
                statistics.flush()
                means = statistics.mean(min(settings.log_every, step))
                record = _log_record(step, statistics, means, coefficients, settings, factor)
                record |= {"tokens": tokens, "seconds": seconds_before + clock.seconds}
                record["tokens_per_second"] = clock.rate(tokens)
                if evaluates:
                    with clock.paused():
                        record["heldout_loss"] = heldout_loss(model, wrapped, settings)
                if log is not None:
                    log.write(record)
                _check_finite(record["loss"], step, settings)
            on_step(step)
            # Processes receive a signal at different steps; they agree where they wait for each other anyway.
            agreed = world.size == 1 or step % settings.log_every == 0
            stop = agreed and world.any(stopped())
            if (settings.checkpoint_every and step % settings.checkpoint_every == 0) or stop:
                with clock.paused():
                    write_checkpoint(step)
            if stop or step == total:
                break
    interrupted = stop and step < total
    if not interrupted:
        if not settings.checkpoint_every or step % settings.checkpoint_every:
            write_checkpoint(step)
        save_model(run / "model", wrapped, model, settings, world)
    return TrainResult(run, step, interrupted, seconds_before + clock.seconds, tokens)


def _check_finite(loss: float, step: int, settings: TrainSettings) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {step}; lower optimizer.learning_rate ({settings.optimizer.learning_rate}) "
            "and start again, or resume from an earlier checkpoint"
        )


def _log_record(
    step: int,
    statistics: StepStatistics,
    means: dict[str, float],
    coefficients: dict[str, Coefficient],
    settings: TrainSettings,
    factor: float,
) -> dict[str, Any]:
    weights = {name: c.value(step) for name, c in coefficients.items()}
    record: dict[str, Any] = {
        "step": step,
        "lr": settings.optimizer.learning_rate * factor,
        "loss": means.get("distillation", means["language_model"])
        + sum(weights[name] * means[name] for name in weights),
        "language_model_loss": means["language_model"],
        "terms": {name: means[name] for name in weights},
        "coefficients": weights,
        "tls": means.get("tls"),
        "cls8": means.get("cls8"),
        "grad_norm": means["grad_norm"],
    }
    if "distillation" in means:
        record["distillation_loss"] = means["distillation"]
    if statistics.num_experts:
        loads = statistics.take_loads()
        record["dead_experts"] = sum(load == 0 for layer in loads for load in layer)
        busiest = [max(layer) * len(layer) / max(sum(layer), 1) for layer in loads]
        record["max_load"] = sum(busiest) / len(busiest)
    return record
