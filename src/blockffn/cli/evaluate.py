"""`blockffn evaluate`: held-out quality and sparsity of a run or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockffn.cli.output import check_json, write_json


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Prepared folder; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the prepared folder.")] = "valid",
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a row; default: the run's.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Score only so many rows, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    threshold: Annotated[
        float | None, typer.Option(help="Skip experts with a routing weight up to this; default: the model's own.")
    ] = None,
    reference_counting: Annotated[
        bool, typer.Option("--reference-counting", help="Count sparsity as the paper's code does, padding included.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of a dense model to compare predictions with, token by token.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file, too.")] = None,
) -> None:
    """Measure perplexity, bits per byte, TLS, CLS by window and reuse on held-out text.

    The result is also written to evaluation.json in the run's folder, where blockffn report finds it.
    """
    from rich.console import Console

    from blockffn.evaluation.run import evaluate_run
    from blockffn.reporting.tables import summary_table

    check_json(json_path)
    result = evaluate_run(
        path,
        data=data,
        split=split,
        sequence_length=sequence_length,
        max_rows=max_rows,
        batch_size=batch_size,
        threshold=threshold,
        reference_counting=reference_counting,
        device=device,
    )
    values = result.to_dict()
    if against is not None:
        values["against"] = {"model": str(against), **_compared(path, against, data, device)}
    write_json(path / "evaluation.json" if (path / "config.yaml").is_file() else None, values)
    write_json(json_path, values)
    headline = {k: values.get(k) for k in ("heldout_loss", "perplexity", "bits_per_byte", "tls", "reuse_ratio")}
    if against is not None:
        headline |= {"divergence": values["against"]["divergence"], "logits_differ": values["against"]["difference"]}
    headline["active_parameters"] = round(values["cost"]["active_parameters"])
    headline["cls8"] = values.get("cls", {}).get("8")
    Console().print(summary_table({k: v for k, v in headline.items() if v is not None}))


def _compared(path: Path, against: Path, data: Path | None, device: str | None) -> dict[str, Any]:
    """A stage of the receipt of `blockffn convert --from-dense`, on the same held-out text."""
    from blockffn.evaluation.run import load_run
    from blockffn.settings import load_yaml
    from blockffn.sparsify.passages import check_tokenizer, read_passages
    from blockffn.sparsify.receipt import compare
    from blockffn.training.config import TrainSettings

    if data is None:  # `evaluate_run` has refused a folder that is no run and comes without data
        data = Path(next(iter(load_yaml(TrainSettings, path / "config.yaml").data.folders)))
    (model, tokenizer), (dense, _) = load_run(path, device=device), load_run(against, device=device)
    check_tokenizer(data, tokenizer)
    if model.config.vocab_size != dense.config.vocab_size:
        raise ValueError(f"{against} has {dense.config.vocab_size} tokens, {path} has {model.config.vocab_size}")
    length = min(512, model.config.max_position_embeddings)
    passages = read_passages(data, "valid", length=length, num_tokens=16 * length)
    stage = compare("recovered", dense, model, passages).to_dict()
    return {name: value for name, value in stage.items() if name != "name"}
