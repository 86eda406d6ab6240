"""`blockffn train-draft`: an EAGLE draft for a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockffn.cli.output import check_json, print_table, print_text, table_console, write_json
from blockffn.wording import counted

if TYPE_CHECKING:
    from rich.table import Table


def register(app: typer.Typer) -> None:
    app.command("train-draft")(train_draft)


def train_draft(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Folder of the target: a run, or a model.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings to change, for example steps=2000 unroll=1 optimizer.learning_rate=0.002 "
            "draft.intermediate_size=1024. --show-settings prints all of them.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Folder made by blockffn prepare; repeat it, with =WEIGHT, for a mixture.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.")] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Propose only so many of the data's most frequent tokens; default: all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print the resolved settings and stop.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the draft's card to this file.")] = None,
) -> None:
    """Train a draft for speculative decoding on the hidden states of a model, which stays as it is.

    What matters is printed at the end: tokens per verification on held-out text. Ctrl-C leaves a checkpoint that
    --resume goes on from: blockffn train-draft --resume --out FOLDER

    Example: blockffn train-draft runs/mini --data runs/books --out runs/draft steps=1000
    """
    from blockffn.cli.train import folder_weights
    from blockffn.settings import from_dict, load_yaml, merge, parse_overrides, to_dict
    from blockffn.training.draft.settings import DraftTrainSettings

    console = table_console()
    check_json(json_path)
    if resume and model is not None and "=" in str(model):  # the only argument left is a setting
        overrides, model = [str(model), *(overrides or [])], None
    changes = parse_overrides(overrides or [])
    if resume:
        for option, value in {"MODEL": model, "--data": data, "--draft-vocab": draft_vocab}.items():
            if value is not None:
                raise ValueError(f"{option} was decided when the run began; --resume takes it from the run's settings")
        if out is None:
            raise ValueError("--resume needs the run's folder: --out FOLDER")
        if not (out / "config.yaml").is_file():
            raise ValueError(f"{out} holds no run (no config.yaml); start one without --resume")
        settings = from_dict(
            DraftTrainSettings, merge(to_dict(load_yaml(DraftTrainSettings, out / "config.yaml")), changes)
        )
    else:
        options: dict[str, Any] = {"target": None if model is None else str(model), "draft_vocab_size": draft_vocab}
        if data:
            options["data"] = {"folders": folder_weights(data)}
        given = {name: value for name, value in options.items() if value is not None}
        settings = from_dict(DraftTrainSettings, merge(merge(to_dict(DraftTrainSettings()), given), changes))
    if show_settings:
        import yaml

        console.print(yaml.safe_dump(to_dict(settings), sort_keys=False), end="", highlight=False)
        return
    if out is None:
        raise ValueError("give the folder of the run: --out FOLDER")

    import json

    from blockffn.checkpoints.draft import CARD
    from blockffn.training.draft.loop import train_draft as run_training

    result = run_training(settings, out, resume=resume, device=device, progress=True)
    if result.interrupted:
        print_text(console, f"stopped after step {result.step}; go on with: blockffn train-draft --resume --out {out}")
        raise typer.Exit(130)
    card = json.loads((out / "model" / CARD).read_text(encoding="utf-8"))
    write_json(json_path, card)
    print_text(
        console,
        f"trained {counted(result.step, 'step')} on {counted(result.tokens, 'token')} in {result.seconds:.0f} s; "
        f"draft of {card['parameters']:,} parameters, {card['bytes'] / 1e6:.1f} MB, in {out / 'model'}",
    )
    print_table(console, acceptance_table(card))


def acceptance_table(card: dict[str, Any]) -> Table:
    """Acceptance for a person: one line for held-out text, one for each way of drafting."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("draft for")
    table.add_column("tokens per verification", justify="right")
    table.add_column("accepted by depth, %")
    labels = {"chain": "greedy decoding, chain", "tree": "greedy decoding, tree", "ngram": "the same, n-grams instead"}
    rows = [("the text as it is, chain", card["heldout_text"])]
    rows += [(label, card["decoding"][name]) for name, label in labels.items() if card["decoding"][name]]
    for label, row in rows:
        by_depth = " ".join(f"{100 * rate:.0f}" for rate in row["acceptance_by_depth"])
        table.add_row(label, f"{row['acceptance_length']:.2f}", by_depth)
    return table
