"""The decision on made-up measurements: what pays is recommended, what loses is warned of."""

from __future__ import annotations

import pytest
import torch

from blockffn.evaluation.decoding.advice import (
    DraftMeasurement,
    Recorded,
    TargetMeasurement,
    advise,
    by_measurement,
    conditional_rates,
    options_of,
    replay,
)
from blockffn.inference.speculative.tree import DraftTree

FLAT = {1: 10.0, 2: 10.5, 4: 11.0, 8: 12.0, 17: 15.0}  # memory decides: more tokens cost little
STEEP = {1: 10.0, 2: 19.0, 4: 37.0, 8: 73.0, 17: 154.0}  # compute decides: every token costs as much


def target(milliseconds: dict[int, float], precision: str = "auto") -> TargetMeasurement:
    return TargetMeasurement("auto", precision, milliseconds, 1e9)


def draft(name: str = "head", *, lengths: tuple[float, ...] = (1.7, 2.2, 2.6), level: float = 0.5) -> DraftMeasurement:
    sizes = (1, 3, 7)
    return DraftMeasurement(name, dict(zip(sizes, lengths)), dict(zip(sizes, (1.0, 2.0, 3.0))), level)


def test_steps_are_interpolated_and_never_extrapolated() -> None:
    measured = target(FLAT)
    assert measured.of(1) == 10
    assert measured.of(6) == pytest.approx(11.5)
    assert measured.of(99) == 15
    assert target({2: 3.0}).of(1) == 3


def test_where_tokens_are_nearly_free_the_largest_tree_is_best() -> None:
    advice = advise([target(FLAT)], [draft()])
    assert (advice.best.draft, advice.best.tree) == ("head", 7)
    assert advice.best.tokens_per_second == pytest.approx(1000 * 2.6 / (12.0 + 1.5))
    assert not advice.warnings


def test_where_every_token_costs_as_much_no_draft_is_recommended_and_it_is_said() -> None:
    advice = advise([target(STEEP)], [draft()])
    assert (advice.best.draft, advice.best.tree) == ("none", 0)
    assert advice.best.tokens_per_second == pytest.approx(100)
    assert "no draft pays" in advice.warnings[0]


def test_a_slow_draft_does_not_pay() -> None:
    assert advise([target(FLAT)], [draft(level=20.0)]).best.tree == 0


def test_a_gain_within_the_noise_does_not_count_as_one() -> None:
    advice = advise([target({1: 10.0, 2: 16.7})], [DraftMeasurement("head", {1: 1.7}, {1: 1.0}, 0.0)])
    assert advice.best.tree == 0


def test_the_better_draft_wins_and_the_one_that_loses_is_named() -> None:
    advice = advise([target(FLAT)], [draft("ngram", lengths=(1.01, 1.02, 1.03), level=0.0), draft()])
    assert advice.best.draft == "head"
    assert any("ngram with a tree of 7 loses" in warning for warning in advice.warnings)


def test_the_fastest_precision_is_best_and_the_stored_one_is_named_beside_it() -> None:
    quick = {tokens: spent / 2 for tokens, spent in FLAT.items()}
    advice = advise([target(FLAT), target(quick, "int4")], [draft()])
    assert advice.best.precision == "int4"
    assert advice.best_exact.precision == "auto"
    rates = [option.tokens_per_second for option in advice.options]
    assert rates == sorted(rates, reverse=True)


def test_plain_decoding_is_tried_beside_every_draft() -> None:
    quick = {tokens: spent / 2 for tokens, spent in FLAT.items()}
    advice = advise([target(FLAT), target(quick, "int4")], [draft()])
    assert {(o.precision, o.draft) for o in advice.options} == {
        (precision, name) for precision in ("auto", "int4") for name in ("head", "none")
    }


@pytest.mark.parametrize(
    ("rates", "best"), [((100.0, 120.0), "auto"), ((121.0, 120.0), "auto"), ((130.0, 120.0), "int4")]
)
def test_what_was_measured_outweighs_the_estimate(rates: tuple[float, float], best: str) -> None:
    quick = {tokens: spent / 2 for tokens, spent in FLAT.items()}
    estimated = advise([target(FLAT), target(quick, "int4")], [draft()])
    assert [(o.precision, o.draft) for o in estimated.options] == [
        ("int4", "head"), ("int4", "none"), ("auto", "head"), ("auto", "none"),
    ]  # fmt: skip
    advice = by_measurement(estimated, (rates[0], 60.0, rates[1], 50.0))
    assert advice.best.precision == best
    assert [o.precision for o in advice.options[:2]] == (["auto", "int4"] if rates[0] < rates[1] else ["int4", "auto"])
    assert advice.best_exact == estimated.best_exact
    assert advice.warnings == estimated.warnings


@pytest.mark.parametrize(("drafted", "best"), [(40.0, "none"), (102.0, "none"), (104.0, "head")])
def test_a_draft_that_was_estimated_to_pay_must_do_so(drafted: float, best: str) -> None:
    estimated = advise([target(FLAT)], [draft()])
    assert estimated.best.draft == "head"
    advice = by_measurement(estimated, (drafted, 100.0))
    assert advice.best.draft == advice.best_exact.draft == best
    said = f"head with a tree of 7 was estimated to pay, and gave {drafted / 100:.2f} times plain decoding"
    assert any(said in warning for warning in advice.warnings) == (best == "none")


def test_without_drafts_there_is_plain_decoding() -> None:
    assert [option.draft for option in options_of(target(FLAT), [])] == ["none"]
    with pytest.raises(ValueError, match="no target"):
        advise([], [])


def tree() -> DraftTree:
    """A chain 0 - 1 - 3 that is probable, and a sibling 2 that is not."""
    log_probs = torch.tensor([0.9, 0.8, 0.05, 0.6]).log()
    return DraftTree(torch.arange(4), torch.tensor([-1, 0, -1, 1]), log_probs)


def test_a_smaller_tree_would_have_accepted_what_it_has_of_the_path() -> None:
    recorded = [Recorded(tree(), (0, 1, 3)), Recorded(tree(), (2,)), Recorded(tree(), ())]
    tokens, levels = zip(*(replay(recorded, size) for size in (1, 2, 3, 4)))
    assert tokens == pytest.approx((4 / 3, 5 / 3, 2, 7 / 3))
    assert levels == (1, 2, 3, 3)


def test_rates_by_depth_count_where_a_token_was_offered() -> None:
    recorded = [Recorded(tree(), (0, 1, 3)), Recorded(tree(), (2,)), Recorded(tree(), (0,)), Recorded(tree(), ())]
    assert conditional_rates(recorded) == ((0.75, 4), (0.5, 2), (1.0, 1))
