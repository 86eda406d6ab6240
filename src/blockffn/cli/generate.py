"""`blockffn generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from blockffn.cli.output import check_json, doing, print_lines, print_text, write_json
from blockffn.wording import counted

if TYPE_CHECKING:
    from blockffn.inference.speculative.statistics import SpeculationStatistics
    from blockffn.inference.statistics import GenerationStatistics

SHOWN_POSITIONS = 10  # of the drafts; they fit into a line


class OptionalValue(TyperCommand):
    """`--speculative` may stand alone, which the command-line library has no way to say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "--"]
        given = [
            f"{arg}=auto" if arg == "--speculative" and next_.startswith("-") else arg
            for arg, next_ in zip(args, following)
        ]
        return super().parse_args(ctx, given)


def register(app: typer.Typer) -> None:
    app.command("generate", cls=OptionalValue)(generate)


def generate(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
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
    speculative: Annotated[
        str | None,
        typer.Option(
            metavar="[ngram|FOLDER]",
            help="Draft several tokens a step: by n-grams of the text, or by a trained draft or a smaller model. "
            "Without a value: by the folder draft in the model's, or else by n-grams.",
            show_default=False,
        ),
    ] = None,
    tree: Annotated[
        str,
        typer.Option(
            metavar="[auto|N|chain:N]",
            help="Draft tokens a step. auto: as many as pay; it measures that first. chain:N: without branches.",
        ),
    ] = "auto",
    check_lossless: Annotated[
        bool, typer.Option("--check-lossless", help="Decode without drafts as well; exit code 1 if the tokens differ.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the model; auto: the fastest that can.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the backend's weights; auto: the model's own.")] = "auto",
    screen_head: Annotated[
        str | None,
        typer.Option(
            metavar="[int8|int4]",
            help="Greedily or with --top-k: read the head in so many bits first, and exactly only where it may matter.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say what the request took and used.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and active experts to this file.")
    ] = None,
) -> None:
    """Continue a prompt, and say how many experts the tokens used.

    Example: blockffn generate runs/demo/blockffn --prompt 'def main('

    With drafts: blockffn generate runs/demo/blockffn --prompt 'def main(' --speculative --stats
    """
    from rich.console import Console

    from blockffn.evaluation.run import load_run
    from blockffn.evaluation.sample import describe
    from blockffn.inference.backends import make_target
    from blockffn.inference.drafts import check_draft, resolve_draft, tree_shape
    from blockffn.inference.engine import Engine
    from blockffn.inference.head_screen import SCREEN_FORMATS
    from blockffn.ops.native import MAX_BEST

    check_json(json_path)
    tree_shape(tree)
    if speculative is None and (tree != "auto" or check_lossless):
        raise ValueError("--tree and --check-lossless go with --speculative")
    if screen_head not in (None, *SCREEN_FORMATS):
        raise ValueError(f"--screen-head takes {' or '.join(SCREEN_FORMATS)}, got {screen_head!r}")
    if screen_head is not None and (repetition_penalty != 1 or (temperature > 0 and not 0 < top_k <= MAX_BEST)):
        raise ValueError(
            f"--screen-head goes with --temperature 0 or --top-k up to {MAX_BEST}, and without --repetition-penalty; "
            "otherwise the whole head is read"
        )
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, markup=False)
    text = _standard_input() if prompt == "-" else prompt
    draft = None if speculative is None else resolve_draft(path, speculative)
    if draft is not None:
        check_draft(draft)
    model, tokenizer = load_run(path, device=device, threshold=threshold)
    with doing(errors, "packing the weights"):
        target = make_target(model, backend=backend, precision=precision, screen_head=screen_head)
    with doing(errors, "loading the draft and measuring what it costs" if draft is not None else "getting ready"):
        engine = Engine(model, tokenizer, target=target, draft=draft, tree=tree)
    if draft is not None:
        source = "n-grams of the text" if draft == "ngram" else str(draft)
        alone = f"; {path} has no folder draft" if speculative == "auto" and draft == "ngram" else ""
        print_text(errors, f"drafts by {source}{alone}", style="dim")
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
        check_lossless=check_lossless,
    )
    console.out(text, style="dim", end="")
    for piece in stream:
        console.out(piece, end="")
    console.out()
    completion = stream.completion
    if json_path is not None:
        write_json(json_path, describe(engine, completion))
    statistics = completion.statistics
    note = f"{statistics.tokens_per_second:.1f} tokens/s"
    if statistics.speculation is not None and statistics.speculation.acceptance_length is not None:
        note += f", {statistics.speculation.acceptance_length:.2f} tokens a step"
    if statistics.tls is not None:
        note += f", {100 - statistics.tls:.1f} % of the experts active for a token"
    print_text(errors, note, style="dim")
    if stats:
        print_lines(errors, [(line[:10].rstrip(), line[10:]) for line in _lines(statistics)], left=True, style="dim")
    if completion.difference is not None:
        print_text(errors, f"not lossless: {completion.difference}")
        raise typer.Exit(1)
    if completion.checked:
        same = counted(len(completion.token_ids), "token")
        print_text(errors, f"lossless: plain decoding gives the same {same}", style="dim")


def _standard_input() -> str:
    """All of it. Raises `ValueError` where it is closed or no text."""
    if sys.stdin is None:
        raise ValueError("--prompt - reads standard input, which is closed; give the text itself, or a pipe")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}); convert it first") from error


def _lines(statistics: GenerationStatistics) -> list[str]:
    """What `--stats` prints."""
    s = statistics
    decode = f", {s.decode_tokens_per_second:.1f} tokens/s" if s.decode_tokens_per_second else ""
    drafting = f"{1e3 * s.draft_seconds:.0f} ms of drafting, " if s.speculation is not None else ""
    lines = [
        f"prompt    {counted(s.prompt_tokens, 'token')} in {1e3 * s.prefill_seconds:.0f} ms, "
        f"{s.prefill_tokens_per_second:.1f} tokens/s",
        f"new       {counted(s.new_tokens, 'token')}: {1e3 * s.decode_seconds:.0f} ms of model, {drafting}"
        f"{1e3 * s.sampling_seconds:.0f} ms of sampling{decode}",
    ]
    if s.weight_bytes_per_token is not None:
        lines.append(f"weights   {s.weight_bytes_per_token / 1e6:.2f} MB read per token")
    if s.tls is not None and s.union_share is not None:
        lines.append(f"sparsity  {s.tls:.1f} % (TLS); a step reads {s.union_share:.1f} % of the experts")
    if s.head_share is not None:
        whole = f"; all of it in {s.whole_heads} of {counted(s.steps, 'step')}" if s.whole_heads else ""
        lines.append(f"head      {100 * s.head_share:.1f} % read beside its screen{whole}")
    return lines if s.speculation is None else lines + _acceptance(s.speculation)


def _acceptance(s: SpeculationStatistics) -> list[str]:
    """What became of the drafts: how long the accepted paths are, and how often a position of one is right."""
    if s.acceptance_length is None or s.tree_size is None:
        return ["drafts    none: the prompt gave all tokens"]
    lines = [
        f"drafts    {s.acceptance_length:.2f} tokens a step (acceptance length) in {counted(s.verifications, 'step')}; "
        f"{s.tree_size:.1f} draft tokens a step, at most {s.largest_tree}"
    ]
    if s.tried:
        rows = {
            "position": [str(position) for position in range(1, SHOWN_POSITIONS + 1)],
            "accepted": [f"{100 * share:.0f} %" for share in s.acceptance_by_depth],
            "of": [str(tried) for tried in s.tried],
        }
        shown = min(len(s.tried), SHOWN_POSITIONS)
        width = max(len(cell) for cells in rows.values() for cell in cells)
        for name, cells in rows.items():
            lines.append(f"{name:10s}" + " ".join(cell.rjust(width) for cell in cells[:shown]))
    return lines
