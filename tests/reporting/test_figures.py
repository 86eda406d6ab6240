from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from blockffn.reporting import chart, evidence_figures, figures
from blockffn.reporting.palette import DARK, LIGHT, STEPS, USE_BOUNDS, even_bounds, step_of
from blockffn.reporting.run import Layer, SampleToken
from blockffn.reporting.svg import TIP, inline_svg


def lines(figure: Figure, axes: int = 0) -> list[list[float]]:
    return [list(map(float, line.get_ydata())) for line in figure.axes[axes].lines]  # type: ignore[arg-type]


def tips(figure: Figure) -> list[str]:
    return [
        str(patch.get_gid()).removeprefix(TIP)
        for axes in figure.axes
        for patch in axes.patches
        if str(patch.get_gid()).startswith(TIP)
    ]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_running_mean_skips_gaps_and_leaves_them() -> None:
    mean = chart.running_mean([1.0, 3.0, math.nan, 5.0], 3)
    assert mean[0] == 2.0
    assert mean[1] == 2.0
    assert math.isnan(mean[2])
    assert mean[3] == 5.0


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    placed = chart.spread([5.0, 1.0, 5.1], 1.0)
    assert placed[1] == 1.0
    assert placed[2] - placed[0] == pytest.approx(1.0, abs=1e-6)
    assert (placed[0] + placed[2]) / 2 == pytest.approx(5.05)


def test_the_training_figure_draws_loss_and_sparsity_on_the_same_steps() -> None:
    figure = figures.training([1, 2, 3], [4.0, 3.0, 2.0], sparsity={"TLS": [10.0, 20.0, 30.0], "CLS8": [1.0, 2.0, 3.0]})
    assert lines(figure, 0) == [[4.0, 3.0, 2.0]]
    assert lines(figure, 1) == [[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]]
    assert "TLS 30.0 %" in texts(figure)
    assert "step 2\nloss 3.000\nTLS 20.0\nCLS8 2.0" in tips(figure)


def test_the_training_figure_of_a_dense_run_has_no_sparsity_axes() -> None:
    assert len(figures.training([1, 2], [4.0, 3.0], sparsity={}).axes) == 1


def test_the_training_figure_shows_the_twin_and_both_heldout_losses() -> None:
    twin = ([1, 3, 6], [8.0, 2.9, 2.4])
    figure = figures.training(
        [1, 3, 6], [8.0, 3.0, 2.5], sparsity={}, heldout_loss=2.4, twin=twin, twin_heldout_loss=2.3
    )
    inset = figure.axes[0].child_axes[0]
    assert lines(figure, 0) == [[8.0, 2.9, 2.4], [8.0, 3.0, 2.5]]
    assert {text.get_text() for text in inset.texts} == {"2.300", "2.400"}


def test_the_end_is_magnified_only_where_it_hides_no_curve() -> None:
    falls_late = ([1, 3, 6], [8.0, 7.0, 2.5])
    figure = figures.training(*falls_late, sparsity={}, twin=falls_late, heldout_loss=2.4)
    assert figure.axes[0].child_axes == []
    assert lines(figure, 0)[-1] == [2.4]


def test_a_loss_that_is_not_a_number_is_a_gap_and_not_a_failure() -> None:
    figure = figures.training([1, 2, 3], [4.0, math.nan, math.inf], sparsity={"TLS": [math.nan] * 3})
    assert inline_svg(figure, "training", "").startswith("<svg")


def test_a_single_logged_step_can_be_drawn() -> None:
    assert inline_svg(figures.training([0], [4.0], sparsity={"TLS": [1.0]}), "one", "").startswith("<svg")


def test_thousands_of_steps_are_thinned_to_what_a_screen_shows() -> None:
    steps = list(range(5000))
    figure = figures.training(steps, [float(step) for step in steps], sparsity={})
    assert {len(line) for line in lines(figure)} == {1000}
    assert lines(figure)[0][-1] == 4999.0
    assert len(tips(figure)) == 120


def test_loss_terms_show_value_coefficient_and_their_product() -> None:
    figure = figures.loss_terms([1, 2], {"chunk": [0.5, 0.4], "other": [1.0, 1.0]}, {"chunk": [0.1, 0.2]})
    assert lines(figure, 0) == [[0.5, 0.4]]
    assert lines(figure, 1) == [[0.1, 0.2]]
    assert not figure.axes[3].axison
    assert "step 2\nChunk 0.4 × 0.2 = 0.08" in tips(figure)


def test_loss_terms_of_a_dense_run_are_an_error() -> None:
    with pytest.raises(ValueError, match="no loss terms"):
        figures.loss_terms([1], {}, {})


def test_independent_routing_is_the_power_of_the_tls() -> None:
    figure = figures.windows({1: 80.0, 8: 60.0, 2: 75.0}, 80.0)
    independent, measured = lines(figure)
    assert measured == [80.0, 75.0, 60.0]
    np.testing.assert_allclose(independent, [80.0, 64.0, 100 * 0.8**8])


def test_experts_are_sorted_by_use_and_dead_ones_are_crossed() -> None:
    figure = figures.expert_use([[5.0, 90.0, 0.0], [0.0, 0.0, 1.0]])
    cells = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert [tip.split("\n")[0] for tip in tips(figure)[:3]] == [
        "layer 1, expert 2",
        "layer 1, expert 1",
        "layer 1, expert 3",
    ]
    assert to_hex(cells[0].get_facecolor()) == LIGHT["step-8"]
    assert to_hex(cells[2].get_facecolor()) == LIGHT["step-0"]
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert len(crosses) == 3 + 1  # one in the scale


def test_experts_keep_their_numbers_when_not_sorted() -> None:
    figure = figures.expert_use([[5.0, 90.0]], by_use=False)
    assert tips(figure) == ["layer 1, expert 1\nused by 5.0 % of tokens", "layer 1, expert 2\nused by 90.0 % of tokens"]
    assert "dead" not in texts(figure)


def test_layers_are_dots_at_their_values() -> None:
    rows = [Layer(80.0, {8: 60.0}, 85.0, [], 0), Layer(70.0, {}, None, [], 0)]
    figure = figures.layers(rows)
    dots = {line.get_marker(): list(line.get_xdata()) for line in figure.axes[0].lines}  # type: ignore[arg-type]
    assert (dots["o"], dots["s"], dots["D"]) == ([80.0, 70.0], [60.0], [85.0])
    assert tips(figure)[1] == "layer 2\nTLS 70.0 %"


def test_a_sample_with_any_text_can_be_drawn() -> None:
    tokens = [
        SampleToken(text, i > 0, 3.0, 10.0 * i) for i, text in enumerate(("$x^{", "\t\n\n", "é中🙂\x00", "long" * 50))
    ]
    figure = figures.sample(tokens, columns=20)
    drawn = "".join(texts(figure))
    assert drawn.startswith("$x^{é中🙂\ufffdlong")
    figure.canvas.draw()


def test_a_histogram_leaves_out_the_far_ends_and_counts_them() -> None:
    counts = [0.0, 400.0, 590.0, 400.0, *[0.0] * 15, 2.0]
    edges = [float(x) for x in range(10, 31)]
    fit = {"means": [12.4, 12.6], "deviations": [0.6, 2.0], "shares": [0.9, 0.1]}
    figure = evidence_figures.histogram(edges, counts, fit)
    axes = figure.axes[0]
    assert axes.get_xlim() == (11.0, 14.0)
    assert "2 more are beyond" in axes.get_xlabel()
    assert "beyond" not in evidence_figures.histogram(edges[:5], counts[:4], fit).axes[0].get_xlabel()
    figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in axes.texts)
    assert first.x1 < second.x0  # means that are near have their numbers apart
    bars = [bar.get_window_extent() for bar in axes.patches if not str(bar.get_gid()).startswith(TIP)]
    assert all(bar.y1 <= min(first.y0, second.y0) for bar in bars)


def test_a_drawing_in_the_page_has_no_ground_of_its_own() -> None:
    """What the page draws behind it, the shadow that says there is more to scroll to, stays visible."""
    svg = inline_svg(figures.training([1, 2], [4.0, 3.0], sparsity={}), "training", "loss")
    grounds = [part for part in svg.split("<g ") if part.startswith(('id="training-patch_1"', 'id="training-patch_2"'))]
    assert len(grounds) == 2
    for ground in grounds:
        assert "fill: none" in ground or "opacity: 0" in ground, ground


def test_drawing_leaves_the_callers_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    inline_svg(figures.windows({1: 80.0, 8: 60.0}, 80.0), "windows", "")
    assert dict(matplotlib.rcParams) == before


def test_a_value_on_a_limit_belongs_to_the_step_above() -> None:
    assert [step_of(value, USE_BOUNDS) for value in (0.0, 0.99, 1.0, 80.0, 100.0)] == [0, 0, 1, 8, 8]
    bounds = even_bounds(10.0, 19.0)
    assert [step_of(value, bounds) for value in (10.0, 11.0, 14.5, 19.0)] == [0, 1, 4, 8]


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_meets_the_contrast_of_wcag_aa(colors: dict[str, str]) -> None:
    on_surface = {name: contrast(colors[name], colors["surface"])
                  for name in ("ink", "muted", "blue", "orange", "green", "purple", "grey")}  # fmt: skip
    on_heat = {f"heat-{i}": contrast(colors["ink"], colors[f"heat-{i}"]) for i in range(STEPS)}
    assert {name: ratio for name, ratio in (on_surface | on_heat).items() if ratio < 4.5} == {}


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("scale", ["step", "heat"])
def test_the_sequential_scales_lead_steadily_away_from_the_surface(colors: dict[str, str], scale: str) -> None:
    ratios = [contrast(colors[f"{scale}-{i}"], colors["surface"]) for i in range(STEPS)]
    assert ratios == sorted(ratios)
    assert min(b / a for a, b in zip(ratios, ratios[1:])) > 1.04  # noqa: RUF007


def test_light_and_dark_name_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
