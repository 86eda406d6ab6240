"""`blockffn presets`: the sizes and methods by name, with their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("presets")(presets)


def presets(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON to this file.")] = None,
) -> None:
    """List the model sizes and methods that other commands know by name."""
    from rich.console import Console
    from rich.table import Table

    from blockffn.metrics.cost import parameter_counts
    from blockffn.presets import METHODS, RECIPES, SIZES, preset_config

    rows = []
    for size in SIZES:
        config, counts = preset_config(size), parameter_counts(preset_config(size))
        recipe = RECIPES[size]
        rows.append({
            "size": size,
            "non_embedding_parameters": counts.non_embedding,
            "total_parameters": counts.total,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "attention": config.attention_type,
            "experts": config.num_experts,
            "expert_width": config.moe_intermediate_size,
            "vocab_size": config.vocab_size,
            "steps": recipe["steps"],
            "tokens_per_step": recipe["batch_size"] * recipe["data"]["sequence_length"],
        })  # fmt: skip
    if json_path is not None:
        json_path.write_text(json.dumps({"sizes": rows, "methods": sorted(METHODS)}, indent=1))
    table = Table(title="Sizes", title_justify="left", header_style="bold")
    headings = ("size", "non-embedding", "total", "layers", "hidden", "attention", "experts", "vocabulary", "steps",
                "tokens/step")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("size", "attention") else "right")
    for row in rows:
        table.add_row(
            row["size"], f"{row['non_embedding_parameters']:,}", f"{row['total_parameters']:,}", str(row["layers"]),
            str(row["hidden_size"]), row["attention"], f"{row['experts']} × {row['expert_width']}",
            f"{row['vocab_size']:,}", f"{row['steps']:,}", f"{row['tokens_per_step']:,}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"Methods: {', '.join(sorted(METHODS))}.   Use: blockffn train --size nano --method blockffn --data FOLDER"
    )
