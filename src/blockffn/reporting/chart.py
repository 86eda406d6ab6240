"""What the figures have in common: style, lines with their name at the end, axes, and hover bands.

Series carry their name and last value at the end of the line instead of a legend. Invisible rectangles with an id that
starts with `tip:` hold what a reader sees on hover in the page (see `blockffn.reporting.svg`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from blockffn.reporting.palette import LIGHT
from blockffn.reporting.svg import TIP

WIDTH = 7.2  # inches
MEANS = 25  # of a curve: its running mean is over this part of its values
INK, MUTED, GREY = LIGHT["ink"], LIGHT["muted"], LIGHT["grey"]
BLUE, ORANGE, GREEN, PURPLE = (LIGHT[name] for name in ("blue", "orange", "green", "purple"))
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a sample is a dollar sign
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LIGHT["axis"],
    "axes.facecolor": LIGHT["surface"],
    "figure.facecolor": LIGHT["surface"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_MOST_POINTS, _MOST_BANDS = 1000, 120
P = ParamSpec("P")
End = tuple[float, str, str]  # where a line ends, what to write there, in which colour


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with the report's style, whatever the caller's matplotlib settings, and leaves those alone."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def blank(height: float) -> Figure:
    """An empty figure of the report's width; inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def rows_height(count: int) -> float:
    """Inches for one row per layer, denser where there are many."""
    return max(0.8, 0.24 * min(count, 12) + 0.15 * max(count - 12, 0))


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, color: str) -> End:
    """Draws the logged values thin and their running mean thick; returns the label of the line's end."""
    smooth = running_mean(y, len(y) // MEANS)
    if averages(y):
        axes.plot(*thin(x, y), color=color, linewidth=0.7, alpha=0.4)
    axes.plot(*thin(x, smooth), color=color)
    return last(smooth), name, color


def averages(values: Sequence[Any]) -> bool:
    """Whether there are so many that a curve's running mean is over more than one."""
    return len(values) // MEANS > 1


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window that shrinks at the ends and skips NaN; NaN stays NaN."""
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    kernel = np.ones(max(1, min(window, len(array))))
    total = np.convolve(np.where(known, array, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return [float(value) for value in np.where(known, total / np.maximum(count, 1.0), np.nan)]


def ticks(most: int) -> MaxNLocator:
    """At most so many tick intervals, at round numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10])


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of a curve, or evenly chosen ones where there are more than a screen shows."""
    keep = _evenly(len(x), _MOST_POINTS)
    return [x[i] for i in keep], [y[i] for i in keep]


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of the indices below `count`, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most)).tolist()})


def last(values: Sequence[float]) -> float:
    """The last finite value, NaN when there is none."""
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def end_labels(axes: Axes, ends: Sequence[End]) -> None:
    """Names to the right of the lines' ends, moved apart where they would overlap. Set the limits of y before."""
    ends = [end for end in ends if math.isfinite(end[0])]
    low, high = axes.get_ylim()
    root = axes.get_figure(root=True)
    assert root is not None
    height = axes.get_position().height * root.get_figheight() * 72  # points
    for y, (_, text, color) in zip(spread([end[0] for end in ends], 13 * (high - low) / height), ends):
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (1, y), (6, 0), color=color, **place)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as needed to be at least `gap` apart, in their order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for _ in range(50):
        for a, b in pairwise(order):
            lack = gap - (placed[b] - placed[a])
            if lack > 0:
                placed[a] -= lack / 2
                placed[b] += lack / 2
    return placed


def percent_axis(axes: Axes) -> None:
    """0 to 100 percent, with room for a line at 100."""
    axes.set_ylim(0, 102)
    axes.set_yticks([0, 25, 50, 75, 100])


def step_axis(axes: Axes, right: float) -> None:
    """Training steps from 0 to `right`."""
    axes.set_xlim(0, max(right, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(ticks(6))
    axes.set_xlabel("training step")


def layer_axis(axes: Axes, count: int, *, offset: float) -> None:
    """Names of the layers, counted from 1; row `i` is at `i + offset`."""
    every = max(1, math.ceil(count / 20))
    shown = range(0, count, every)
    axes.set_yticks([i + offset for i in shown], [f"layer {i + 1}" for i in shown])


def roomy(values: Sequence[float]) -> tuple[float, float]:
    """Limits from zero (or the least value, if negative) to a little above the largest."""
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high + 0.12 * ((high - low) or 1.0)


def hover_bands(axes: Sequence[Axes], x: Sequence[float], tips: Sequence[str]) -> None:
    """Invisible columns over the plot, one per shown x, each with its tip."""
    keep = _evenly(len(x), _MOST_BANDS)
    places = [x[i] for i in keep]
    for one in axes:
        if not one.axison:
            continue
        (left, right), (low, high) = one.get_xlim(), one.get_ylim()
        middles = [(a + b) / 2 for a, b in pairwise(places)]
        for i, start, end in zip(keep, [left, *middles], [*middles, right]):
            hover(one, start, low, end - start, high - low, tips[i])
        one.set_xlim(left, right)
        one.set_ylim(low, high)


def hover(axes: Axes, x: float, y: float, width: float, height: float, tip: str) -> None:
    """An invisible rectangle that shows `tip` in the page."""
    band = Rectangle((x, y), width, height, facecolor="none", edgecolor="none", zorder=5)
    band.set_gid(TIP + tip)
    band.set_in_layout(False)
    axes.add_patch(band)


def scale(axes: Axes, bounds: Sequence[float], *, dead: bool) -> None:
    """The sequential scale with its limits, above the plot."""
    names = [f"< {bounds[0]:g}", *(f"{a:g}–{b:g}" for a, b in pairwise(bounds)), f"≥ {bounds[-1]:g} % of tokens"]
    entries = [("s", LIGHT[f"step-{i}"], name) for i, name in enumerate(names)]
    if dead:
        entries.append(("x", ORANGE, "dead"))
    x = 0.0
    for marker, color, name in entries:
        axes.plot([x + 0.008], [1], marker, color=color, markersize=7 if marker == "s" else 4, clip_on=False,
                  transform=axes.transAxes + ScaledTranslation(0, 12 / 72, axes.figure.dpi_scale_trans))  # fmt: skip
        axes.annotate(name, (x + 0.02, 1), (0, 12), xycoords="axes fraction", textcoords="offset points", color=MUTED,
                      size=7, va="center")  # fmt: skip
        x += 0.036 + 0.0096 * len(name)
