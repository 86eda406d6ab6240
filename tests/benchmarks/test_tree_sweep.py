"""What a sweep says of a regime follows from the rounds' ratios."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from tree_sweep import draw, summarise

from blockffn.evaluation.decoding.rounds import Rate, WayResult


def result(way: str, rate: float, ratio: float, tree: float | None = None) -> WayResult:
    return WayResult(way, (Rate("all", rate, ratio, 0.8 * ratio, 1.25 * ratio, 2.5, 100.0),), tree_size=tree)


RESULTS = [
    result("sparse, plain", 10.0, 0.5),
    result("sparse, fixed tree 3", 19.0, 0.94),
    result("sparse, fixed tree 15", 18.0, 0.95),  # slower by its median, but the best within the rounds
    result("sparse, fixed tree chain:3", 17.0, 0.9),
    result("sparse, tree by cost", 20.0, 1.0, 4.2),
]


def test_the_best_fixed_size_is_that_of_the_rounds() -> None:
    sweep = summarise("sparse", "int4", "oracle:0.8", RESULTS)
    assert sweep.fixed == {"plain": 10.0, "3": 19.0, "15": 18.0, "chain:3": 17.0}
    assert sweep.best_fixed == "15"
    assert sweep.gain == pytest.approx(1 / 0.95)
    assert sweep.gain_of_rounds == pytest.approx((0.8 / 0.95, 1.25 / 0.95))
    assert sweep.gain_over_plain == pytest.approx(2)
    assert (sweep.by_cost, sweep.tree_size) == (20.0, 4.2)


def test_the_figure_has_a_panel_for_every_model_and_precision() -> None:
    rows = [
        {"model": model, "precision": "int4", "draft": draft, "fixed": {"plain": 10.0, "3": 12.0}, "by_cost": 13.0}
        for model in ("sparse", "dense", "other")
        for draft in ("oracle:0.5", "oracle:0.8")
    ]
    figure = draw(rows, "a machine")
    assert sum(axes.axison for axes in figure.axes) == 3
