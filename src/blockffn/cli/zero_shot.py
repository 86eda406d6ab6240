"""`blockffn zero-shot`: minimal pairs and last words, for any causal language model in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockffn.cli.output import check_json, write_json


def register(app: typer.Typer) -> None:
    app.command("zero-shot")(zero_shot)


def zero_shot(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of any Hugging Face model.", show_default=False)
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="blimp=FILE or lambada=FILE: JSON lines, plain or .xz."),
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder with blimp.jsonl.xz and lambada.jsonl.xz.")] = None,
    limit: Annotated[int | None, typer.Option(help="First so many pairs of a paradigm, or passages.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 (default on cuda).")] = None,
    target_delimiter: Annotated[str, typer.Option(help="What precedes each sentence of a pair.")] = " ",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file, too.")] = None,
) -> None:
    """Score a model on BLiMP (is the grammatical sentence likelier?) and LAMBADA (is the last word predicted?).

    Numbers equal those of lm-evaluation-harness on the same data; docs/evaluation.md has the conventions.
    """
    from rich.console import Console

    check_json(json_path)
    if precision not in (None, "float32", "bfloat16"):
        raise ValueError(f"--precision {precision} is neither float32 nor bfloat16")

    from blockffn.evaluation.run import load_any
    from blockffn.evaluation.zero_shot import find_tasks
    from blockffn.evaluation.zero_shot import zero_shot as run_tasks
    from blockffn.reporting.tables import zero_shot_tables

    files = {} if tasks_dir is None else find_tasks(tasks_dir)
    files |= dict(_named_file(one) for one in task or [])
    if not files:
        raise ValueError("no task: give --task blimp=FILE, --task lambada=FILE or --tasks-dir FOLDER")
    model, tokenizer = load_any(path, device=device)
    kind = next(model.parameters()).device.type
    precision = precision or ("bfloat16" if kind == "cuda" else "float32")
    results = run_tasks(model, tokenizer, files, limit=limit, precision=precision, target_delimiter=target_delimiter)
    values: dict[str, Any] = {
        "model": str(path),
        "device": kind,
        "precision": precision,
        "limit": limit,
        "target_delimiter": target_delimiter,
        "tasks": results,
    }
    write_json(json_path, values)
    console = Console()
    for table in zero_shot_tables(results):
        console.print(table)
        console.print()


def _named_file(text: str) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if not separator or not file:
        raise ValueError(f"--task {text} is not NAME=FILE, such as --task blimp=blimp.jsonl.xz")
    return name, Path(file)
