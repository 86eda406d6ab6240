"""The figure of `blockffn bench decode`: a bar for every way of decoding, and below it the ways by kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, INK, MUTED, ORANGE, styled


@styled
def decoding_rates(report: Mapping[str, Any]) -> Figure:
    """New tokens per second of every way, from the report's data; of several kinds of prompts also for each."""
    results = report["results"]
    kinds = [rate["task"] for rate in results[0]["rates"][:-1]]
    heights = [0.9 + 0.28 * len(results)] + ([0.7 + 0.11 * (len(results) + 1) * len(kinds)] if len(kinds) > 1 else [])
    figure = chart.blank(sum(heights))
    [axes], *below = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    _ways(axes, report)
    for [lower] in below:
        _kinds(lower, results, kinds)
    return figure


def _ways(axes: Axes, report: Mapping[str, Any]) -> None:
    results = report["results"]
    rates = [result["rates"][-1] for result in results]
    places = range(len(results))[::-1]
    for place, result, rate in zip(places, results, rates):
        axes.barh(place, rate["tokens_per_second"], 0.62, color=_color(result["way"]), alpha=_strength(result["way"]))
        kinds = [one["tokens_per_second"] for one in result["rates"][:-1]]
        axes.plot(kinds, [place] * len(kinds), "o", color=INK, markersize=2.5, alpha=0.7)
        end = max([rate["tokens_per_second"], *kinds])
        axes.annotate(_label(rate), (end, place), (5, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(list(places), [result["way"] for result in results])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.5 * max(max(one["tokens_per_second"] for one in result["rates"]) for result in results))
    axes.set_xlabel(f"new tokens per second; dots: kinds of prompts. {report['machine']['device']}")
    simulated = any(model["simulated_acceptance"] for model in report["models"].values())
    axes.set_title("Decoding, batch 1" + (", simulated acceptance" if simulated else ""))


def _kinds(axes: Axes, results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """A group of bars for every kind, in it one for every way from above."""
    step = 1 / (len(results) + 1)
    for place in range(len(kinds)):
        for number, result in enumerate(results):
            rate = result["rates"][place]
            at = -place - (number - (len(results) - 1) / 2) * step
            axes.barh(
                at, rate["tokens_per_second"], 0.85 * step, color=_color(result["way"]), alpha=_strength(result["way"])
            )
            text = f" {_speed(rate['tokens_per_second'])}"
            if (rate["acceptance_length"] or 1) > 1:
                text += f"  {rate['acceptance_length']:.1f} a step"
            axes.text(rate["tokens_per_second"], at, text, va="center", color=MUTED, fontsize=5.5)
    axes.set_yticks([-place for place in range(len(kinds))], [kind.replace("_", " ") for kind in kinds])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.5 * max(rate["tokens_per_second"] for result in results for rate in result["rates"]))
    axes.set_xlabel("new tokens per second")
    axes.set_title("By kind of prompt, in the order of the ways above")


def _label(rate: Mapping[str, Any]) -> str:
    text = _speed(rate["tokens_per_second"])
    if rate["ratio"] is not None:
        text += f"  {rate['ratio']:.2f}×"
    if (rate["acceptance_length"] or 1) > 1:
        text += f"  {rate['acceptance_length']:.1f} a step"
    return text


def _speed(rate: float) -> str:
    """As many digits as a timing has."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}"


def _strength(way: str) -> float:
    return 0.55 if "fixed tree" in way else 0.85


def _color(way: str) -> str:
    if way.startswith("sparse"):
        return GREEN if "tree" in way else BLUE
    return ORANGE if way.startswith("dense") and "Hugging" not in way else GREY
