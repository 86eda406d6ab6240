"""The plots of the results page. Each takes results and returns a matplotlib `Figure`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from blockffn.experiments.results import Result, by_method, mean
from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, styled
from blockffn.reporting.palette import LIGHT

COLORS = {
    "blockffn": ORANGE,
    "dense": GREY,
    "topk": BLUE,
    "deepseek": GREEN,
    "grin": PURPLE,
    "remoe": "#8a6d00",
    "deco": LIGHT["step-5"],
}
WINDOWS = (1, 2, 4, 8, 16, 32, 64)


@styled
def curves(results: Sequence[Result]) -> Figure:
    """Loss, TLS and CLS8 over the tokens seen, a line per run; the loss from where it has left its first slope."""
    figure = chart.blank(6.6)
    panels = list(figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1.5, 1, 1]}))
    names = {"language_model_loss": "Training loss, nats per token", "tls": "TLS, percent", "cls8": "CLS8, percent"}
    right = max(row["tokens"] for result in results for row in _log(result)) / 1e6
    for axes, (key, title) in zip(panels, names.items()):
        axes.set_title(title)
        axes.set_xlim(0, right)
        ends, late = [], []
        for method, runs in by_method(results).items():
            final = []
            for result in runs:
                points = [(row["tokens"] / 1e6, row[key]) for row in _log(result) if row.get(key) is not None]
                if not points:
                    continue
                x, y = zip(*points)
                smooth = chart.running_mean(y, max(1, len(y) // 25))
                ours = method == "blockffn"
                axes.plot(x, smooth, color=_color(method), linewidth=1.8 if ours else 1.1, zorder=3 if ours else 2)
                late += [value for place, value in zip(x, smooth) if place >= right / 4]
                final.append(smooth[-1])
            if final:
                value = sum(final) / len(final)
                text = f"{value:.3f}" if key == "language_model_loss" else f"{value:.1f} %"
                ends.append((value, f"{_label(runs)} {text}", _color(method)))
        if key == "language_model_loss":
            low, high = min(late), max(late)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes.yaxis.set_major_locator(chart.ticks(5))
        else:
            chart.percent_axis(axes)
        _end_labels(axes, ends)
    panels[-1].set_xlabel("million training tokens")
    panels[-1].xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if right >= 5 else f"{value:g}")
    )
    return figure


@styled
def trade_off(groups: Mapping[str, Sequence[Result]], *, highlight: str | None = None) -> Figure:
    """Perplexity against CLS8: small dots are runs, the large one is their mean. A method without CLS8 is a line.

    Args:
        groups: what each point is called, with its runs.
        highlight: the one point that is not grey; `None`: each has its method's colour.
    """
    figure = chart.blank(3.6)
    axes = figure.subplots()
    labels, values = [], []
    for name, runs in groups.items():
        color = _color(runs[0].experiment.method)
        if highlight is not None:
            color = ORANGE if name == highlight else GREY
        x, y = mean(runs, "cls8"), mean(runs, "perplexity")
        if y is None:
            continue
        values += [value for value in (run.values["perplexity"] for run in runs) if value is not None]
        if x is None:
            axes.axhline(y.mean, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(f"{name} {y.mean:.2f}", (1, y.mean), (0, 3), textcoords="offset points", color=color)
            continue
        if len(runs) > 1:
            points = [(run.values["cls8"] or math.nan, run.values["perplexity"] or math.nan) for run in runs]
            axes.plot(*zip(*points), "o", color=color, markersize=3, alpha=0.6)
        axes.plot(x.mean, y.mean, "o", color=color, markersize=7, markeredgecolor=LIGHT["surface"])
        labels.append((x.mean, y.mean, name, color))
    axes.set_xlim(0, 100)
    low, high = min(values), max(values)
    room = 0.15 * ((high - low) or 0.05 * high)
    axes.set_ylim(low - room, high + room)
    axes.grid(True, axis="x")
    axes.set_xlabel("CLS8: experts that eight tokens in a row leave idle, percent (right is better)")
    axes.set_title("Held-out perplexity (down is better)")
    _name_points(axes, labels)
    return figure


@styled
def windows(results: Sequence[Result]) -> Figure:
    """CLS by length of the window, a line per method (mean over seeds)."""
    figure = chart.blank(3.4)
    axes = figure.subplots()
    ends = []
    for method, runs in by_method(results).items():
        points = []
        for i, length in enumerate(WINDOWS):
            found = [run.run.evaluation.cls[length] for run in runs
                     if run.run and run.run.evaluation and length in run.run.evaluation.cls]  # fmt: skip
            if found:
                points.append((i, sum(found) / len(found)))
        if points:
            axes.plot(*zip(*points), color=_color(method), marker="o", markersize=4, markeredgecolor=LIGHT["surface"])
            ends.append((points[-1][1], f"{_label(runs)} {points[-1][1]:.1f} %", _color(method)))
    axes.set_xticks(range(len(WINDOWS)), [str(length) for length in WINDOWS])
    axes.set_xlim(-0.1, len(WINDOWS) - 0.9)
    chart.percent_axis(axes)
    axes.set_title("Experts idle for the whole window, percent")
    axes.set_xlabel("window, tokens in a row")
    _end_labels(axes, ends)
    return figure


@styled
def granularity(counts: Mapping[int, Result]) -> Figure:
    """Loss on the left, TLS and CLS8 on the right, against the number of experts at constant total width."""
    figure = chart.blank(2.6)
    left, right = figure.subplots(1, 2)
    numbers = sorted(counts)
    series = {name: [counts[n].values[name] or math.nan for n in numbers] for name in ("heldout_loss", "tls", "cls8")}
    left.plot(numbers, series["heldout_loss"], color=BLUE, marker="o", markersize=4)
    losses = series["heldout_loss"]
    for i, (x, y) in enumerate(zip(numbers, losses)):
        # On the side that the line does not come from.
        beside = losses[max(i - 1, 0) : i + 2]
        above = y >= sum(beside) / len(beside)
        left.annotate(f"{y:.3f}", (x, y), (0, 6 if above else -6), textcoords="offset points", ha="center",
                      va="bottom" if above else "top", color=BLUE)  # fmt: skip
    left.margins(x=0.1, y=0.3)
    left.set_title("Held-out loss, nats per token")
    ends = []
    for name, text, color in (("tls", "TLS", ORANGE), ("cls8", "CLS8", GREEN)):
        right.plot(numbers, series[name], color=color, marker="o", markersize=4)
        ends.append((series[name][-1], f"{text} {series[name][-1]:.1f} %", color))
    right.set_title("Experts left idle, percent")
    chart.percent_axis(right)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(numbers))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.set_xlabel("experts, same total width")
    chart.end_labels(right, ends)
    return figure


def _end_labels(axes: Axes, ends: Sequence[chart.End]) -> None:
    """Names at the ends of many lines: spread as in other charts, then moved back beside the axes they belong to."""
    low, high = axes.get_ylim()
    places = chart.spread([end[0] for end in ends], 13.5 * _points(axes))
    shift = max(0.0, low - min(places, default=low)) - max(0.0, max(places, default=high) - high)
    chart.end_labels(axes, [(place + shift, text, color) for place, (_, text, color) in zip(places, ends)])


def _points(axes: Axes) -> float:
    """What a typographic point is on the y axis."""
    low, high = axes.get_ylim()
    root = axes.get_figure(root=True)
    assert root is not None
    return (high - low) / (axes.get_position().height * root.get_figheight() * 72)


def _name_points(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside points, moved apart vertically where they would overlap; a moved one has a line to its point."""
    low, gap = axes.get_ylim()[0], 12 * _points(axes)
    placed: list[tuple[float, float, float]] = []  # left, right, y
    for x, y, text, color in sorted(labels, key=lambda label: -label[1]):
        width = 1.25 * len(text) + 2
        flip = x + width > 99
        start = x - width if flip else x
        top = y
        while any(abs(top - other) < gap and start < end and begin < start + width for begin, end, other in placed):
            top -= gap / 4
        top = max(top, low + gap / 2)
        placed.append((start, start + width, top))
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            text, (x, y), (x - 1.6 if flip else x + 1.6, top), color=color, va="center",
            ha="right" if flip else "left", arrowprops=line if abs(top - y) > gap / 2 else None,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by what the plots call their method."""
    return {_label(runs): runs for runs in by_method(results).values()}


def _log(result: Result) -> list[dict[str, float]]:
    return (result.run.metrics if result.run is not None else None) or []


def _label(runs: Sequence[Result]) -> str:
    return runs[0].experiment.label.partition(" (")[0]


def _color(method: str) -> str:
    return COLORS.get(method, MUTED)
