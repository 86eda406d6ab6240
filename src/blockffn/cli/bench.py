"""`blockffn bench`: how fast a model decodes, beside others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockffn.cli.output import check_json, check_plot, print_table, print_text, table_console, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from blockffn.evaluation.decoding.bench import BenchReport
    from blockffn.evaluation.decoding.prompts import Prompt

app = typer.Typer(no_args_is_help=True, help="Measure speed.")


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")


@app.callback()
def _bench() -> None:
    """Measure speed."""


@app.command("decode")
def decode(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    dense: Annotated[Path | None, typer.Option(help="Dense twin: ratios refer to its plain decoding.")] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="ngram, a trained draft's folder, auto (that beside the model, or else ngram), none, or oracle:RATE: "
            "simulated, so often right. Default: that beside the model, or else none.",
            show_default=False,
        ),
    ] = None,
    dense_draft: Annotated[
        str | None, typer.Option(help="Draft of the dense twin; default: as --draft, unless that is a folder.")
    ] = None,
    free_draft: Annotated[
        bool, typer.Option("--free-draft", help="A simulated draft takes no time; default: that of a real head.")
    ] = False,
    tree: Annotated[
        str, typer.Option(metavar="[N|chain:N]", help="Draft tokens of the fixed tree; chain:N: without branches.")
    ] = "7",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts like Spec-Bench's question.jsonl; default: a few of our own.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Kinds of prompts, separated by commas; default: all.")] = "",
    per_task: Annotated[int, typer.Option(help="Prompts of each kind.")] = 2,
    text: Annotated[
        Path | None, typer.Option(help="Text or .jsonl file whose pieces are continued, beside the prompts.")
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Pieces of --text and no prompts.")] = False,
    peers: Annotated[
        str,
        typer.Option(
            help="Others in the same rounds: huggingface, llama.cpp (a dense model of equal size and bits), "
            "llama.cpp:Q4_0/Q8_0 (other formats, of the weights and of the head)."
        ),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="New tokens of a prompt.")] = 128,
    max_prompt_tokens: Annotated[int, typer.Option(help="A longer prompt loses its beginning.")] = 512,
    rounds: Annotated[int, typer.Option(help="Every way takes every prompt so often.")] = 3,
    backend: Annotated[str, typer.Option(help="What runs the models: auto, or a name.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the weights: auto, or what the backend has.")] = "auto",
    screen_head: Annotated[
        str | None, typer.Option(metavar="[int8|int4]", help="Read the head in so many bits first.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw it into this PNG or SVG.")] = None,
) -> None:
    """Time decoding: dense and sparse, plain, with drafts in a fixed tree and in a tree cut by cost.

    All ways take turns on the same prompts, and new tokens per second are medians of the rounds, without the prompt's
    own time. The texts of drafted modes are first compared with the plain loop's; a wrong one is not timed.

    Example: blockffn bench decode runs/mini --dense runs/mini-dense --draft ngram --per-task 1
    """
    check_json(json_path)
    check_plot(plot_path)
    if text_only and text is None:
        raise ValueError("--text-only needs a --text to continue")

    from blockffn.evaluation.decoding.bench import BenchSettings, bench_decode

    same = draft if draft in (None, "none", "ngram", "auto") or str(draft).startswith("oracle:") else "none"
    settings = BenchSettings(
        draft=draft, dense_draft=dense_draft or same, priced=not free_draft, tree=tree,
        backend=backend, precision=precision, screen_head=screen_head, device=device, max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens, rounds=rounds, peers=_words(peers),
    )  # fmt: skip
    console = table_console(200)
    chosen = _prompts(prompts, text, _words(tasks), per_task, text_only)
    report = bench_decode(path, chosen, settings, dense=dense, say=lambda line: print_text(console, line, style="dim"))
    write_json(json_path, report.to_dict())
    for table in (_rates(report), *_kinds(report), _steps(report)):
        print_table(console, table)
    if any(model["simulated_acceptance"] for model in report.about["models"].values()):
        console.print(
            "Acceptance is simulated: the drafts know the text, and are right at the rate given.", style="dim"
        )
    if plot_path is not None:
        from blockffn.reporting.decoding import decoding_rates

        decoding_rates(report.to_dict()).savefig(plot_path, dpi=150)
        console.print(f"written to {plot_path}", style="dim", soft_wrap=True)


def _prompts(
    path: Path | None, text: Path | None, tasks: tuple[str, ...], per_task: int, text_only: bool
) -> list[Prompt]:
    from blockffn.evaluation.decoding.prompts import own_prompts, read_prompts, text_pieces

    found: list[Prompt] = []
    if not text_only:
        wanted = tasks or None
        found = (
            own_prompts(tasks=wanted, per_task=per_task)
            if path is None
            else read_prompts(path, tasks=wanted, per_task=per_task)
        )
    return found + (text_pieces(text, count=per_task) if text is not None else [])


def _rates(report: BenchReport) -> Table:
    results = report.results
    table = _ways_table("new tokens/s", results)
    for i, rate in enumerate(results[0].rates):
        table.add_row(rate.task.replace("_", " "), *(f"{r.rates[i].tokens_per_second:.1f}" for r in results))
    table.add_section()
    overall = [result.overall for result in results]
    table.add_row("ratio", *("" if rate.ratio is None else f"{rate.ratio:.2f}×" for rate in overall))
    if report.about["settings"]["rounds"] > 1:
        spans = ("" if r.ratio is None else f"{r.lowest_ratio:.2f}…{r.highest_ratio:.2f}" for r in overall)
        table.add_row("of the rounds", *spans)
    return table


def _kinds(report: BenchReport) -> list[Table]:
    """What steps are like by kind of prompt: tokens that they give, and experts that they read."""
    tables = []
    drafted = [r for r in report.results if (r.overall.acceptance_length or 1) > 1]
    if drafted:
        tables.append(_ways_table("tokens a step", drafted))
        for rates in zip(*(r.rates for r in drafted)):
            tables[-1].add_row(rates[0].task.replace("_", " "), *(f"{rate.acceptance_length:.2f}" for rate in rates))
    sparse = [r for r in report.results if r.overall.union_experts is not None]
    if sparse:
        tables.append(_ways_table("% of the experts that a step reads", sparse))
        num_experts = report.about["models"]["sparse"]["num_experts"]
        for rates in zip(*(r.rates for r in sparse)):
            shares = (f"{100 * rate.union_experts / num_experts:.1f}" for rate in rates)
            tables[-1].add_row(rates[0].task.replace("_", " "), *shares)
    return tables


def _steps(report: BenchReport) -> Table:
    results = [result for result in report.results if result.shares]
    table = _ways_table("a step, and how its time is spent", results)

    def row(name: str, values: Iterable[float | None], digits: int) -> None:
        table.add_row(name, *("" if value is None else f"{value:.{digits}f}" for value in values))

    row("tokens", (r.overall.acceptance_length for r in results), 2)
    row("drafts", (r.tree_size for r in results), 1)
    by_depth = (" ".join(f"{100 * rate:.0f}" for rate in r.acceptance_by_depth) for r in results)
    table.add_row("accepted by depth, %", *by_depth)
    row("experts", (r.active_experts for r in results), 1)
    row("union", (r.union_experts for r in results), 1)
    row("draft %", (100 * r.shares["draft"] for r in results), 0)
    row("model %", (100 * r.shares["decode"] for r in results), 0)
    return table


def _ways_table(title: str, results: Sequence[Any]) -> Table:
    """A column for each way of decoding, so that many kinds of text fit the width of a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(result.way, justify="right")
    return table


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())
