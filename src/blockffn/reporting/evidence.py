"""What `blockffn analyze` found, as a document of titled tables with figures.

The document is plain data: `title`, `model`, `machine`, `date` and `sections`, each with `title`, `columns`, `rows`
and, where there is one, `figure` (a file name in the folder of figures) and `note`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from blockffn.reporting import evidence_figures, figures
from blockffn.reporting.run import Layer
from blockffn.reporting.svg import save_png
from blockffn.reporting.tables import ABSENT

Drawing = tuple[str, Callable[[], Figure]]


def evidence_document(
    findings: Mapping[str, Any], *, model: str, machine: str, date: str, folder: Path | None = None
) -> dict[str, Any]:
    """The document of what `blockffn.evaluation.analysis.analyze` found; figures go into `folder` if given."""
    sections = evidence_sections(findings)
    for section in sections:
        name, draw = section.pop("drawing")
        if folder is not None and name:
            folder.mkdir(parents=True, exist_ok=True)
            save_png(draw(), folder / f"{name}.png")
            section["figure"] = f"{name}.png"
    return {
        "title": f"Routing of {Path(model).name}",
        "model": model,
        "machine": machine,
        "date": date,
        "tokens": findings["tokens"],
        "loss": findings["loss"],
        "sections": sections,
    }


def evidence_sections(findings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sections, each with `drawing` in place of `figure`: a file's name without its ending, and what draws it."""
    sections = [
        _section("Reuse and sparsity by layer", *_by_layer(findings)),
        _section("Chunk-level sparsity by window", *_by_window(findings)),
        _section("Experts by kind of token", *_by_class(findings)),
        _section("Experts by vocabulary item", *_vocabulary(findings)),
        _section("Magnitude by depth", *_magnitude(findings)),
        _section("Load of the experts", *_load(findings)),
    ]
    if findings.get("draft_trees"):
        sections.append(_section("Union of draft trees", *_draft_trees(findings["draft_trees"])))
    return sections


def section_table(section: Mapping[str, Any]) -> Table:
    """The rows of a section for the terminal; its title and note are the caller's to print."""
    table = Table(show_edge=False, pad_edge=False)
    for i, column in enumerate(section["columns"]):
        words = any(isinstance(row[i], str) for row in section["rows"])
        table.add_column(column, justify="left" if words else "right")
    for row in section["rows"]:
        table.add_row(*map(cell, row))
    return table


def cell(value: Any) -> str:
    """A value of a row as text."""
    if value is None or value != value:
        return ABSENT
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _section(
    title: str, columns: list[str], rows: list[list[Any]], drawing: Drawing | None = None, note: str = ""
) -> dict[str, Any]:
    clean = [[None if isinstance(v, float) and v != v else v for v in row] for row in rows]
    section: dict[str, Any] = {"title": title, "columns": columns, "rows": clean}
    if note:
        section["note"] = note
    return {**section, "drawing": drawing or ("", None)}


def _by_layer(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing, str]:
    names = ["tls", "cls8", "reuse_ratio"]
    rows = [[str(row["layer"]), *(row.get(name) for name in names)] for row in findings["layers"]]
    rows.append(["all", *(findings.get(name) for name in names)])
    points = [
        Layer(
            tls=row["tls"],
            cls={8: row["cls8"]} if "cls8" in row else {},
            reuse_ratio=row["reuse_ratio"],
            expert_use=row["expert_use"],
            dead_experts=row["dead_experts"],
        )
        for row in findings["layers"]
    ]
    note = f"Percent, over {findings['tokens']:,} held-out tokens. Reuse: experts that the next token uses again."
    return ["Layer", "TLS", "CLS8", "Reuse"], rows, ("reuse-by-layer", lambda: figures.layers(points)), note


def _by_window(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing, str]:
    rows = [[row["window"], row["cls"], row["same_tls"], row["same_use"]] for row in findings["windows"]]
    cls = {row["window"]: row["cls"] for row in findings["windows"]}
    note = (
        "Percent of experts idle for the whole window. Routing without memory would leave idle: TLS to the power of "
        "the window (same TLS), or the mean over experts of how often each is idle to that power (same use)."
    )
    columns = ["Window", "CLS", "Same TLS", "Same use"]
    return columns, rows, ("cls-by-window", lambda: figures.windows(cls, findings["tls"])), note


def _by_class(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing, str]:
    rows = [[row["class"], row["active_share"], row["tokens"], row["items"]] for row in findings["classes"]]
    shares = {row["class"]: (row["active_share"], row["tokens"]) for row in findings["classes"]}
    mean = 100 - findings["tls"]
    note = f"Mean over layers; the mean over all tokens is {mean:.1f} %."
    drawing = ("experts-by-token-class", lambda: evidence_figures.classes(shares, mean))
    return ["Kind of token", "Active experts, %", "Tokens", "Vocabulary items"], rows, drawing, note


def _vocabulary(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing | None, str]:
    vocabulary = findings["vocabulary"]
    fit, items = vocabulary["fit"], vocabulary["items"]
    columns = ["Component", "Mean, %", "Deviation", "Share of items, %"]
    seen = f"{items:,} items that occur at least {vocabulary['min_occurrences']} times"
    if fit is None:
        return columns, [], None, f"Too few items ({seen}) to tell whether the distribution has two peaks."
    rows = [
        [name, fit["means"][i], fit["deviations"][i], 100 * fit["shares"][i]]
        for i, name in enumerate(("lower", "upper"))
    ]
    peaks = "two peaks" if fit["modes"] == 2 else "one peak"
    note = (
        f"{'Bimodal' if fit['bimodal'] else 'Not bimodal'}: two normal distributions, fitted to the mean active share "
        f"of {seen}, have {peaks} together; BIC prefers {'two' if fit['bic_gain'] > 0 else 'one'} by "
        f"{abs(fit['bic_gain']):,.0f}."
    )
    drawing = (
        "experts-by-vocabulary-item",
        lambda: evidence_figures.histogram(vocabulary["edges"], vocabulary["counts"], fit),
    )
    return columns, rows, drawing, note


def _magnitude(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing, str]:
    keys = {"input_norm": "FFN input", "output_norm": "FFN output", "weight_norm": "Routing weights"}
    rows = [[str(row["layer"]), *(row[key] for key in keys)] for row in findings["layers"]]
    series = {name: [row[key] for row in findings["layers"]] for key, name in keys.items()}
    numbers = [row["layer"] for row in findings["layers"]]
    drawing = ("magnitude-by-depth", lambda: evidence_figures.magnitude(numbers, series))
    return ["Layer", *keys.values()], rows, drawing, "Mean over tokens of the L2 norm; the input is behind its norm."


def _load(findings: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], Drawing, str]:
    keys = ["load_variation", "load_max_over_mean", "dead_experts"]
    rows = [[str(row["layer"]), *(row[key] for key in keys)] for row in findings["layers"]]
    use = [row["expert_use"] for row in findings["layers"]]
    dead = sum(row["dead_experts"] for row in findings["layers"])
    note = (
        f"Dead: used by no held-out token; {dead} of {sum(map(len, use))} experts are. Variation: deviation over mean."
    )
    drawing = ("expert-load", lambda: figures.expert_use(use))
    return ["Layer", "Variation of load", "Busiest over mean", "Dead experts"], rows, drawing, note


def _draft_trees(trees: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], None, str]:
    rows = [[row["what"], row["union"]] for row in trees["rows"]]
    note = (
        f"Percent of experts that {trees['nodes']} tokens use together, mean over layers and {trees['trees']} trees "
        f"that the model drafted itself (most probable nodes, {trees['depth']} levels at most)."
    )
    return ["Tokens", "Union, %"], rows, None, note
