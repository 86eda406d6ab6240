"""`blockffn presets`: the sizes and methods by name, with their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockffn.cli.output import check_json, write_json


def register(app: typer.Typer) -> None:
    app.command("presets")(presets)


def presets(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON to this file.")] = None,
) -> None:
    """List the model sizes and methods that other commands know by name."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from blockffn.metrics.cost import parameter_counts
    from blockffn.presets import METHODS, RECIPES, SIZES, objective_terms_of, preset_config

    check_json(json_path)
    rows = []
    for size in SIZES:
        config = preset_config(size)
        counts = parameter_counts(config)
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
    methods: list[dict[str, Any]] = []
    for method in METHODS:
        config = preset_config("mini", method)
        objectives = [
            f"{name} ({spec['kind'].replace('_', ' ')})" for name, spec in objective_terms_of("mini", method).items()
        ]
        methods.append({
            "method": method,
            "router": config.router_type if config.ffn_type == "moe" else None,
            "shared_experts": config.num_shared_experts,
            "objectives": objectives,
        })  # fmt: skip
    write_json(json_path, {"sizes": rows, "methods": methods})
    table = Table(title="Sizes", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    headings = ("size", "weights", "+ vocab", "layers", "hidden", "attention", "experts", "tokens")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("size", "attention") else "right")
    for row in rows:
        table.add_row(
            row["size"], _short(row["non_embedding_parameters"]), _short(row["total_parameters"]), str(row["layers"]),
            str(row["hidden_size"]), row["attention"], f"{row['experts']} × {row['expert_width']}",
            _short(row["steps"] * row["tokens_per_step"]),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print("weights: without embeddings; + vocab: with them; experts: number × width; tokens: of the recipe.")
    by_method = Table(title="Methods", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for heading in ("method", "router", "shared experts", "penalties (coefficient, at mini)"):
        by_method.add_column(heading, justify="right" if heading == "shared experts" else "left")
    for row in methods:
        by_method.add_row(
            row["method"], row["router"] or "none", str(row["shared_experts"] or ""), ", ".join(row["objectives"])
        )
    console.print(by_method)
    console.print("Use: blockffn train --preset nano --method blockffn --data FOLDER --out FOLDER", style="dim")


def _short(count: int) -> str:
    """`1187830952` as `1.19 B`."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"
