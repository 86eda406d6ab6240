"""Checkpoints of a run: written beside and renamed, so that a full disk or a kill never costs the previous one.

A checkpoint is a folder `step-00000100` with the distributed checkpoint of model and optimiser (readable on any number
of ranks), `state.json` (step, coefficients, data position, recent history) and the size of every file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from blockffn.errors import UserFacingError
from blockffn.training.distributed import World

FORMAT = 1


class CheckpointError(UserFacingError):
    """A checkpoint cannot be written or read; the message names the folder, the reason and what is left."""


def checkpoint_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(f for f in folders if f.is_dir() and not f.name.endswith(".tmp") and (f / "state.json").is_file())


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], world: World, *, keep: int
) -> Path:
    """Write `run/checkpoints/step-…`, then delete all but the newest `keep`.

    Raises:
        CheckpointError: writing failed (a full disk, say); earlier checkpoints are untouched and the torn one is gone.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    torn = final.with_name(final.name + ".tmp")
    try:
        if world.is_main:
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir(parents=True)
        world.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        _quiet()
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=torn, no_dist=world.size == 1)
        world.barrier()
        if world.is_main:
            sizes = {p.name: p.stat().st_size for p in sorted(torn.iterdir())}
            text = json.dumps({"format": FORMAT, "step": step, "files": sizes, **state}, indent=1)
            (torn / "state.json").write_text(text, encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            torn.rename(final)
            for old in checkpoint_folders(run)[:-keep]:
                shutil.rmtree(old)
        world.barrier()
    except Exception as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(torn, ignore_errors=True)
        left = checkpoint_folders(run)
        safe = f"the checkpoint {left[-1]} is intact" if left else "no earlier checkpoint exists"
        raise CheckpointError(
            f"cannot write {final}: {_reason(error)}; {safe}. Free some space, then resume."
        ) from error
    return final


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> dict[str, Any]:
    """Fill model and optimiser in place and return the saved state.

    Raises:
        CheckpointError: a file is missing, truncated or of another model; the message names it.
    """
    state = read_state(folder)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        _quiet()
        content: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(content, checkpoint_id=folder, no_dist=world.size == 1)
    except Exception as error:
        raise CheckpointError(
            f"{folder} does not fit this run: {_reason(error)}. Resume with the run's own settings, or start anew."
        ) from error
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, once every file of it has its recorded size."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_others(folder)}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}, this version reads {FORMAT}")
    for name, size in state["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise CheckpointError(f"{folder / name} is truncated: {found} of {size} bytes; {_others(folder)}")
    return state


def _quiet() -> None:
    """A single process is what was asked for; the library need not warn of it at every checkpoint."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _others(folder: Path) -> str:
    others = [f.name for f in checkpoint_folders(folder.parent.parent) if f != folder]
    return f"delete {folder} to resume from {others[-1]}" if others else "no other checkpoint exists; start anew"


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line: distributed checkpoints wrap what went wrong."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".split("\n")[0]
