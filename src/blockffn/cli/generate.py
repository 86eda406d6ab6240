"""`blockffn generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_json, write_json


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of a model.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens of this total probability.", min=0.0, max=1.0)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    threshold: Annotated[
        float | None, typer.Option(help="Skip experts with a routing weight up to this; default: the model's own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and active experts to this file.")
    ] = None,
) -> None:
    """Continue a prompt, and say how many experts the tokens used.

    Example: blockffn generate runs/demo/blockffn --prompt 'def main('
    """
    from rich.console import Console

    from blockffn.evaluation.run import load_run
    from blockffn.evaluation.sample import generate_sample

    check_json(json_path)
    text = sys.stdin.read() if prompt == "-" else prompt
    model, tokenizer = load_run(path, device=device, threshold=threshold)
    sample = generate_sample(
        model, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    write_json(json_path, sample)
    console = Console(highlight=False, soft_wrap=True)
    console.print(text, style="dim", end="", markup=False)
    console.print(sample["text"], markup=False)
    shares = [t["active_share"] for t in sample["tokens"] if t["generated"] and "active_share" in t]
    note = f"{sample['tokens_per_second']:.1f} tokens/s"
    if shares:
        note += f", {sum(shares) / len(shares):.1f} % of the experts active for a token"
    Console(stderr=True, highlight=False).print(note, style="dim")
