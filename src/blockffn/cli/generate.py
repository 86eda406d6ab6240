"""`blockffn generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockffn.cli.output import check_json, write_json

if TYPE_CHECKING:
    from blockffn.inference.statistics import GenerationStatistics


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
    top_k: Annotated[int, typer.Option(help="Sample from so many most likely tokens; 0: from all.", min=0)] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens at least this share as likely as the likeliest.", min=0.0, max=1.0)
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    threshold: Annotated[
        float | None, typer.Option(help="Skip experts with a routing weight up to this; default: the model's own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say what the request took and used.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and active experts to this file.")
    ] = None,
) -> None:
    """Continue a prompt, and say how many experts the tokens used.

    Example: blockffn generate runs/demo/blockffn --prompt 'def main('
    """
    from rich.console import Console

    from blockffn.evaluation.run import load_run
    from blockffn.evaluation.sample import describe
    from blockffn.inference.engine import Engine

    check_json(json_path)
    text = sys.stdin.read() if prompt == "-" else prompt
    model, tokenizer = load_run(path, device=device, threshold=threshold)
    engine = Engine(model, tokenizer)
    stream = engine.stream(
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    console = Console(highlight=False)
    console.out(text, style="dim", end="")
    for piece in stream:
        console.out(piece, end="")
    console.out()
    completion = stream.completion
    if json_path is not None:
        write_json(json_path, describe(engine, completion))
    note = f"{completion.statistics.tokens_per_second:.1f} tokens/s"
    if completion.statistics.tls is not None:
        note += f", {100 - completion.statistics.tls:.1f} % of the experts active for a token"
    errors = Console(stderr=True, highlight=False)
    errors.print(note, style="dim")
    if stats:
        for line in _lines(completion.statistics):
            errors.print(line, style="dim")


def _lines(statistics: GenerationStatistics) -> list[str]:
    """What `--stats` prints."""
    s = statistics
    decode = f", {s.decode_tokens_per_second:.1f} tokens/s" if s.decode_tokens_per_second else ""
    lines = [
        f"prompt    {s.prompt_tokens} tokens in {1e3 * s.prefill_seconds:.0f} ms, "
        f"{s.prefill_tokens_per_second:.1f} tokens/s",
        f"new       {s.new_tokens} tokens: {1e3 * s.decode_seconds:.0f} ms of model, "
        f"{1e3 * s.sampling_seconds:.0f} ms of sampling{decode}",
    ]
    if s.weight_bytes_per_token is not None:
        lines.append(f"weights   {s.weight_bytes_per_token / 1e6:.2f} MB read per token")
    if s.tls is not None and s.union_share is not None:
        lines.append(f"sparsity  {s.tls:.1f} % (TLS); a step reads {s.union_share:.1f} % of the experts")
    return lines
