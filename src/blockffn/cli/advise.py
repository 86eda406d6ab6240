"""`blockffn advise`: what pays on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockffn.cli.output import check_json, print_table, print_text, table_console, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from blockffn.evaluation.decoding.consult import Consultation

USE = "use: blockffn generate"  # how the last sentence of an advice begins


def register(app: typer.Typer) -> None:
    app.command("advise")(advise)


def advise(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    draft: Annotated[
        str | None,
        typer.Argument(
            metavar="DRAFT",
            help="Folder of a trained draft, or oracle:RATE; default: that beside the model. N-grams are tried anyhow.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text or .jsonl file to measure acceptance on; default: prompts of our own.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens of a prompt.")] = 32,
    backend: Annotated[str, typer.Option(help="What runs the model: auto, or a name.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write measurements and advice to this file.")
    ] = None,
) -> None:
    """Measure this machine for about a minute and say how to decode with the model: precision, draft, tree.

    Estimates come from the time of a step by its number of tokens, from what drafting costs, and from what was
    accepted on the text. The best choices are then decoded with, and both numbers are shown.

    Example: blockffn advise runs/mini runs/mini/draft --text book.txt
    """
    check_json(json_path)
    from blockffn.evaluation.decoding.consult import consult
    from blockffn.evaluation.decoding.prompts import own_prompts, text_pieces

    console = table_console()
    prompts = own_prompts(per_task=1) if text is None else text_pieces(text, count=4)
    result = consult(
        path, prompts, draft=draft, max_new_tokens=tokens, backend=backend, device=device,
        say=lambda line: print_text(console, line, style="dim"),
    )  # fmt: skip
    write_json(json_path, result.to_dict())
    for table in (_steps(result), *([_acceptance(result)] if result.acceptances else []), _options(result)):
        print_table(console, table)
    for warning in result.advice.warnings:
        print_text(console, f"warning: {warning}", style="yellow")
    for line in result.sentences():
        if line.startswith(USE):  # to be copied in one piece
            console.print(f"{USE} {path}{line.removeprefix(f'{USE} MODEL')}", markup=False, soft_wrap=True)
        else:
            print_text(console, line)


def _table(title: str, *headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, title=title)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _steps(result: Consultation) -> Table:
    counts = sorted({tokens for target in result.targets for tokens in target.milliseconds})
    names = [f"{target.backend}, {target.precision}" for target in result.targets]
    table = _table("milliseconds of a step, by its tokens", *names)
    for n in counts:
        table.add_row(str(n), *(f"{t.milliseconds[n]:.2f}" if n in t.milliseconds else "" for t in result.targets))
    table.add_section()
    table.add_row("MB a token", *(f"{target.bytes_per_token / 1e6:.2f}" for target in result.targets))
    shares = [100 * t.bytes_per_token / (t.of(1) / 1000) / result.bandwidth for t in result.targets]
    table.add_row("% of memory's speed", *(f"{share:.0f}" for share in shares))
    if max(shares) > 100:
        table.caption = "Above 100 %: weights stay in the processor's caches from step to step."
    return table


def _acceptance(result: Consultation) -> Table:
    from rich.text import Text

    from blockffn.evaluation.decoding.advice import conditional_rates

    depths = max(len(conditional_rates(a.all)) for a in result.acceptances)
    headings = (*map(str, range(1, depths + 1)), "tokens a step")
    table = _table("accepted where the token before was, %, by depth of the draft", *headings)
    for acceptance in result.acceptances:
        table.add_section()
        table.add_row(Text(acceptance.draft, overflow="fold"))
        kinds = {task.replace("_", " "): list(rounds) for task, rounds in acceptance.by_task.items()}
        for kind, rounds in (*kinds.items(), ("all", acceptance.all)):
            rates = [f"{100 * rate:.0f}" for rate, _ in conditional_rates(rounds)]
            length = sum(len(round_.path) + 1 for round_ in rounds) / len(rounds)
            table.add_row(f"  {kind}", *rates, *[""] * (depths - len(rates)), f"{length:.2f}")
    return table


def _options(result: Consultation) -> Table:
    table = _table("new tokens/s", "draft", "tree", "tokens a step", "estimated", "measured")
    for option in result.advice.options:
        measured = result.measured.get((option.backend, option.precision, option.draft, option.tree))
        table.add_row(
            f"{option.backend}, {option.precision}", option.draft, str(option.tree or ""),
            f"{option.tokens_per_step:.2f}", f"{option.tokens_per_second:.1f}",
            "" if measured is None else f"{measured:.1f}",
        )  # fmt: skip
    return table
