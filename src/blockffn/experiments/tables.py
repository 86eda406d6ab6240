"""The tables of the results page, as Markdown. Every row links the settings and the log of its runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from blockffn.experiments.results import Mean, Result, by_method, done, mean
from blockffn.reporting.tables import ABSENT, format_value

NUMBERS = {
    "weights": "Weights",
    "active": "Active",
    "heldout_loss": "Loss",
    "perplexity": "Perplexity",
    "tls": "TLS",
    "cls8": "CLS8",
    "reuse_ratio": "Reuse",
    "dead_experts": "Dead",
    "blimp": "BLiMP",
    "lambada": "LAMBADA",
}
_KINDS = {"blimp": "tls", "lambada": "tls"}  # written as percentages


def quality_table(results: Sequence[Result], base: Path) -> str:
    """A row per method: means over seeds, and the difference in perplexity to the dense model; empty without runs."""
    if not done(results):
        return ""
    groups = by_method(results)
    dense = mean(done(groups.get("dense", [])), "perplexity")
    rows = []
    for method, runs in groups.items():
        row = {"Method": runs[0].experiment.label, **_numbers(done(runs))}
        own = mean(done(runs), "perplexity")
        if method != "dense" and own is not None and dense is not None:
            row["Against dense"] = percent(own.mean / dense.mean - 1)
        rows.append({**row, "Runs": links(runs, base)})
    return _aligned(rows, ["Method", *NUMBERS.values(), "Runs"], after={"Against dense": "Perplexity"})


def ablation_table(results: Sequence[Result], base: Path) -> str:
    """A row per run; CLS8/TLS: the share of single tokens' sparsity that chunks keep. Rows not run stay."""
    rows = []
    for result in results:
        row = {"Setting": result.experiment.label, **_numbers(done([result]))}
        tls, cls8 = result.values.get("tls"), result.values.get("cls8")
        if tls and cls8 is not None:
            row["CLS8/TLS"] = f"{cls8 / tls:.3f}"
        rows.append({**row, "Run": links([result], base)})
    return _aligned(rows, ["Setting", *NUMBERS.values(), "Run"], after={"CLS8/TLS": "CLS8"})


def _numbers(results: Sequence[Result]) -> dict[str, str]:
    found = {heading: mean(results, name) for name, heading in NUMBERS.items()}
    names = {heading: name for name, heading in NUMBERS.items()}
    return {heading: number(value, names[heading]) for heading, value in found.items() if value is not None}


def _aligned(rows: Sequence[dict[str, str]], headings: list[str], *, after: dict[str, str]) -> str:
    """The rows under those headings that some row fills; `after` says behind which one an additional heading goes."""
    for heading, place in after.items():
        headings.insert(headings.index(place) + 1, heading)
    used = [heading for heading in headings if any(heading in row for row in rows)]
    return table(used, [[row.get(heading, ABSENT) for heading in used] for row in rows])


def runs_table(results: Sequence[Result], base: Path) -> str:
    """A row per recorded run: what it saw, where and how fast; empty without runs."""
    rows = []
    for result in done(results):
        record, values = result.record, result.values
        shared = record.get("runs_per_device", 1)
        rows.append([
            result.experiment.name,
            f"{record['tokens'] / 1e6:,.3g} M",
            format_value("perplexity", values["perplexity"]),
            format_value("cls8", values["cls8"]),
            format_value("tokens_per_second", record["tokens_per_second"]),
            format_value("seconds", record["seconds"]),
            f"{record['gpu'] or record['machine']}{f', {shared} runs at a time' if shared > 1 else ''}",
            record["torch"],
            record["date"],
            links([result], base),
        ])  # fmt: skip
    headings = ["Run", "Tokens", "Perplexity", "CLS8", "Tokens/s", "Time", "Machine", "torch", "Date", "Files"]
    return table(headings, rows) if rows else ""


def granularity_counts(results: Sequence[Result]) -> dict[int, Result]:
    """Results by number of experts, as their settings say; the preset's where they do not."""
    counts = {}
    for result in results:
        settings = yaml.safe_load((result.run.config if result.run else None) or "{}")
        evaluation = result.run.evaluation if result.run else None
        layers = evaluation.layers if evaluation else []
        count = settings.get("model", {}).get("num_experts") or (len(layers[0].expert_use) if layers else None)
        if count:
            counts[count] = result
    return counts


def links(results: Sequence[Result], base: Path) -> str:
    """Settings and log of each run, or why there are none."""
    found = []
    for result in results:
        text = result.state
        if result.run is not None:
            folder = Path(os.path.relpath(result.folder, base)).as_posix()
            text = f"[settings]({folder}/config.yaml), [log]({folder}/metrics.jsonl)"
        found.append(text if len(results) == 1 else f"seed {result.experiment.seed}: {text}")
    return "; ".join(found)


def number(value: Mean | None, name: str) -> str:
    """A mean with its spread, if there are several runs; the unit once."""
    if value is None:
        return ABSENT
    kind = _KINDS.get(name, name)
    if name == "dead_experts":
        return f"{value.mean:g}"
    if name in ("weights", "active"):
        return f"{value.mean / 1e6:,.1f} M"
    text = format_value(kind, value.mean)
    if value.count == 1:
        return text
    spread = format_value(kind, value.spread)
    return f"{text.removesuffix(' %')} ± {spread}" if text.endswith(" %") else f"{text} ± {spread}"


def percent(share: float) -> str:
    """`0.0123` as `+1.2 %`."""
    return f"{100 * share:+.1f} %".replace("-", "−")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first and the last column to the left, numbers to the right."""
    rule = [":--", *["--:"] * (len(headings) - 2), ":--"]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [headings, rule, *rows]
    )
