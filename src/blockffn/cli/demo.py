"""`blockffn demo`: the whole path in a few minutes, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_json, print_next, write_json


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, as for blockffn train.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("runs/demo"),
    with_dense: Annotated[
        bool, typer.Option("--with-dense", help="Train the dense twin on the same tokens, too, and compare.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the summary to this file.")] = None,
) -> None:
    """Train a small BlockFFN model on Python's standard library, in minutes, and show what it learnt.

    You see its loss fall while its sparsity rises, read text that it wrote, and get a report with plots.
    """
    from rich.console import Console
    from rich.text import Text

    from blockffn.settings import parse_overrides

    check_json(json_path)
    console = Console(highlight=False)
    changes = parse_overrides(overrides or [])

    from blockffn.demo import PROMPT, run_demo
    from blockffn.reporting.tables import summary_table

    summary = run_demo(
        out,
        with_dense=with_dense,
        changes=changes,
        say=lambda line: console.print(f"[bold cyan]›[/] {line}"),
    )
    console.print()
    console.print(Text(PROMPT, style="dim"), end="")
    console.print(Text(summary["sample"].rstrip()))
    console.print()
    shown = ("heldout_loss", "dense_heldout_loss", "perplexity", "dense_perplexity", "tls", "cls8",
             "reuse_ratio", "steps", "tokens_per_second", "seconds")  # fmt: skip
    console.print(summary_table({key: summary[key] for key in shown if key in summary}))
    console.print(
        "TLS: experts that a token leaves idle. CLS8: experts that eight tokens in a row leave idle. "
        "Reuse: experts that the next token uses again.",
        style="dim",
    )
    console.print(f"report: [bold]{summary['report']}[/]", soft_wrap=True)
    print_next(console, f"blockffn generate {out / 'blockffn'} --prompt 'import '")
    write_json(json_path, summary)
