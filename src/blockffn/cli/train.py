"""`blockffn train`: one run, from a preset and dotted overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from blockffn.cli.output import check_json, print_next, write_json
from blockffn.wording import counted


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings to change, for example steps=2000 optimizer.learning_rate=0.02 model.num_experts=64 "
            "objectives.terms.chunk_sparsification.value=0.1. --show-settings prints all of them.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Folder made by blockffn prepare; repeat it, with =WEIGHT, for a mixture.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", "--size", help="Size, see blockffn presets; default nano.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method, see blockffn presets; default blockffn.")] = None,
    target_sparsity: Annotated[
        float | None,
        typer.Option(help="Token-level sparsity to reach, in percent: a controller sets the sparsity coefficient."),
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a model to go on from, with its own architecture.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of a model to learn from; teacher.share says how much of the loss.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print the resolved settings and stop.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the outcome as JSON to this file.")] = None,
) -> None:
    """Train a model. Under torchrun it uses every process; Ctrl-C leaves a checkpoint that --resume goes on from.

    Example: blockffn train --preset nano --data runs/books --out runs/nano steps=2000
    """
    from rich.console import Console

    from blockffn.settings import load_yaml, merge, parse_overrides, to_dict
    from blockffn.training.config import TrainSettings, changed_settings, check_data_of_run, train_settings

    console = Console()
    check_json(json_path)
    changes = parse_overrides(overrides or [])
    if resume:
        decided = {"--data": data, "--preset": preset, "--method": method, "--target-sparsity": target_sparsity,
                   "--start-from": start_from, "--teacher": teacher}  # fmt: skip
        for option, value in decided.items():
            if value is not None:
                raise ValueError(f"{option} was decided when the run began; --resume takes it from the run's settings")
        if out is None:
            raise ValueError("--resume needs the run's folder: --out FOLDER")
        if not (out / "config.yaml").is_file():
            raise ValueError(f"{out} holds no run (no config.yaml); start one without --resume")
        settings = load_yaml(TrainSettings, out / "config.yaml")
        settings = changed_settings(to_dict(settings), changes)
        for folder in settings.data.folders:
            check_data_of_run(out, folder)
    else:
        if data:
            changes = merge({"data": {"folders": folder_weights(data)}}, changes)
        if target_sparsity is not None:
            changes = merge(_set_point(target_sparsity), changes)
        if start_from is not None:
            changes = merge({"start_from": str(start_from)}, changes)
        if teacher is not None:
            changes = merge({"teacher": {"folder": str(teacher)}}, changes)
        settings = train_settings(preset or "nano", method or "blockffn", changes)
    if show_settings:
        import yaml

        console.print(yaml.safe_dump(to_dict(settings), sort_keys=False), end="", highlight=False)
        return
    if out is None:
        raise ValueError("give the folder of the run: --out FOLDER")

    from blockffn.training.loop import train as run_training

    result = run_training(settings, out, resume=resume, device=device, progress=True)
    if os.environ.get("RANK", "0") != "0":
        return
    outcome = {"run": str(result.run), "step": result.step, "interrupted": result.interrupted,
               "seconds": result.seconds, "tokens": result.tokens}  # fmt: skip
    write_json(json_path, outcome)
    if result.interrupted:
        console.print(f"stopped after step {result.step}; go on with: blockffn train --resume --out {out}")
        raise typer.Exit(130)
    console.print(
        f"trained {counted(result.step, 'step')} on {counted(result.tokens, 'token')} in "
        f"{result.seconds:.0f} s; model in {out / 'model'}"
    )
    print_next(console, f"blockffn evaluate {out}", f"blockffn report {out}", f"blockffn generate {out} --prompt '…'")


def folder_weights(data: list[str]) -> dict[str, float]:
    """`["a", "b=0.5"]` to weights; a folder without one weighs 1."""
    folders = {}
    for item in data:
        folder, separator, weight = item.rpartition("=")
        try:
            folders[folder if separator else item] = float(weight) if separator else 1.0
        except ValueError:
            raise ValueError(f"--data {item!r}: the weight after '=' must be a number, got {weight!r}") from None
    return folders


def _set_point(target: float) -> dict[str, Any]:
    if not 0 < target < 100:
        raise ValueError(f"--target-sparsity is a percentage between 0 and 100, got {target}")
    controller = {"kind": "set_point", "initial": 0.2, "target": target, "observes": "tls"}
    return {"objectives": {"terms": {"chunk_sparsification": controller}}}
