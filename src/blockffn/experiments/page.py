"""`docs/results.md`, its plots, and the headline that the README quotes: made from the records, never by hand."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from blockffn.experiments import figures
from blockffn.experiments.claims import claims_table, headline
from blockffn.experiments.evidence import evidence_plots, evidence_section
from blockffn.experiments.results import Result, done, read_results, unlisted
from blockffn.experiments.suite import Experiment
from blockffn.experiments.tables import ablation_table, granularity_counts, quality_table, runs_table
from blockffn.reporting.svg import save_png

_QUOTE = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.DOTALL)
STANDARD = "AL + CS (standard)"
LEGEND = (
    "Mean over seeds ± half the distance between the largest and the smallest; losses in nats a token, held-out text. "
    "Weights: parameters without embeddings; active: those that a token uses. TLS, CLS8: experts that one token, or "
    "eight in a row, leave idle. Reuse: experts that the next token uses again. Dead: experts of all layers that no "
    "held-out token uses. Against dense: difference in perplexity. BLiMP, LAMBADA: zero-shot accuracy."
)
GROUPS = {
    "objectives": (
        "Objectives",
        "AL: activation locality, at a constant 1e-3; CS: chunk sparsification, steered to the preset's TLS; L1 and "
        "entropy: steered to a TLS of 80 %. The router alone is there already, so steering lowers what it "
        "can, and the rows differ in TLS by a few points.",
    ),
    "architecture": ("Router norm and gated experts", "Equal parameters, the standard's objectives."),
    "granularity": ("Granularity", "More and narrower experts, at the same total width."),
    "balance": (
        "Load balancing and dead experts",
        "The standard without the lift of dead experts; then with a load-balancing term on top, by its coefficient.",
    ),
}


@dataclass(frozen=True)
class Page:
    """The page as text, its plots by file name, and the sentence for the README."""

    text: str
    plots: dict[str, Figure]
    headline: str


def make_page(
    records: Path, quality: Sequence[Experiment], ablation: Sequence[Experiment], *, out: Path, images: Path
) -> Page:
    """The results page of two suites.

    Args:
        records: folder of the records.
        quality, ablation: what should be there. What is not is said.
        out, images: where page and plots will lie; links are relative to `out`.

    Raises:
        ValueError: a record is garbled.
    """
    results, parts = read_results(records, quality), read_results(records, ablation)
    size = quality[0].size
    plots = _plots(results, parts)
    sentence = headline(results)
    sections = [
        "# Results",
        "Made from the records by `python experiments/results.py`; do not edit.",
        sentence,
        f"## Every method, same parameters, same tokens (`{size}`)",
        quality_table(results, out.parent) or "Not recorded yet: `python experiments/quality.py` makes it.",
        LEGEND if done(results) else "",
        claims_table(results),
        _images(plots, images, out, ("results-curves.png", "results-trade-off.png", "results-windows.png")),
        "## What each part contributes",
    ]
    for group, (title, text) in GROUPS.items():
        members = [result for result in parts if group in result.experiment.groups]
        sections += [f"### {title}", text, ablation_table(members, out.parent), _not_run(members)]
        sections += [_images(plots, images, out, (f"results-{group}.png",))]
    everything = [*results, *_own(parts, results)]
    sections += evidence_section(everything, base=out.parent, images=images)
    sections += ["## Runs", _state(results, parts), runs_table(everything, out.parent)]
    extra = unlisted(records, [*quality, *ablation])
    if extra:
        links = ", ".join(f"[{folder.name}]({_link(folder, out)}/record.json)" for folder in extra)
        sections.append(f"Also recorded, in none of the tables: {links}.")
    return Page("\n\n".join(section.strip() for section in sections if section) + "\n", plots, sentence)


def write_page(page: Page, *, out: Path, images: Path, readme: Path | None) -> None:
    """Write page and plots, and the headline between the markers of the README, if one is given."""
    out.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in page.plots.items():
        save_png(figure, images / name)
    out.write_text(page.text, encoding="utf-8")
    if readme is not None:
        readme.write_text(_with_quote(readme, page, out), encoding="utf-8")


def stale(page: Page, *, out: Path, images: Path, readme: Path | None) -> list[str]:
    """What does not agree with the records: a line for each file, none if all is well."""
    found = []
    if not out.is_file() or out.read_text(encoding="utf-8") != page.text:
        found.append(f"{out} is not what the records say")
    found += [f"{images / name} is missing" for name in page.plots if not (images / name).is_file()]
    if readme is not None and _with_quote(readme, page, out) != readme.read_text(encoding="utf-8"):
        found.append(f"{readme} quotes another headline than the records give")
    return found


def _with_quote(readme: Path, page: Page, out: Path) -> str:
    """The README's text with the headline, and a link to the page, between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    text = readme.read_text(encoding="utf-8")
    if not _QUOTE.search(text):
        raise ValueError(f"{readme} has no lines '<!-- results -->' and '<!-- end -->' to put the headline between")
    lines = textwrap.fill(page.headline, 120, break_on_hyphens=False, break_long_words=False)
    lines += f"\n[All results, with settings and logs]({_link(out, readme)})"
    return _QUOTE.sub(lambda match: f"{match[1]}{lines}\n{match[2]}", text, count=1)


def _plots(results: Sequence[Result], parts: Sequence[Result]) -> dict[str, Figure]:
    """The plots for which there is something to draw."""
    plots = {}
    found = done(results)
    if found:
        groups = figures.by_label(found)
        plots["results-curves.png"] = figures.curves(found)
        plots["results-trade-off.png"] = figures.trade_off(groups)
    if any(result.values.get("cls8") is not None for result in found):
        plots["results-windows.png"] = figures.windows(found)
    objectives = [result for result in done(parts) if "objectives" in result.experiment.groups]
    if len(objectives) > 1:
        groups = {result.experiment.label: [result] for result in objectives}
        plots["results-objectives.png"] = figures.trade_off(groups, highlight=STANDARD)
    counts = granularity_counts([r for r in done(parts) if "granularity" in r.experiment.groups])
    if len(counts) > 1:
        plots["results-granularity.png"] = figures.granularity(counts)
    return plots | evidence_plots([*results, *_own(parts, results)])


def _not_run(members: Sequence[Result]) -> str:
    """Which rows of a group have no numbers, in words."""
    labels = [result.experiment.label for result in members if result.run is None]
    if not labels:
        return ""
    return f"**Not run: {'; '.join(labels)}.** `python experiments/ablation.py` makes what is missing."


def _images(plots: dict[str, Figure], images: Path, out: Path, names: Sequence[str]) -> str:
    titles = {
        "results-curves.png": "Loss, TLS and CLS8 over the tokens seen",
        "results-trade-off.png": "Perplexity against CLS8, by method",
        "results-windows.png": "Chunk-level sparsity by length of the window",
        "results-objectives.png": "Perplexity against CLS8, by objective",
        "results-granularity.png": "Loss and sparsity by number of experts",
    }
    return "\n\n".join(f"![{titles[name]}]({_link(images / name, out)})" for name in names if name in plots)


def _state(results: Sequence[Result], parts: Sequence[Result]) -> str:
    """What has failed and what is missing, in words."""
    everything = [*results, *_own(parts, results)]
    lines = [f"{len(done(everything))} of {len(everything)} runs are recorded."]
    missing = [result.experiment.name for result in everything if result.state == "missing"]
    if missing:
        lines.append(f"Missing: {', '.join(missing)}.")
    lines += [f"Failed: {r.experiment.name} ({r.record.get('error')})." for r in everything if r.state == "failed"]
    return " ".join(lines)


def _own(parts: Sequence[Result], results: Sequence[Result]) -> list[Result]:
    """The ablation's results that are not the quality suite's."""
    shown = {result.folder for result in results}
    return [result for result in parts if result.folder not in shown]


def _link(target: Path, out: Path) -> str:
    return Path(os.path.relpath(target, out.parent)).as_posix()
