"""The report's figures. Each function takes plain data and returns a matplotlib `Figure`; none touches global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, WIDTH, styled
from blockffn.reporting.palette import LIGHT, STEPS, USE_BOUNDS, even_bounds, step_of
from blockffn.reporting.run import Layer, SampleToken
from blockffn.reporting.svg import TIP
from blockffn.reporting.tables import label


@styled
def training(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    sparsity: Mapping[str, Sequence[float]],
    heldout_loss: float | None = None,
    twin: tuple[Sequence[float], Sequence[float]] | None = None,
    twin_name: str = "dense twin",
    twin_heldout_loss: float | None = None,
) -> Figure:
    """Loss above, sparsity (name: percent at each step; may be empty) below, on the same steps.

    Thin lines are the values as logged, thick ones their running mean, dots at the end the held-out losses; NaN is a
    gap. With a twin, the end of training is also shown magnified, if the curves leave room for it.
    """
    figure = chart.blank(4.6 if sparsity else 2.6)
    axes = list(figure.subplots(2 if sparsity else 1, 1, sharex=True, squeeze=False)[:, 0])
    curves = [("this run", BLUE, steps, losses, heldout_loss)]
    if twin is not None:
        curves.insert(0, (twin_name, GREY, *twin, twin_heldout_loss))
    right = max(x for _, _, xs, _, _ in curves for x in xs)
    axes[0].set_title(
        "Language-model loss, nats per token" + ("; dots: held-out text" if heldout_loss is not None else "")
    )
    ends = [chart.curve(axes[0], x, y, name, color) for name, color, x, y, _ in curves]
    axes[0].yaxis.set_major_locator(chart.ticks(5))
    chart.end_labels(axes[0], ends)
    close = axes[0]
    if twin is not None and _corner_is_free(axes[0], [(x, y) for _, _, x, y, _ in curves], right):
        close = _last_third(axes[0], [(color, x, y) for _, color, x, y, _ in curves], right)
    dots = [(value, f"{value:.3f}", color) for _, color, _, _, value in curves if value is not None]
    for value, _, color in dots:
        close.plot(right, value, "o", color=color, markersize=5, markeredgecolor=LIGHT["surface"], clip_on=False)
    if close is not axes[0]:
        chart.end_labels(close, dots)
    if sparsity:
        colors = dict(zip(sparsity, (ORANGE, GREEN, PURPLE)))
        chart.percent_axis(axes[1])
        ends = [chart.curve(axes[1], steps, y, f"{k} {chart.last(y):.1f} %", colors[k]) for k, y in sparsity.items()]
        chart.end_labels(axes[1], ends)
        axes[1].set_title("Experts left idle, percent")
    chart.step_axis(axes[-1], right)
    values = {"loss": (losses, ".3f"), **{name: (y, ".1f") for name, y in sparsity.items()}}
    chart.hover_bands(axes, steps, [_tip(step, values, i) for i, step in enumerate(steps)])
    return figure


@styled
def loss_terms(
    steps: Sequence[float], terms: Mapping[str, Sequence[float]], coefficients: Mapping[str, Sequence[float]]
) -> Figure:
    """One row per term that is added to the loss: its value on the left, its coefficient on the right.

    Raises:
        ValueError: there is no term.
    """
    if not terms:
        raise ValueError("no loss terms to draw; a dense run has none")
    figure = chart.blank(0.5 + 1.25 * len(terms))
    grid = figure.subplots(len(terms), 2, sharex=True, squeeze=False)
    for row, (name, values) in zip(grid, terms.items()):
        weights = coefficients.get(name)
        row[0].set_title(label(name))
        ends = [chart.curve(row[0], steps, values, f"{chart.last(values):.3g}", PURPLE)]
        if weights is None:
            row[1].set_axis_off()
        else:
            row[1].set_title("its coefficient")
            row[1].plot(*chart.thin(steps, weights), color=GREY, drawstyle="steps-post")
            ends.append((chart.last(weights), f"{chart.last(weights):.3g}", MUTED))
        for axes, end, column in zip(row, ends, (values, weights or ())):
            axes.set_ylim(*chart.roomy([value for value in column if math.isfinite(value)]))
            axes.yaxis.set_major_locator(chart.ticks(3))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # small ones as the label at the end
            chart.end_labels(axes, [end])
        tips = []
        for i, step in enumerate(steps):
            tip = f"step {step:,.0f}\n{label(name)} {values[i]:.4g}"
            tips.append(tip if weights is None else f"{tip} × {weights[i]:.4g} = {values[i] * weights[i]:.4g}")
        chart.hover_bands(row, steps, tips)
    for axes in grid[-1]:
        chart.step_axis(axes, max(steps, default=1))
    return figure


@styled
def windows(cls: Mapping[int, float], tls: float) -> Figure:
    """Share of experts idle for a whole window of tokens (percent), against what independent routing would leave idle.

    If each expert were idle with probability `tls` independently at each token, a window of `L` tokens would leave it
    idle with probability `tls ** L`.
    """
    lengths = sorted(cls)
    measured = [cls[length] for length in lengths]
    independent = [100 * (tls / 100) ** length for length in lengths]
    figure = chart.blank(2.9)
    axes = figure.subplots()
    x = range(len(lengths))
    axes.fill_between(x, independent, measured, color=ORANGE, alpha=0.1, linewidth=0)
    axes.plot(x, independent, color=GREY, linestyle=(0, (4, 2)), linewidth=1.2)
    axes.plot(x, measured, color=ORANGE, marker="o", markersize=5, markeredgecolor=LIGHT["surface"])
    for i, value in enumerate(measured):
        axes.annotate(f"{value:.1f}", (i, value), (0, 6), textcoords="offset points", ha="center", color=ORANGE)
    chart.percent_axis(axes)
    chart.end_labels(axes, [(measured[-1], "measured", ORANGE), (independent[-1], "independent\nrouting", MUTED)])
    axes.set_xticks(list(x), [f"{length}" for length in lengths])
    axes.set_xlabel("window, tokens in a row")
    axes.set_title("Experts idle for the whole window, percent")
    tips = [
        f"{length} {'token' if length == 1 else 'tokens in a row'}\nmeasured {a:.1f} %\nindependent routing {b:.1f} %"
        for length, a, b in zip(lengths, measured, independent)
    ]
    chart.hover_bands([axes], list(x), tips)
    return figure


@styled
def expert_use(use: Sequence[Sequence[float]], *, by_use: bool = True) -> Figure:
    """Share of tokens (percent) that use each expert, layers × experts; a cross marks an expert that none uses.

    Args:
        use: one row per layer; rows may differ in length.
        by_use: sort each layer's experts by use, most used first; otherwise keep their numbers.
    """
    columns = max(map(len, use))
    figure = chart.blank(0.95 + chart.rows_height(len(use)))
    axes = figure.subplots()
    for layer, shares in enumerate(use):
        order = sorted(range(len(shares)), key=lambda e: -shares[e]) if by_use else range(len(shares))
        for column, expert in enumerate(order):
            color = LIGHT[f"step-{step_of(shares[expert], USE_BOUNDS)}"]
            cell = Rectangle((column + 0.03, layer + 0.06), 0.94, 0.88, facecolor=color, edgecolor="none")
            cell.set_gid(f"{TIP}layer {layer + 1}, expert {expert + 1}\nused by {shares[expert]:.1f} % of tokens")
            axes.add_patch(cell)
            if shares[expert] <= 0:
                axes.plot(column + 0.5, layer + 0.5, "x", color=ORANGE, markersize=3.5, markeredgewidth=0.9)
    axes.set_xlim(0, columns)
    axes.set_ylim(len(use), 0)
    chart.layer_axis(axes, len(use), offset=0.5)
    axes.set_xticks([0, columns], ["most used", "least used"] if by_use else ["expert 1", f"expert {columns}"])
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    chart.scale(axes, USE_BOUNDS, dead=any(share <= 0 for shares in use for share in shares))
    return figure


@styled
def layers(rows: Sequence[Layer]) -> Figure:
    """TLS, CLS8 and reuse ratio of each layer, in percent, as dots on one line per layer."""
    figure = chart.blank(0.85 + chart.rows_height(len(rows)))
    axes = figure.subplots()
    series = {
        "CLS8": (GREEN, "s", [row.cls.get(8) for row in rows]),
        "TLS": (ORANGE, "o", [row.tls for row in rows]),
        "reuse": (BLUE, "D", [row.reuse_ratio for row in rows]),
    }
    for layer, values in enumerate(zip(*(column for _, _, column in series.values()))):
        known = [value for value in values if value is not None]
        if known:
            axes.plot([min(known), max(known)], [layer, layer], color=LIGHT["axis"], linewidth=1, zorder=1)
    first = []
    for name, (color, marker, column) in series.items():
        points = [(value, layer) for layer, value in enumerate(column) if value is not None]
        if points:
            axes.plot(*zip(*points), marker, color=color, markersize=6, markeredgecolor=LIGHT["surface"])
            first.append((points[0][0], name, color))
    least = min((value for *_, column in series.values() for value in column if value is not None), default=0.0)
    left = 20 * math.floor(max(least - 2, 0) / 20)
    for x, (_, name, color) in zip(chart.spread([x for x, _, _ in first], 0.07 * (100 - left)), first):
        axes.annotate(name, (x, -0.5), (0, 4), textcoords="offset points", ha="center", color=color, weight="bold")
    axes.set_xlim(left, 100)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_xlabel("percent")
    chart.layer_axis(axes, len(rows), offset=0)
    for layer in range(len(rows)):
        tip = "\n".join(
            f"{name} {column[layer]:.1f} %" for name, (_, _, column) in series.items() if column[layer] is not None
        )
        chart.hover(axes, left, layer - 0.5, 100 - left, 1, f"layer {layer + 1}\n{tip}")
    return figure


@styled
def sample(tokens: Sequence[SampleToken], *, columns: int = 84) -> Figure:
    """Generated text on a ground that deepens with the share of experts each token used; the prompt is underlined."""
    bounds = even_bounds(*share_range(tokens))
    cells, rows = _lay_out(tokens, columns)
    line, character = 0.205, (WIDTH - 0.4) / columns
    figure = Figure(figsize=(WIDTH, line * (rows + 3.2)))
    axes = figure.add_axes((0.2 / WIDTH, 0.0, 1 - 0.4 / WIDTH, 1.0))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows + 2.6, -0.6)
    axes.set_axis_off()
    size = character * 72 / 0.602  # DejaVu Sans Mono is 0.602 em wide
    for text, row, column, token in cells:
        step = None if token.active_share is None else step_of(token.active_share, bounds)
        if step is not None:
            top, height = (0.04, 0.92) if token.generated else (0.82, 0.12)
            color = LIGHT[f"heat-{step}"]
            axes.add_patch(Rectangle((column, row + top), len(text), height, facecolor=color, edgecolor="none"))
        ink = INK if token.generated else MUTED
        for offset, one in enumerate(text):  # one by one: a fallback glyph must not push the rest aside
            if one.isspace():
                continue
            x, y = column + offset + 0.5, row + 0.52
            axes.text(x, y, one, color=ink, size=size, family="DejaVu Sans Mono", ha="center", va="center_baseline")
    if any(token.active_share is not None for token in tokens):
        low, high = share_range(tokens)
        for i in range(STEPS):
            axes.add_patch(Rectangle((3 * i, rows + 1.0), 2.9, 0.6, facecolor=LIGHT[f"heat-{i}"], edgecolor="none"))
        for x, value in ((0, low), (3 * STEPS, high)):
            axes.text(x, rows + 2.1, f"{value:.0f} %", color=MUTED, ha="left" if x == 0 else "right", va="center")
        words = "of the experts used; grey and underlined: the prompt"
        axes.text(3 * STEPS + 1, rows + 1.3, words, color=MUTED, va="center")
    return figure


def share_range(tokens: Sequence[SampleToken]) -> tuple[float, float]:
    """Smallest and largest active share among the tokens, in percent; (0, 100) when none is known."""
    shares = [token.active_share for token in tokens if token.active_share is not None]
    return (min(shares), max(shares)) if shares else (0.0, 100.0)


def _corner_is_free(axes: Axes, curves: Sequence[tuple[Sequence[float], Sequence[float]]], right: float) -> bool:
    """Whether all curves stay below what `_last_third` covers."""
    low, high = axes.get_ylim()
    late = (b for x, y in curves for a, b in zip(x, y) if a >= 0.36 * right and math.isfinite(b))
    return max(late, default=high) < low + 0.36 * (high - low)


def _last_third(axes: Axes, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], right: float) -> Axes:
    """The end of training again, magnified in the empty corner above the curves: the twins differ by a few percent."""
    inset = axes.inset_axes((0.42, 0.4, 0.47, 0.44))
    for color, x, y in curves:
        smooth = chart.running_mean(y, len(y) // chart.MEANS)
        late = [(a, b) for a, b in zip(x, smooth) if a >= right * 2 / 3 and math.isfinite(b)]
        if late:
            inset.plot(*chart.thin(*zip(*late)), color=color)
    inset.set_xlim(right * 2 / 3, right)
    inset.set_xticks([])
    inset.margins(y=0.25)
    inset.yaxis.set_major_locator(chart.ticks(3))
    inset.tick_params(labelsize=7)
    inset.set_title("the last third", size=7.5, color=MUTED)
    return inset


def _tip(step: float, values: Mapping[str, tuple[Sequence[float], str]], i: int) -> str:
    lines = [f"{name} {y[i]:{form}}" for name, (y, form) in values.items() if math.isfinite(y[i])]
    return "\n".join([f"step {step:,.0f}", *lines])


def _lay_out(tokens: Sequence[SampleToken], columns: int) -> tuple[list[tuple[str, int, int, SampleToken]], int]:
    """Pieces of tokens with their row and column, wrapped at `columns`; and the number of rows."""
    cells: list[tuple[str, int, int, SampleToken]] = []
    row = column = 0
    for token in tokens:
        for i, part in enumerate(token.text.expandtabs(4).split("\n")):
            if i:
                row, column = row + 1, 0
            part = "".join(one if one.isprintable() else "\ufffd" for one in part)
            while part:
                if column == columns:
                    row, column = row + 1, 0
                piece, part = part[: columns - column], part[columns - column :]
                cells.append((piece, row, column, token))
                column += len(piece)
    return cells, row + 1
