"""Numbers as people read them, and tables of them for the terminal and for Markdown.

One place decides how a quantity is written, by its name: losses with 3 decimals, percentages with 1, rates and counts
with thousands separators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

# name: (label, kind), in the order in which a summary shows them
QUANTITIES: dict[str, tuple[str, str]] = {
    "heldout_loss": ("Held-out loss", "loss"),
    "perplexity": ("Perplexity", "perplexity"),
    "bits_per_byte": ("Bits per byte", "loss"),
    "loss_difference": ("Loss against the dense twin", "percent"),
    "tls": ("TLS", "percent"),
    "cls8": ("CLS8", "percent"),
    "reuse_ratio": ("Reuse ratio", "percent"),
    "tokens_per_second": ("Training tokens/s", "rate"),
    "generated_tokens_per_second": ("Generated tokens/s", "rate"),
    "loss": ("Loss", "loss"),
    "language_model_loss": ("Language-model loss", "loss"),
    "cls": ("CLS", "percent"),
    "active_share": ("Active experts", "percent"),
    "expert_use": ("Expert use", "percent"),
    "tokens": ("Tokens", "count"),
    "training_tokens": ("Training tokens", "count"),
    "steps": ("Steps", "count"),
    "parameters": ("Parameters", "count"),
    "active_parameters": ("Active parameters", "count"),
    "dead_experts": ("Dead experts", "count"),
    "seconds": ("Time", "seconds"),
}
ABSENT = "–"
_TWIN = "dense_"


def label(name: str) -> str:
    """`heldout_loss` -> `Held-out loss`; an unknown name in words."""
    if name in QUANTITIES:
        return QUANTITIES[name][0]
    if name.startswith("cls") and name[3:].isdigit():
        return name.upper()
    return name.replace("_", " ").strip().capitalize()


def format_value(name: str, value: Any) -> str:
    """The value of a quantity as text. Percentages are in percent, times in seconds; `None` and NaN give a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    match kind(name):
        case "loss":
            return f"{value:.3f}"
        case "perplexity":
            return f"{value:,.2f}"
        case "percent":
            return f"{value:.1f} %"
        case "rate":
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            return _duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def kind(name: str) -> str:
    """How a quantity is written: loss, perplexity, percent, rate, count, seconds, or `other`."""
    name = name.removeprefix(_TWIN)
    if name.startswith("cls") and name[3:].isdigit():
        return "percent"
    return QUANTITIES[name][1] if name in QUANTITIES else "other"


def difference(name: str, value: Any, other: Any) -> str:
    """How far `value` is from `other`: in percent of it, or in points between percentages; a dash where undefined."""
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (value, other)):
        return ABSENT
    if kind(name) == "percent":
        text = f"{value - other:+.1f} points"
    elif other:
        text = f"{100 * (value - other) / abs(other):+.1f} %"
    else:
        return ABSENT
    return text.replace("-", "−")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """A run's headline numbers for the terminal; keys `dense_*` become a column beside the value they compare with."""
    twins = {key.removeprefix(_TWIN): value for key, value in summary.items() if key.startswith(_TWIN)}
    names = [key for key in summary if not key.startswith(_TWIN)]
    names += [key for key in twins if key not in names]
    order = list(QUANTITIES)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("This run", justify="right", no_wrap=True)
    if twins:
        table.add_column("Dense twin", justify="right", no_wrap=True)
        table.add_column("Difference", justify="right", no_wrap=True)
    for name in names:
        value, other = summary.get(name), twins.get(name)
        cells = [label(name), format_value(name, value)]
        if twins:
            compared = name in twins
            cells += [format_value(name, other), difference(name, value, other)] if compared else ["", ""]
        table.add_row(*cells)
    return table


def zero_shot_tables(results: Mapping[str, Any]) -> list[Table]:
    """What `blockffn zero-shot` found, for the terminal: a row per task and field, and one per paradigm of BLiMP."""
    overview = Table("Task", show_edge=False, pad_edge=False)
    for heading in ("Accuracy", "± error", "Last-word perplexity", "Items", "Time"):
        overview.add_column(heading, justify="right", no_wrap=True)
    paradigms = Table("Field", show_edge=False, pad_edge=False)
    paradigms.add_column("Paradigm", overflow="fold")
    for heading in ("Accuracy", "± error", "Pairs"):
        paradigms.add_column(heading, justify="right", no_wrap=True)
    for task, result in results.items():
        items = format_value("tokens", result.get("pairs", result.get("passages")))
        perplexity = format_value("perplexity", result["perplexity"]) if "perplexity" in result else ""
        overview.add_row(task, *_accuracy(result), perplexity, items, format_value("seconds", result["seconds"]))
        for field, part in result.get("fields", {}).items():
            overview.add_row(f"  {field}", *_accuracy(part), "", format_value("tokens", part["pairs"]), "")
        worst_first = sorted(result.get("paradigms", {}).items(), key=lambda item: item[1]["accuracy"])
        for name, part in worst_first:
            paradigms.add_row(part["field"], name, *_accuracy(part), format_value("tokens", part["pairs"]))
    return [paradigms, overview] if paradigms.row_count else [overview]


def _accuracy(values: Mapping[str, Any]) -> tuple[str, str]:
    error = values["accuracy_stderr"]
    return f"{values['accuracy']:.1f} %", ABSENT if error is None else f"{error:.1f}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table: columns are the keys in order of appearance, formatted by name, numbers right-aligned.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a table needs at least one row, got none")
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = {name: all(isinstance(row.get(name), str | None) for row in rows) for name in names}
    lines = [[label(name) for name in names], [":--" if text[name] else "--:" for name in names]]
    lines += [[format_value(name, row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(_escape_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _escape_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
