"""The report's colours, once: drawn in the light column, shown in either.

Hues follow Okabe and Ito, which people with the common colour-vision deficiencies can tell apart. Two sequential scales
of nine steps lead away from the background, so that "more" stands out in light and in dark alike: `step` for areas and
`heat` for the ground of text, on which the ink stays readable at every step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

STEPS = 9

_LIGHT_STEPS = ("#eff4fa", "#dce8f4", "#c3d9ed", "#9dc6e3", "#6fafd8", "#4795cb", "#1f6eb3", "#0a529b", "#083169")
_LIGHT_HEAT = ("#fcf8f3", "#fbf0e3", "#fae6cf", "#f9dbb9", "#f8cfa1", "#f7c287", "#f5b46c", "#f2a552", "#ee9537")
_DARK_STEPS = ("#1c2a38", "#1e3448", "#20415d", "#235278", "#2a6797", "#4f97cd", "#7cb6e2", "#a9d1f1", "#d8ecfd")
_DARK_HEAT = ("#1d2026", "#292321", "#37291f", "#462f1d", "#55361b", "#643d1a", "#744418", "#844b16", "#945214")

LIGHT: dict[str, str] = {
    "surface": "#ffffff",
    "page": "#f5f6f8",
    "ink": "#1b2026",
    "muted": "#5c6570",
    "axis": "#b9c0c9",
    "grid": "#e9ecf0",
    "blue": "#0072b2",
    "orange": "#c85200",
    "green": "#007a5a",
    "purple": "#a33e82",
    "grey": "#6a7480",
    **{f"step-{i}": color for i, color in enumerate(_LIGHT_STEPS)},
    **{f"heat-{i}": color for i, color in enumerate(_LIGHT_HEAT)},
}
DARK: dict[str, str] = {
    "surface": "#171c23",
    "page": "#0e1217",
    "ink": "#e6eaef",
    "muted": "#9aa5b1",
    "axis": "#46505c",
    "grid": "#272e37",
    "blue": "#5ab4ee",
    "orange": "#f59a55",
    "green": "#3fc79c",
    "purple": "#df8fc4",
    "grey": "#8d97a4",
    **{f"step-{i}": color for i, color in enumerate(_DARK_STEPS)},
    **{f"heat-{i}": color for i, color in enumerate(_DARK_HEAT)},
}

# Upper bounds, in percent of tokens, of the first eight steps of expert use. Fixed, so that two reports compare, and
# finer below, where the experts of a sparse model are.
USE_BOUNDS = (1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 80.0)


def step_of(value: float, bounds: Sequence[float]) -> int:
    """The step of a sequential scale, 0 to 8, for a value; `bounds` are the eight limits between steps."""
    return bisect_right(bounds, value)


def even_bounds(low: float, high: float) -> list[float]:
    """Eight limits that cut `[low, high]` into nine equal steps."""
    return [low + (high - low) * (i + 1) / STEPS for i in range(STEPS - 1)]


def css_variables(colors: dict[str, str]) -> str:
    """`--ink: #1b2026; …` for a style sheet."""
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
