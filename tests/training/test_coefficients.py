"""Schedules of coefficients: the adaptive factor's two rules by hand, the set-point controller on simulated models."""

from __future__ import annotations

import json
import math
import random

import pytest

from blockffn.training.coefficients import (
    AdaptiveFactor,
    Coefficient,
    ConstantCoefficient,
    MultiplicativeController,
    SetPointController,
    make_coefficient,
)


def feed(coefficient: Coefficient, losses: list[float], *, start: int = 0, name: str = "chunk_sparsification") -> None:
    """One observation per window, at the ends of successive windows."""
    for i, loss in enumerate(losses, start=1):
        coefficient.observe(start + i * coefficient.interval, {name: loss})


def test_a_constant_warms_up_linearly_and_stays():
    coefficient = ConstantCoefficient(0.2, warmup_steps=10)
    assert [coefficient.value(step) for step in (0, 5, 10, 1000)] == [0.0, 0.1, 0.2, 0.2]
    assert ConstantCoefficient(0.2).value(0) == 0.2


def test_paper_rule_holds_then_follows_the_ratio_at_once():
    coefficient = AdaptiveFactor(0.05, hold_steps=300, adjust_every=100)
    feed(coefficient, [1.0, 0.5])
    assert coefficient.value(201) == 0.05  # still held
    feed(coefficient, [0.25], start=200)
    assert coefficient.value(301) == pytest.approx(0.05 * 0.5)
    feed(coefficient, [0.5], start=300)
    assert coefficient.value(401) == pytest.approx(0.05 * 0.5 * 2)
    feed(coefficient, [0.501], start=400)
    assert coefficient.value(501) == pytest.approx(0.05 * 1.025)  # a small rise counts as min_factor
    feed(coefficient, [0.501], start=500)
    assert coefficient.value(601) == pytest.approx(0.05 * 1.025)  # no change, no adjustment


def test_paper_rule_has_no_cap():
    coefficient = AdaptiveFactor(0.05, hold_steps=0, adjust_every=10)
    feed(coefficient, [2.0**i for i in range(8)])
    assert coefficient.value(1000) == pytest.approx(0.05 * 2**7)


def test_reference_rule_moves_linearly_over_the_next_window():
    coefficient = AdaptiveFactor(0.05, rule="reference", hold_steps=200, adjust_every=100)
    feed(coefficient, [1.0, 2.0])
    assert [coefficient.value(s) for s in (200, 201, 250, 300, 305)] == pytest.approx([0.05, 0.0505, 0.075, 0.1, 0.1])
    feed(coefficient, [1.0], start=200)
    assert [coefficient.value(s) for s in (300, 301, 400)] == pytest.approx([0.1, 0.0995, 0.05])


def test_reference_rule_is_capped_at_four_times_the_initial_value():
    coefficient = AdaptiveFactor(0.05, rule="reference", hold_steps=0, adjust_every=10)
    feed(coefficient, [2.0**i for i in range(8)])
    assert coefficient.value(80) == pytest.approx(0.2)
    assert coefficient.value(90) == pytest.approx(0.2)
    uncapped = AdaptiveFactor(0.05, rule="reference", hold_steps=0, adjust_every=10, max_factor=math.inf)
    feed(uncapped, [2.0**i for i in range(8)])
    assert uncapped.value(90) == pytest.approx(0.05 * 2**7)


def test_a_loss_that_always_rises_compounds_to_0_172_at_step_6000():
    coefficient = AdaptiveFactor(0.05, rule="reference")
    feed(coefficient, [1 + 0.001 * i for i in range(59)])
    assert coefficient.value(6000) == pytest.approx(0.05 * 1.025**50)
    assert coefficient.value(6000) == pytest.approx(0.172, abs=5e-4)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_loss_without_a_ratio_leaves_the_factor_alone(bad):
    coefficient = AdaptiveFactor(0.05, hold_steps=0, adjust_every=10)
    feed(coefficient, [1.0, bad, 1.0])
    assert coefficient.value(31) == 0.05


class Model:
    """Sparsity that follows the logarithm of the coefficient through a first-order lag and a dead time, with noise.

    `gain` is in points per e-fold, `lag` and `dead_time` in steps. The coefficient 0.05 holds it at `start` percent.
    """

    def __init__(self, *, gain: float, lag: float, dead_time: int, start: float = 50.0, noise: float = 1.0) -> None:
        self.gain, self.lag, self.start, self.noise = gain, lag, start, noise
        self.sparsity = start
        self.pipe = [0.0] * dead_time
        self.random = random.Random(0)

    def step(self, coefficient: float) -> float:
        self.pipe.append(math.log(coefficient / 0.05))
        settled = min(99.0, max(0.0, self.start + self.gain * self.pipe.pop(0)))
        self.sparsity += (settled - self.sparsity) / self.lag
        return self.sparsity + self.random.gauss(0, self.noise)


def steer(controller: SetPointController, model: Model, steps: int, *, first: int = 1) -> list[float]:
    """The true sparsity after each step."""
    course, window = [], []
    for step in range(first, first + steps):
        window.append(model.step(controller.value(step)))
        course.append(model.sparsity)
        if step % controller.interval == 0:
            controller.observe(step, {"tls": sum(window) / len(window)})
            window = []
    return course


@pytest.mark.parametrize("start", [50.0, 95.0])
@pytest.mark.parametrize("gain", [3, 8, 24])
@pytest.mark.parametrize(("lag", "dead_time"), [(20, 0), (20, 30), (60, 15), (130, 0), (130, 30)])
def test_the_target_is_reached_within_a_point_and_kept_without_overshoot(gain, lag, dead_time, start):
    controller = SetPointController(0.05, target=80, response_steps=100, minimum=1e-9, maximum=1e9)
    course = steer(controller, Model(gain=gain, lag=lag, dead_time=dead_time, start=start), 3000)
    beyond = [s - 80 if start < 80 else 80 - s for s in course]
    assert max(beyond) < 5
    assert all(abs(error) < 1 for error in beyond[1500:])


def test_before_any_observation_the_controller_gives_the_initial_value_exactly():
    assert SetPointController(0.05, target=80).value(1) == 0.05


def test_slower_models_want_a_longer_response():
    controller = SetPointController(0.05, target=80, response_steps=600)
    course = steer(controller, Model(gain=8, lag=500, dead_time=100), 12_000)
    assert max(course) < 85
    assert all(abs(s - 80) < 1 for s in course[7000:])


def test_a_disturbance_is_corrected():
    controller, model = SetPointController(0.05, target=80, response_steps=100), Model(gain=8, lag=60, dead_time=15)
    steer(controller, model, 1500)
    model.start -= 15
    course = steer(controller, model, 2000, first=1501)
    assert min(course) < 75
    assert all(abs(s - 80) < 1 for s in course[1500:])


def test_bounds_hold_and_leave_nothing_to_unwind():
    controller = SetPointController(0.05, target=80, response_steps=100, maximum=0.1)
    model = Model(gain=8, lag=30, dead_time=0, noise=0.0)
    steer(controller, model, 3000)  # 80 % would take a coefficient of 2
    assert controller.value(3001) == pytest.approx(0.1)
    model.start = 90.0  # now even 0.05 is too much
    steer(controller, model, 2 * controller.interval, first=3001)
    assert controller.value(3001 + 2 * controller.interval) < 0.1
    course = steer(controller, model, 1500, first=3001 + 2 * controller.interval)
    assert abs(course[-1] - 80) < 1


def test_a_ramped_target_is_followed_from_the_first_measurement():
    controller = SetPointController(0.05, target=80, response_steps=100, target_ramp_steps=2000)
    assert controller.target(0) == 80
    course = steer(controller, Model(gain=24, lag=30, dead_time=0, noise=0.2), 3000)
    start, sparsity = controller.interval, course[controller.interval - 1]
    assert controller.target(start) == pytest.approx(sparsity, abs=0.5)
    assert controller.target(start + 1000) == pytest.approx((controller.target(start) + 80) / 2)
    assert abs(course[1500] - controller.target(1500)) < 3
    assert abs(course[-1] - 80) < 1


def test_the_controller_waits_for_the_warm_up():
    controller = SetPointController(0.05, target=80, interval=10, warmup_steps=100)
    for step in range(10, 101, 10):
        controller.observe(step, {"tls": 20.0})
    assert controller.value(50) == pytest.approx(0.025)
    assert controller.value(100) == pytest.approx(0.05)
    controller.observe(110, {"tls": 20.0})
    assert controller.value(111) > 0.05


def test_a_measurement_that_is_not_a_number_is_skipped():
    controller = SetPointController(0.05, target=80)
    controller.observe(20, {"tls": math.nan})
    assert controller.value(21) == pytest.approx(0.05)


def test_the_multiplicative_rule_is_one_factor_a_step_with_a_floor():
    controller = MultiplicativeController(1e-8, target=80, factor=1.05)
    values = []
    for step, tls in enumerate([50.0, 79.9, 80.0, 90.0, 90.0, 10.0], start=1):
        values.append(controller.value(step) / 1e-8)
        controller.observe(step, {"tls": tls})
    # Active above the target share: up; at the target or sparser: down; never below the initial value.
    assert [*values, controller.value(7) / 1e-8] == pytest.approx([1, 1.05, 1.05**2, 1.05, 1, 1, 1.05])


def test_a_multiplicative_interval_moves_by_as_many_steps():
    controller = MultiplicativeController(1e-3, target=80, factor=1.1, interval=10)
    controller.observe(10, {"tls": 20.0})
    assert controller.value(11) == pytest.approx(1e-3 * 1.1**10)


def test_the_multiplicative_controller_waits_for_the_warm_up_and_skips_what_is_not_a_number():
    controller = MultiplicativeController(1e-3, target=80, warmup_steps=4)
    controller.observe(4, {"tls": 20.0})
    assert controller.value(2) == pytest.approx(5e-4)
    controller.observe(5, {"tls": math.nan})
    assert controller.value(6) == pytest.approx(1e-3)
    controller.observe(6, {"tls": 20.0})
    assert controller.value(7) == pytest.approx(1.05e-3)


def test_the_multiplicative_controller_brings_a_model_to_its_target():
    controller = MultiplicativeController(1e-8, target=80, factor=1.05)
    model = Model(gain=8, lag=20, dead_time=0, start=50.0, noise=0.2)
    model.start -= 8 * math.log(1e-3 / 0.05)  # 50 % at a coefficient of 1e-3
    course = []
    for step in range(1, 2001):
        sparsity = model.step(controller.value(step))
        controller.observe(step, {"tls": sparsity})
        course.append(sparsity)
    assert sum(course[-500:]) / 500 == pytest.approx(80, abs=1)
    assert all(abs(s - 80) < 10 for s in course[-500:])


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "constant", "value": 0.1, "warmup_steps": 50},
        {"kind": "multiplicative", "initial": 1e-8, "target": 50, "interval": 5},
        {"kind": "adaptive", "initial": 0.05, "hold_steps": 20, "adjust_every": 10},
        {"kind": "adaptive", "initial": 0.05, "rule": "reference", "hold_steps": 20, "adjust_every": 10},
        {"kind": "set_point", "initial": 0.05, "target": 80, "interval": 10, "target_ramp_steps": 100},
    ],
)
def test_a_resumed_coefficient_gives_the_same_values_to_the_bit(spec):
    def advance(coefficient: Coefficient, steps: range) -> list[float]:
        values = []
        for step in steps:
            values.append(coefficient.value(step))
            if coefficient.interval and step % coefficient.interval == 0:
                measured = 50 + 20 * math.sin(step / 37)
                coefficient.observe(step, {"chunk_sparsification": measured, "tls": measured})
        return values

    uninterrupted, interrupted, resumed = (make_coefficient(spec) for _ in range(3))
    expected = advance(uninterrupted, range(1, 301))
    advance(interrupted, range(1, 136))
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert advance(resumed, range(136, 301)) == expected[135:]


def test_the_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="saved state of another kind"):
        ConstantCoefficient(0.1).load_state_dict(AdaptiveFactor(0.1).state_dict())


def test_what_is_observed_must_be_measured():
    with pytest.raises(ValueError, match="observes 'cls8', which is not measured; did you mean 'cls16'"):
        SetPointController(0.1, target=80, observes="cls8").observe(20, {"cls16": 50.0})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "setpoint", "initial": 1.0}, "unknown kind of coefficient 'setpoint'; did you mean 'set_point'"),
        ({"value": 1.0}, "unknown kind of coefficient None"),
        ({"kind": "set_point", "initial": 1.0, "traget": 80}, "unknown setting 'traget' .* did you mean 'target'"),
        ({"kind": "set_point", "initial": 1.0}, "a set_point coefficient needs 'target'"),
        ({"kind": "constant", "value": -1.0}, "value must be finite and not negative, got -1.0"),
        ({"kind": "constant", "value": 1.0, "warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"kind": "adaptive", "initial": 0.0}, "initial must be positive, got 0.0"),
        ({"kind": "adaptive", "initial": 1.0, "rule": "papr"}, "unknown rule 'papr'; did you mean 'paper'"),
        ({"kind": "adaptive", "initial": 1.0, "min_factor": 0.5}, "min_factor must be at least 1, got 0.5"),
        ({"kind": "adaptive", "initial": 1.0, "max_factor": 0.5}, "max_factor must be at least 1, got 0.5"),
        ({"kind": "adaptive", "initial": 1.0, "adjust_every": 0}, "adjust_every must be at least 1, got 0"),
        ({"kind": "adaptive", "initial": 1.0, "warmup_steps": 2000}, r"hold_steps \(1000\) must cover warmup_steps"),
        ({"kind": "multiplicative", "initial": 0.0, "target": 80}, "initial must be positive, got 0.0"),
        ({"kind": "multiplicative", "initial": 1.0, "target": 80, "factor": 1.0}, "factor must be above 1, got 1.0"),
        ({"kind": "multiplicative", "initial": 1.0, "target": 80, "interval": 0}, "interval must be at least 1, got 0"),
        ({"kind": "multiplicative", "initial": 1.0, "target": 0.8}, r"got 0.8 \(80 % is 80, not 0.8\)"),
        ({"kind": "set_point", "initial": 1.0, "target": 0.8}, r"got 0.8 \(80 % is 80, not 0.8\)"),
        ({"kind": "set_point", "initial": 1.0, "target": 100}, "below 100; got 100"),
        ({"kind": "set_point", "initial": -1.0, "target": 80}, "initial must be positive, got -1.0"),
        ({"kind": "set_point", "initial": 1.0, "target": 80, "minimum": 2.0}, "minimum <= initial <= maximum, got 2.0"),
        ({"kind": "set_point", "initial": 1.0, "target": 80, "interval": 0}, "interval must be at least 1, got 0"),
        ({"kind": "set_point", "initial": 1.0, "target": 80, "gain": 0.0}, "gain must be positive, got 0.0"),
    ],
)
def test_bad_settings_are_errors_that_say_what_to_do(spec, message):
    with pytest.raises(ValueError, match=message):
        make_coefficient(spec)
