"""Plots of the results page: no label lies on a line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from blockffn.experiments.figures import granularity


def test_a_loss_is_written_on_the_side_that_the_line_does_not_come_from() -> None:
    losses = {12: 4.36, 24: 4.37, 48: 4.30, 96: 4.34}
    counts: Any = {
        count: SimpleNamespace(values={"heldout_loss": loss, "tls": 80.0, "cls8": 60.0})
        for count, loss in losses.items()
    }
    axes = granularity(counts).axes[0]
    sides = {text.get_text(): text.get_va() for text in axes.texts}
    assert sides == {"4.360": "top", "4.370": "bottom", "4.300": "top", "4.340": "bottom"}
