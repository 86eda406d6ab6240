"""`blockffn write`: documents that a model samples, as JSON lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_file, print_next
from blockffn.wording import counted, counting_bar


def register(app: typer.Typer) -> None:
    app.command("write")(write)


def write(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: JSON lines, for blockffn prepare.")],
    data: Annotated[Path, typer.Option(help="Prepared text whose beginnings are continued.")],
    documents: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    opening_tokens: Annotated[int, typer.Option(help="Tokens of text that each begins with.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 496,
    batch_size: Annotated[int, typer.Option(help="Documents at once.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 (default on cuda).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
) -> None:
    """Let a model write text that another shall learn from.

    Example: blockffn write dense --data runs/books --documents 2000 --out own.jsonl
    """
    import json

    import torch
    from rich.console import Console
    from tqdm import tqdm

    from blockffn.evaluation.run import load_run
    from blockffn.evaluation.writing import openings_of, write_documents
    from blockffn.sparsify.passages import check_tokenizer

    if precision not in (None, "float32", "bfloat16"):
        raise ValueError(f"--precision {precision} is neither float32 nor bfloat16")
    check_file("--out", out)
    console = Console()
    model, tokenizer = load_run(path, device=device)
    half = precision == "bfloat16" or (precision is None and model.device.type == "cuda")
    model.to(dtype=torch.bfloat16 if half else torch.float32)  # type: ignore[call-arg]
    check_tokenizer(data, tokenizer)
    openings = openings_of(data, count=documents, length=opening_tokens)
    texts = write_documents(
        model, tokenizer, openings, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature,
        top_p=top_p, seed=seed,
    )  # fmt: skip
    torn = out.with_name(out.name + ".partial")
    with torn.open("w", encoding="utf-8") as file:
        for text in tqdm(
            texts, desc="writing", total=documents, bar_format=counting_bar("documents"), leave=False,
            dynamic_ncols=True, disable=not sys.stderr.isatty(),
        ):  # fmt: skip
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    torn.replace(out)
    console.print(f"{counted(documents, 'document')} in {out}")
    print_next(console, f"blockffn prepare {out} --tokenizer {path} --out FOLDER")
