"""Figures of `blockffn analyze` that no run's report has. Plain data in, a matplotlib `Figure` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, MUTED, ORANGE, styled
from blockffn.reporting.palette import LIGHT

OUTLIERS = 0.004  # of the vocabulary items


@styled
def classes(shares: Mapping[str, tuple[float, int]], mean: float) -> Figure:
    """Share of experts (percent) that tokens of each class activate, with the number of tokens; a line at the mean."""
    figure = chart.blank(0.75 + 0.26 * len(shares))
    axes = figure.subplots()
    for row, (name, (share, tokens)) in enumerate(shares.items()):
        axes.plot([mean, share], [row, row], color=LIGHT["axis"], linewidth=1, zorder=1)
        axes.plot(share, row, "o", color=ORANGE, markersize=6, markeredgecolor=LIGHT["surface"])
        after = share >= mean
        axes.annotate(f"{share:.1f}", (share, row), (6 if after else -6, 0), textcoords="offset points", va="center",
                      ha="left" if after else "right", color=ORANGE)  # fmt: skip
        axes.annotate(f"{tokens:,}", (1, row), (6, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", color=MUTED)  # fmt: skip
        chart.hover(axes, 0, row - 0.5, 100, 1, f"{name}\n{share:.2f} % of the experts\n{tokens:,} tokens")
    axes.axvline(mean, color=GREY, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    axes.annotate("tokens", (1, 1), (6, 4), xycoords="axes fraction", textcoords="offset points", color=MUTED)
    values = [share for share, _ in shares.values()]
    room = 0.12 * (max(*values, mean) - min(*values, mean) or 1.0)
    axes.set_xlim(max(0.0, min(*values, mean) - room), max(*values, mean) + room)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_xlabel(f"experts active for a token, percent; dashed: all tokens, {mean:.1f}")
    return figure


@styled
def histogram(edges: Sequence[float], counts: Sequence[float], fit: Mapping[str, Any]) -> Figure:
    """How many vocabulary items activate which share of the experts, with the two fitted normal distributions.

    The few items at the far ends, `OUTLIERS` of all, are not shown; the label of the axis counts them.
    """
    figure = chart.blank(2.9)
    axes = figure.subplots()
    widths = np.diff(edges)
    limits, beyond = _bulk(edges, counts)
    axes.bar(edges[:-1], counts, widths * 0.92, align="edge", color=LIGHT["step-3"], linewidth=0)
    for left, width, count in zip(edges, widths, counts):
        chart.hover(axes, left, 0, width, max(count, 1), f"{left:.1f} to {left + width:.1f} %\n{count:,.0f} items")
    x = np.linspace(edges[0], edges[-1], 400)
    items = float(sum(counts)) * float(widths[0])
    parts = [
        items * share * np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
        for mean, deviation, share in zip(fit["means"], fit["deviations"], fit["shares"])
    ]
    axes.set_xlim(limits)
    top = max(*counts, *sum(parts), 1)
    axes.set_ylim(0, 1.2 * top)
    places = chart.spread(fit["means"], 0.06 * (limits[1] - limits[0]))
    for part, color, mean, place in zip(parts, (BLUE, ORANGE), fit["means"], places):
        axes.plot(x, part, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(f"{mean:.1f}", (place, 1.1 * top), ha="center", va="center", color=color, weight="bold",
                      annotation_clip=True)  # fmt: skip
    axes.plot(x, sum(parts), color=GREY)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title("Vocabulary items; dashed: two fitted normal distributions with their means, grey: their sum")
    outside = f"; {beyond:,.0f} more are beyond" if beyond else ""
    axes.set_xlabel(f"experts active for the item, percent, mean over its occurrences and layers{outside}")
    return figure


def _bulk(edges: Sequence[float], counts: Sequence[float]) -> tuple[tuple[float, float], float]:
    """Limits of the bins that hold all but `OUTLIERS` of the items, half of these at each end; and the items beyond."""
    before, total = np.concatenate([[0.0], np.cumsum(counts)]), float(sum(counts))
    first = int(np.searchsorted(before, OUTLIERS / 2 * total, side="right")) - 1
    last = int(np.searchsorted(before, (1 - OUTLIERS / 2) * total, side="left"))
    first, last = max(first, 0), min(max(last, first + 1), len(counts))
    return (edges[first], edges[last]), total - float(before[last] - before[first])


@styled
def magnitude(layers: Sequence[int], series: Mapping[str, Sequence[float]]) -> Figure:
    """Mean L2 norms by layer, one line per series, on a logarithmic scale."""
    figure = chart.blank(2.7)
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    for (name, values), color in zip(series.items(), (GREY, ORANGE, GREEN)):
        axes.plot(layers, values, color=color, marker="o", markersize=5, markeredgecolor=LIGHT["surface"])
        axes.annotate(f"{name} {values[-1]:.3g}", (layers[-1], values[-1]), (10, 0), textcoords="offset points",
                      va="center", color=color, annotation_clip=False)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_xlabel("layer")
    axes.set_title("L2 norm, mean over tokens; logarithmic")
    tips = [
        f"layer {layer}\n" + "\n".join(f"{name} {values[i]:.4g}" for name, values in series.items())
        for i, layer in enumerate(layers)
    ]
    chart.hover_bands([axes], list(layers), tips)
    return figure
