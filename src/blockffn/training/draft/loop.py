"""The training of a draft, from settings to a saved head and its card, in the order in which it happens."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockffn.settings import save_yaml
from blockffn.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from blockffn.training.clock import Clock, stop_signals
from blockffn.training.distributed import World, open_world
from blockffn.training.draft.objective import DraftObjective
from blockffn.training.draft.preparation import (
    check_draft_settings,
    make_draft,
    make_draft_loader,
    open_target,
    uses_bfloat16,
)
from blockffn.training.draft.results import heldout_acceptance, rates, save_run
from blockffn.training.draft.settings import DraftTrainSettings
from blockffn.training.loop import DivergedError, TrainResult
from blockffn.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from blockffn.training.run_log import RunLog, hold_folder
from blockffn.training.schedule import StepBudget, learning_rate_factor
from blockffn.training.statistics import StepStatistics

SHOWN = (("loss", "loss", "{:.3f}"), ("acceptance_length", "tokens/step", "{:.2f}"),
         ("heldout_acceptance_length", "held out", "{:.2f}"))  # fmt: skip


def train_draft(
    settings: DraftTrainSettings,
    run: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a draft as `settings` say; everything it makes lies in the folder `run`.

    `run/` holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end, `model/` with the
    draft, as `load_draft` reads it, and its card `draft.json`. Ctrl-C finishes the step, writes a checkpoint and
    returns.

    Args:
        resume: go on from the newest checkpoint, exactly as if the run had not stopped.
        on_step: called after each step with its number; for tests and demos.

    Raises:
        ValueError: settings, target or data do not fit, or `run` holds a run and `resume` is false.
        CheckpointError: a checkpoint cannot be written or read.
        DivergedError: the loss is not finite.
    """
    with open_world(device) as world, ExitStack() as held:
        return _train(
            settings, run, world, held, resume=resume, progress=progress, on_step=on_step or (lambda step: None)
        )


def _train(
    settings: DraftTrainSettings,
    run: Path,
    world: World,
    held: ExitStack,
    *,
    resume: bool,
    progress: bool,
    on_step: Callable[[int], None],
) -> TrainResult:
    if world.size > 1:
        raise ValueError(f"a draft is trained in one process, this is one of {world.size}; start it without torchrun")
    checkpoints = checkpoint_folders(run)
    if checkpoints and not resume:
        raise ValueError(f"{run} already holds a run (step {checkpoints[-1].name}); resume it or choose another folder")
    if resume and not checkpoints:
        raise ValueError(f"{run} holds no checkpoint to resume from; start it without resume")
    check_draft_settings(settings)
    loader = make_draft_loader(settings, world)
    target = open_target(settings, world.device)
    torch.manual_seed(settings.seed)
    draft = make_draft(settings, target)
    run.mkdir(parents=True, exist_ok=True)
    held.enter_context(hold_folder(run))

    objective = DraftObjective(
        draft,
        target,
        settings,
        autocast=uses_bfloat16(settings, world.device),
        compile=world.device.type == "cuda" if settings.compile is None else settings.compile,
    )
    optimizer = make_optimizer(draft, settings.optimizer)
    passes = range(1, settings.unroll + 1)
    names = [f"{name}_{step}" for name in ("token", "feature", "accepted", "tried") for step in passes]
    statistics = StepStatistics(
        ["loss", "grad_norm", *names], keep=settings.log_every, num_layers=0, num_experts=0, world=world
    )
    first_step, tokens, seconds_before = 0, 0, 0.0
    if resume:
        state = load_checkpoint(checkpoints[-1], draft, optimizer, world)
        first_step, tokens, seconds_before = state["step"], state["tokens"], state["seconds"]
        loader.load_state_dict(state["loader"])
        statistics.load_state_dict(state["statistics"])
    # Only now: a resume that is refused leaves the run as it was.
    save_yaml(settings, run / "config.yaml")
    log = RunLog(run, first_step=first_step, steps=settings.steps, progress=progress, shown=SHOWN)
    held.callback(log.close)

    def write_checkpoint(step: int) -> None:
        state = {
            "tokens": tokens,
            "seconds": seconds_before + clock.seconds,
            "loader": loader.state_dict(),
            "statistics": statistics.state_dict(),
        }
        _check_finite(statistics.history[-1]["loss"], step, settings)
        save_checkpoint(run, step, draft, optimizer, state, world, keep=settings.keep_checkpoints)

    clock = Clock()
    budget = StepBudget(settings.steps, settings.max_seconds, first_step=first_step)
    step, stop = first_step, False
    with stop_signals() as stopped:
        for step in range(first_step + 1, settings.steps + 1):
            total = budget.total(step, clock.seconds)
            batch = loader.next()
            factor = learning_rate_factor(step - 1, steps=total, schedule=settings.schedule)
            set_learning_rate(optimizer, factor)
            values = objective.losses(batch)
            values["loss"].backward()
            values["grad_norm"] = clip_gradients(optimizer, settings.optimizer.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            statistics.append(_by_pass(values), None)
            tokens += batch.input_ids.numel()
            log.step()

            evaluates = settings.evaluate_every and (step % settings.evaluate_every == 0 or step == total)
            if step == 1 or step % settings.log_every == 0 or step == total or evaluates:
                statistics.flush()
                record = _log_record(step, statistics.mean(min(settings.log_every, step)), settings, factor)
                record |= {"tokens": tokens, "seconds": seconds_before + clock.seconds}
                record["tokens_per_second"] = clock.rate(tokens)
                if evaluates:
                    with clock.paused():
                        found = heldout_acceptance(objective, settings)
                        record |= {f"heldout_{name}": value for name, value in found.items()}
                log.write(record)
                _check_finite(record["loss"], step, settings)
            on_step(step)
            stop = stopped()
            if (settings.checkpoint_every and step % settings.checkpoint_every == 0) or stop:
                with clock.paused():
                    write_checkpoint(step)
            if stop or step == total:
                break
    interrupted = stop and step < total
    seconds = seconds_before + clock.seconds
    if not interrupted:
        if not settings.checkpoint_every or step % settings.checkpoint_every:
            write_checkpoint(step)
        if progress:
            print(f"trained; writing {run / 'model'}, then measuring its acceptance on held-out text", file=sys.stderr)
        save_run(run / "model", objective, settings, progress={"steps": step, "tokens": tokens, "seconds": seconds})
    return TrainResult(run, step, interrupted, seconds, tokens)


def _by_pass(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors `[S]` as numbers of their own."""
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.ndim:
            flat |= {f"{name}_{i}": part for i, part in enumerate(value.detach().unbind(), start=1)}
        else:
            flat[name] = value
    return flat


def _log_record(step: int, means: dict[str, float], settings: DraftTrainSettings, factor: float) -> dict[str, Any]:
    def of(name: str) -> list[float]:
        return [means[f"{name}_{i}"] for i in range(1, settings.unroll + 1)]

    return {
        "step": step,
        "lr": settings.optimizer.learning_rate * factor,
        "loss": means["loss"],
        "token_loss": of("token"),
        "feature_loss": of("feature"),
        **rates(of("accepted"), of("tried")),
        "grad_norm": means["grad_norm"],
    }


def _check_finite(loss: float, step: int, settings: DraftTrainSettings) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {step}; lower optimizer.learning_rate ({settings.optimizer.learning_rate}) "
            "and start again, or resume from an earlier checkpoint"
        )
