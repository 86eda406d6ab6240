"""`blockffn formats`: what a packed weight format quantises, and the error of each format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_json, print_table, table_console, write_json
from blockffn.cli.weights import errors_table, share_lines, weights_table


def register(app: typer.Typer) -> None:
    app.command("formats")(formats)


def formats(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    format: Annotated[str, typer.Option(help="Format whose tensors are listed: f32, bf16, int8 or int4.")] = "int8",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write both tables to this file.")] = None,
) -> None:
    """List which tensors a format quantises and with what error, then the error of every format on FFN outputs."""
    check_json(json_path)

    from dataclasses import asdict

    from blockffn.checkpoints.quantize import is_packed
    from blockffn.evaluation.formats import format_errors, stored_weights
    from blockffn.evaluation.run import load_run

    model, _ = load_run(path, device="cpu")
    if is_packed(model):
        raise ValueError(f"{path} is quantised already; name the model that it was made from")
    weights = stored_weights(model, format, group_size=group_size)
    errors = format_errors(model, group_size=group_size)
    console = table_console()
    print_table(console, weights_table(weights))
    for line in share_lines(weights):
        console.print(line)
    console.print()
    print_table(console, errors_table(errors))
    write_json(
        json_path,
        {"model": str(path), "group_size": group_size, "tensors": [asdict(w) for w in weights],
         "formats": [asdict(row) for row in errors]},
    )  # fmt: skip
