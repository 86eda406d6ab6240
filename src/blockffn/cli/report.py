"""`blockffn report`: figures and one HTML page from a run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_folder


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    twin: Annotated[Path | None, typer.Option(help="Folder of a dense run on the same tokens, for comparison.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: the run's.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Draw what a run did: loss and sparsity against steps, windows, experts, and its text coloured by experts.

    Run blockffn evaluate first; what is missing is said on the page. Reads files only, so it is quick.
    """
    from blockffn.reporting import write_report
    from blockffn.reporting.run import load_run

    load_run(run)  # what is no run makes no folder
    check_folder("--out", out)

    page = write_report(run, twin=twin, out=out, title=title)
    print(f"report: {page}\nfigures: {page.parent / 'figures'}")
