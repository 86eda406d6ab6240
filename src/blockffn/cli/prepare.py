"""`blockffn prepare`: text to tokenised shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import print_next
from blockffn.wording import counted


def register(app: typer.Typer) -> None:
    app.command("prepare")(prepare)


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text files, JSON lines (.jsonl, also .gz, .xz, .zst), folders of text or source files, a "
            "Hugging Face dataset (folder or id), or the names [bold]stdlib[/] and [bold]synthetic[/].",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It is made whole or not at all.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="An existing tokenizer (folder or id). Without it a BPE tokenizer is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer that is trained.")] = 8192,
    valid: Annotated[
        list[str] | None, typer.Option(help="Sources held out as a whole; without it a share of the documents is.")
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents held out when --valid is not given.")
    ] = 0.01,
    text_field: Annotated[str, typer.Option(help="Field of JSON lines and datasets that holds the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="Field that labels a document; evaluation then has a row for each label.")
    ] = None,
) -> None:
    """Turn text into shards that training reads.

    Example: blockffn prepare books.jsonl.xz --out runs/books --vocab-size 16384
    """
    from rich.console import Console

    from blockffn.data.prepare import prepare as prepare_folder

    console = Console()
    manifest = prepare_folder(
        sources,
        out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        valid_sources=valid,
        valid_fraction=valid_fraction,
        text_field=text_field,
        source_field=source_field,
        progress=sys.stderr.isatty(),
    )
    for name, split in manifest.splits.items():
        sizes = (split.documents, "document"), (split.tokens, "token"), (split.bytes, "byte")
        console.print(f"{name:>6}: " + ", ".join(counted(number, noun) for number, noun in sizes))
    console.print(f"vocabulary {manifest.vocab_size:,}; written to {out}")
    print_next(console, f"blockffn train --data {out} --out runs/my-model")
