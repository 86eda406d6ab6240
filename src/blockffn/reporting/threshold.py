"""The figure of a run-time threshold: what skipping weak experts costs in loss and saves in weights read and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, ORANGE, styled


@styled
def threshold_curve(
    losses: Sequence[float],
    *,
    thresholds: Sequence[float],
    bytes_read: Sequence[float],
    microseconds: Sequence[float],
    sparsity: Sequence[float],
) -> Figure:
    """Loss over the expert weights read a token (left), and time and sparsity over the threshold (right).

    One value of each sequence belongs to one threshold, ascending. Bytes and times are drawn relative to the first.
    """
    figure = chart.blank(2.9)
    quality, speed = figure.subplots(1, 2)
    read = [100 * value / bytes_read[0] if bytes_read[0] else 0.0 for value in bytes_read]
    quality.plot(read, losses, "o-", color=BLUE, markersize=4)
    low, high = min(losses), max(losses)
    near, above, labelled = 0.1 * (max(read) - min(read)), True, math.inf
    for x, y, threshold in zip(read, losses, thresholds):  # left above the rising curve, or right below a close one
        above = labelled - x > near or not above
        place: Any = {"ha": "right", "va": "bottom"} if above else {"ha": "left", "va": "top"}
        shift = (-1, 4) if above else (1, -4)
        quality.annotate(f"{threshold:g}", (x, y), shift, textcoords="offset points", color=GREY, **place)
        labelled = x
    quality.margins(x=0.1)
    quality.set_ylim(low - 0.15 * (high - low or 1), high + 0.15 * (high - low or 1))
    quality.invert_xaxis()
    quality.set_title("Held-out loss, nats per token; numbers: thresholds")
    quality.set_xlabel("expert weights read per token, % of threshold 0")
    places = range(len(thresholds))  # evenly spaced: thresholds are chosen by factors
    times = [100 * value / microseconds[0] for value in microseconds]
    lines = (("time", times, ORANGE), ("bytes", read, BLUE), ("TLS", list(sparsity), GREEN))
    for _, values, color in lines:
        speed.plot(places, values, "o-", color=color, markersize=4)
    speed.set_ylim(0, max(102.0, *times))
    chart.end_labels(speed, [(values[-1], name, color) for name, values, color in lines])
    speed.set_xticks(list(places), [f"{threshold:g}" for threshold in thresholds])
    speed.set_title("FFN time and bytes, % of threshold 0; TLS, %")
    speed.set_xlabel("threshold on routing weights")
    return figure
