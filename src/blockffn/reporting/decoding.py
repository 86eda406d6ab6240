"""The figure of `blockffn bench decode`: a bar for every way of decoding, and a dot for every kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, INK, MUTED, ORANGE, styled


@styled
def decoding_rates(report: Mapping[str, Any]) -> Figure:
    """New tokens per second of every way, from the report's data."""
    results = report["results"]
    rates = [result["rates"][-1] for result in results]
    figure = chart.blank(0.9 + 0.28 * len(results))
    axes = figure.subplots()
    places = range(len(results))[::-1]
    for place, result, rate in zip(places, results, rates):
        axes.barh(place, rate["tokens_per_second"], 0.62, color=_color(result["way"]), alpha=0.85)
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
    return figure


def _label(rate: Mapping[str, Any]) -> str:
    text = f"{rate['tokens_per_second']:.1f}"
    if rate["ratio"] is not None:
        text += f"  {rate['ratio']:.2f}×"
    if (rate["acceptance_length"] or 1) > 1:
        text += f"  {rate['acceptance_length']:.1f} a step"
    return text


def _color(way: str) -> str:
    if way.startswith("sparse"):
        return GREEN if "tree" in way else BLUE
    return ORANGE if way.startswith("dense") and "Hugging" not in way else GREY
