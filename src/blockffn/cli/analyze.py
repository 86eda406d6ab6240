"""`blockffn analyze`: what a checkpoint's routing does, as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_folder, check_json, write_json


def register(app: typer.Typer) -> None:
    app.command("analyze")(analyze)


def analyze(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Prepared folder; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the prepared folder.")] = "valid",
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a row; default: the run's.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Read only so many rows, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    trees: Annotated[int, typer.Option(help="Draft so many trees for the union of their experts; 0 for none.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures (PNG).")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all tables, and the numbers behind them, to this file.")
    ] = None,
) -> None:
    """Reuse and load by layer, CLS by window, experts by kind of token, magnitude by depth: the paper's other evidence.

    One pass over held-out text; memory does not grow with it.
    """
    import time

    from rich.console import Console

    from blockffn.evaluation.analysis import analyze as measure
    from blockffn.evaluation.machine import describe_machine
    from blockffn.evaluation.run import heldout_batches, load_run
    from blockffn.evaluation.token_classes import token_classes
    from blockffn.reporting.evidence import evidence_document, section_table

    check_json(json_path)
    check_folder("--figures", figures)
    model, tokenizer = load_run(path, device=device)
    batches, _ = heldout_batches(
        path,
        model,
        tokenizer,
        data=data,
        split=split,
        sequence_length=sequence_length,
        max_rows=max_rows,
        batch_size=batch_size,
    )
    findings = measure(model, batches, token_classes(tokenizer, model.config.vocab_size), num_trees=trees)
    document = evidence_document(
        findings,
        model=str(path),
        machine=describe_machine(next(model.parameters()).device),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        folder=figures,
    )
    write_json(json_path, {**document, "findings": findings})
    console = Console(highlight=False)
    for section in document["sections"]:
        console.print(section["title"], style="bold")
        console.print(section_table(section))
        console.print(f"{section.get('note', '')}\n", style="dim")
