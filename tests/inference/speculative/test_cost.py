"""The cost model finds the coefficients that made its measurements."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from blockffn.inference.speculative.cost import CostModel, Measurement, calibrate, fit, milliseconds_per_level
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.inference.target import Step
from tests.inference.speculative.stub_targets import BigramTarget

TRUE = CostModel(fixed=5.0, per_token=0.3, per_expert=0.05, per_pair=0.02)


def measurements(model: CostModel, *, noise: float = 0.0) -> list[Measurement]:
    found = []
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        for union in (40, 90, 200):
            pairs = min(tokens, 40) * 10 + tokens * 2
            error = 1 + noise * float(torch.randn(()))
            found.append(Measurement(tokens, union, pairs, error * model.milliseconds(tokens, union, pairs)))
    return found


@pytest.mark.parametrize("true", [TRUE, CostModel(5, 0.3, 0.05, 0.0), CostModel(5, 0.3, 0.0, 0.02)])
def test_exact_measurements_give_exact_coefficients(true: CostModel) -> None:
    found = fit(measurements(true))
    for m in measurements(true):
        assert found.milliseconds(m.tokens, m.union, m.pairs) == pytest.approx(m.milliseconds, rel=1e-6)


def test_noisy_measurements_give_times_within_a_few_percent() -> None:
    found = fit(measurements(TRUE, noise=0.03))
    for m in measurements(TRUE):
        assert found.milliseconds(m.tokens, m.union, m.pairs) == pytest.approx(m.milliseconds, rel=0.06)


def test_no_coefficient_is_negative() -> None:
    falling = [Measurement(t, 10 * t, 10 * t, 20.0 - t) for t in (1, 2, 4, 8)]
    assert min(astuple(fit(falling))) >= 0


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two measurements, got 1"):
        fit(measurements(TRUE)[:1])
    with pytest.raises(ValueError, match="clock is too coarse"):
        fit([Measurement(1, 1, 1, 0.0), Measurement(2, 1, 1, 0.0)])


class TimedTarget(BigramTarget):
    """Moves a clock by what a call costs."""

    seconds = 0.0

    def compute(self, tokens: Tensor, parents: Tensor) -> Step:
        step = super().compute(tokens, parents)
        assert step.union is not None
        assert step.active is not None
        self.seconds += TRUE.milliseconds(len(tokens), int(step.union.sum()), int(step.active.sum())) / 1000
        return step


def test_calibration_recovers_the_cost_of_a_target() -> None:
    target = TimedTarget(torch.randn(40, 40))
    model = calibrate(target, clock=lambda: target.seconds)
    assert target.length == 0
    for tokens, union, pairs in ((1, 2, 2), (8, 5, 16), (32, 8, 64)):
        assert model.milliseconds(tokens, union, pairs) == pytest.approx(
            TRUE.milliseconds(tokens, union, pairs), rel=0.01
        )


def test_calibration_fits_into_a_small_cache() -> None:
    target = TimedTarget(torch.randn(40, 40), capacity=20)
    assert calibrate(target, clock=lambda: target.seconds).fixed > 0


def test_a_slow_target_is_called_twice_a_size_and_the_first_call_does_not_count() -> None:
    class Compiling(TimedTarget):
        """Takes a second more when it is first called with so many tokens."""

        def compute(self, tokens: Tensor, parents: Tensor) -> Step:
            self.seconds += len(tokens) not in self.calls[:-1]
            return super().compute(tokens, parents)

    target = Compiling(torch.randn(40, 40))
    model = calibrate(target, seconds=0.5, clock=lambda: target.seconds)
    assert len(target.calls) == 1 + 2 * 2 * 6
    assert model.milliseconds(8, 5, 16) == pytest.approx(TRUE.milliseconds(8, 5, 16), rel=0.01)


def test_levels_of_a_draft_are_timed() -> None:
    target = TimedTarget(torch.randn(40, 40), capacity=50)
    draft = TimedTarget(torch.randn(40, 40))
    drafter = ModelDrafter(draft, vocab_size=40, growth=BestNodes(top_k=1, depth=4, size=4))
    found = milliseconds_per_level(target, drafter, Budget(nodes=31, depth=16), clock=lambda: draft.seconds)
    # A level runs the chain so far, and the first the new token of the text as well.
    chains = sum(TRUE.milliseconds(tokens, 2 * tokens, 2 * tokens) for tokens in range(1, 5))
    assert 0.5 * chains / 4 < found < 2 * chains / 4
    assert target.length == 0
