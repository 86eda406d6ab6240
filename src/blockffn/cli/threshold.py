"""`blockffn threshold`: what skipping weakly weighted experts costs in quality and saves in time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_json, check_plot, write_json


def register(app: typer.Typer) -> None:
    app.command("threshold")(threshold)


def threshold(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    thresholds: Annotated[
        str, typer.Option(help="Thresholds on routing weights, separated by commas or spaces.")
    ] = "0 0.05 0.1 0.2 0.4 0.8",
    data: Annotated[Path | None, typer.Option(help="Prepared folder; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the prepared folder.")] = "valid",
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a row; default: the run's.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Score only so many rows, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the curve to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the curve into this PNG or SVG.")] = None,
) -> None:
    """Measure the quality-speed curve of a run-time threshold: loss, sparsity, bytes read and FFN time.

    Use a threshold that you like with blockffn generate --threshold, or model.set_threshold in Python.

    Example: blockffn threshold runs/demo/blockffn --thresholds '0 0.1 0.3' --plot threshold.png
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    check_json(json_path)
    check_plot(plot_path)
    values = _numbers(thresholds)

    from blockffn.evaluation.threshold import curve_to_dict, threshold_curve

    console = Console(highlight=False)
    points = threshold_curve(
        path, values, data=data, split=split, sequence_length=sequence_length, max_rows=max_rows,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    write_json(json_path, curve_to_dict(path, points, data=None if data is None else str(data), split=split))
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    for heading in ("threshold", "loss", "perplexity", "TLS %", "CLS8 %", "expert KB a token", "µs a layer"):
        table.add_column(heading, justify="right")
    for p in points:
        table.add_row(
            f"{p.threshold:g}", f"{p.heldout_loss:.4f}", f"{p.perplexity:.2f}", f"{p.tls:.1f}", f"{p.cls8:.1f}",
            f"{p.ffn_bytes / 1e3:,.0f}", f"{p.ffn_microseconds:.1f}",
        )  # fmt: skip
    console.print(table)
    if plot_path is not None:
        from blockffn.reporting.threshold import threshold_curve as draw

        draw(
            [p.heldout_loss for p in points],
            thresholds=[p.threshold for p in points],
            bytes_read=[p.ffn_bytes for p in points],
            microseconds=[p.ffn_microseconds for p in points],
            sparsity=[p.tls for p in points],
        ).savefig(plot_path, dpi=150)
        console.print(f"written to {plot_path}", style="dim", soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"--thresholds {text!r} must be numbers, such as '0 0.1 0.3'") from error
