"""The section "evidence of the routing": one run's in full, and a row for each run that has some.

It is made from `evidence.json` of the records, the numbers of `blockffn analyze`. Plots are drawn anew from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blockffn.experiments.results import Result
from blockffn.experiments.tables import table
from blockffn.reporting.evidence import cell, evidence_sections

PREFIX = "results-evidence-"
MISSING = "Not recorded yet: `python experiments/quality.py` makes it, also for runs whose models are still there."
LEGEND = (
    "Reuse: experts that the next token uses again. CLS64: experts idle for 64 tokens in a row. Fewest and most: mean "
    "share of active experts of the kind of token with the fewest and the most. Peaks: of two normal distributions "
    "fitted to the mean share by vocabulary item. Variation: deviation over mean of an expert's load, mean over "
    "layers. Growth: L2 norm of the FFN's output in the last layer over that in the first."
)


def shown(results: Sequence[Result]) -> Result | None:
    """The run that is shown in full: the first of BlockFFN that has evidence, or else the first of all."""
    found = [result for result in results if result.evidence]
    return next((r for r in found if r.experiment.method == "blockffn"), found[0] if found else None)


def evidence_plots(results: Sequence[Result]) -> dict[str, Figure]:
    """The plots of the run that is shown, by file name."""
    result = shown(results)
    sections = [] if result is None else evidence_sections(result.evidence)
    drawings = [section["drawing"] for section in sections]
    return {f"{PREFIX}{name}.png": draw() for name, draw in drawings if name}


def evidence_section(results: Sequence[Result], *, base: Path, images: Path) -> list[str]:
    """Paragraphs of the section; links are relative to `base`. Without any evidence it says so."""
    found = ["## Evidence of the routing"]
    result = shown(results)
    if result is None:
        return [*found, MISSING]
    rows = [_row(r) for r in results if r.evidence]
    found += [table(list(rows[0]), [list(row.values()) for row in rows]), LEGEND]
    missing = [r.experiment.name for r in results if r.run is not None and not r.evidence and _routes(r)]
    if missing:
        found.append(f"Recorded without evidence: {', '.join(missing)}.")
    link = Path(os.path.relpath(result.folder, base)).as_posix()
    found.append(f"The following is of {result.experiment.name} ([numbers]({link}/evidence.json)).")
    for section in evidence_sections(result.evidence):
        found.append(f"### {section['title']}")
        if section["rows"]:
            found.append(table(section["columns"], [[cell(value) for value in row] for row in section["rows"]]))
        found.append(section.get("note", ""))
        name = section["drawing"][0]
        if name:
            path = Path(os.path.relpath(images / f"{PREFIX}{name}.png", base)).as_posix()
            found.append(f"![{section['title']}]({path})")
    return found


def _routes(result: Result) -> bool:
    return result.values.get("tls") is not None


def _row(result: Result) -> dict[str, str]:
    evidence = result.evidence
    layers, classes = evidence["layers"], evidence["classes"]
    fit = evidence["vocabulary"]["fit"]
    cls = {str(window): value for window, value in evidence["cls"].items()}
    peaks = None if fit is None else f"{fit['modes']} ({fit['means'][0]:.1f} %, {fit['means'][1]:.1f} %)"
    values: dict[str, Any] = {
        "Run": result.experiment.name,
        "Reuse, %": evidence["reuse_ratio"],
        "CLS64, %": cls.get("64"),
        "Fewest, %": classes[0]["active_share"] if classes else None,
        "Most, %": classes[-1]["active_share"] if classes else None,
        "Peaks": peaks,
        "Variation": sum(layer["load_variation"] for layer in layers) / len(layers),
        "Growth": layers[-1]["output_norm"] / layers[0]["output_norm"] if layers[0]["output_norm"] else None,
        "Kinds": f"{classes[0]['class']} to {classes[-1]['class']}" if classes else None,
    }
    return {name: cell(value) for name, value in values.items()}
