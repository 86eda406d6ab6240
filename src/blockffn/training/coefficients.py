"""Coefficients of the objectives: constant, adaptive (arXiv 2507.08771, appendix B) or steered to a sparsity target.

A coefficient owns its state and knows nothing of the trainer. Steps count from 1. The trainer asks for `value(step)` in
optimisation step `step` and, after each step that is a multiple of `interval`, calls `observe(step, measured)` with the
means over the last `interval` steps. Saving and loading the state continues to the same bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol

from blockffn.presets import did_you_mean


class Coefficient(Protocol):
    """What the trainer needs. `interval` is None for a coefficient that wants no observations."""

    @property
    def interval(self) -> int | None: ...

    def value(self, step: int) -> float: ...

    def observe(self, step: int, measured: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Stateful:
    """Linear warm-up, and saving and loading of the attributes that a subclass names in `_STATE`."""

    _STATE: tuple[str, ...] = ()

    def __init__(self, warmup_steps: int) -> None:
        _require(warmup_steps >= 0, f"warmup_steps must not be negative, got {warmup_steps}")
        self.warmup_steps = warmup_steps

    def _warmup(self, step: int) -> float:
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._STATE):
            raise ValueError(
                f"saved state of another kind of coefficient: {type(self).__name__} keeps {sorted(self._STATE)}, "
                f"got {sorted(state)}; resume with the settings of the run that wrote it"
            )
        for name in self._STATE:
            setattr(self, name, state[name])


class ConstantCoefficient(_Stateful):
    """The same value at every step, after a linear warm-up from 0."""

    interval = None

    def __init__(self, value: float, *, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        _require(math.isfinite(value) and value >= 0, f"value must be finite and not negative, got {value}")
        self._value = value

    def value(self, step: int) -> float:
        return self._value * self._warmup(step)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Nothing: a constant does not react."""


class AdaptiveFactor(_Stateful):
    """Follows its own loss: grows by at least `min_factor` when the loss rose, shrinks with it when it fell.

    From `hold_steps` on, every `adjust_every` steps, with gamma = (mean loss of the last `adjust_every` steps) / (mean
    of those before): the coefficient is multiplied by gamma if gamma <= 1, else by `max(min_factor, gamma)`.

    There is no lower bound, and no target: the coefficient follows the loss. `SetPointController` has a target.

    Args:
        initial: value while held.
        rule: `paper` (eq. 7) adjusts at once and has no cap. `reference` follows the published training code: it moves
            linearly to the new value over the next `adjust_every` steps and stays below `max_factor · initial`.
        max_factor: cap as a multiple of `initial`; `None` takes the rule's own (`paper` infinity, `reference` 4).
        observes: name of the measured loss. Where a mean is 0 or not a number there is no ratio, and the value stays.
        warmup_steps: linear from 0 to `initial`; at most `hold_steps`.

    Raises:
        ValueError: a setting out of range.
    """

    _STATE = ("_from", "_to", "_adjusted_at", "_previous_mean")

    def __init__(
        self,
        initial: float,
        *,
        rule: str = "paper",
        hold_steps: int = 1000,
        adjust_every: int = 100,
        min_factor: float = 1.025,
        max_factor: float | None = None,
        observes: str = "chunk_sparsification",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(warmup_steps)
        _require(math.isfinite(initial) and initial > 0, f"initial must be positive, got {initial}; 0 can never grow")
        if rule not in ("paper", "reference"):
            raise ValueError(f"unknown rule {rule!r}{did_you_mean(rule, ('paper', 'reference'))}")
        if max_factor is None:
            max_factor = math.inf if rule == "paper" else 4.0
        _require(adjust_every >= 1, f"adjust_every must be at least 1, got {adjust_every}")
        _require(min_factor >= 1, f"min_factor must be at least 1, got {min_factor}")
        _require(max_factor >= 1, f"max_factor must be at least 1, got {max_factor}")
        _require(hold_steps >= warmup_steps, f"hold_steps ({hold_steps}) must cover warmup_steps ({warmup_steps})")
        self.interval = adjust_every
        self.observes = observes
        self._ramp = rule == "reference"
        self._hold_steps, self._min_factor, self._cap = hold_steps, min_factor, max_factor * initial
        self._from = self._to = initial
        self._adjusted_at = 0
        self._previous_mean: float | None = None

    def value(self, step: int) -> float:
        return self._unwarmed(step) * self._warmup(step)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        mean, previous = _lookup(measured, self.observes), self._previous_mean
        self._previous_mean = mean
        # Written so that a NaN fails the comparison.
        if step < self._hold_steps or previous is None or not (previous > 0 and mean > 0):
            return
        gamma = mean / previous
        current = self._unwarmed(step)
        factor = gamma if gamma <= 1 else max(self._min_factor, gamma)
        self._from, self._to, self._adjusted_at = current, min(current * factor, self._cap), step

    def _unwarmed(self, step: int) -> float:
        progress = (step - self._adjusted_at) / self.interval
        return self._from + (self._to - self._from) * progress if self._ramp and progress < 1 else self._to


class SetPointController(_Stateful):
    """Steers a measured sparsity to a target: ask for 80 % and get 80 %.

    The sparsity answers to the logarithm of the coefficient, late and by an unknown amount, so the logarithm is what is
    steered. Every `interval` steps it moves in proportion to the target minus where the sparsity is heading (measured
    value plus its smoothed slope times `response_steps`): integral action, so that no error remains, with damping, so
    that it stops pushing before the target is reached.

    The move is limited to `max_rate`. It is halved each time the sparsity swings through the target, from outside
    `tolerance` on one side to outside on the other, which tames a model that answers more strongly than assumed, and
    doubles again if the sparsity stays off for long. Nothing but the bounded logarithm accumulates, so that a target
    out of reach leaves nothing to unwind.

    Simulated models with a first-order lag between 1/6 and 4/3 of `response_steps`, a dead time up to 1/3 of it and 3
    to 24 points per e-fold reach a target 30 points away and stay within 1 point of it, overshooting by less than 5.

    In trials with a small language model the router's entropy was the best lever: it moves single tokens, early and
    late. Chunk sparsification should start near the value it needs. Raised late, it locked all tokens onto the same few
    experts, and then no coefficient moves the sparsity: the value runs to its bound, which is the sign to look for.

    Args:
        initial: starting value, positive.
        target: wanted value of `observes`, in percent.
        observes: `tls`, `cls8`, or any other measured percentage that grows with the coefficient.
        interval: steps between adjustments; `None`: `response_steps / 15`.
        response_steps: how long the sparsity takes to answer. Too short overshoots, too long only takes longer.
        gain: change of the logarithm per point of error, per `response_steps`.
        max_rate: largest change of the logarithm, per `response_steps`.
        tolerance: points of error that do not count as a swing.
        minimum, maximum: bounds of the coefficient; `None`: `initial` / 1000 and `initial` · 1000.
        target_ramp_steps: the target moves linearly from the first measured value to `target` over so many steps.
        warmup_steps: linear from 0 to `initial`; the controller acts only afterwards.

    Raises:
        ValueError: a setting out of range.
    """

    _STATE = ("_log_ratio", "_previous", "_slope", "_damping", "_side", "_steps_off", "_ramp_from")

    def __init__(
        self,
        initial: float,
        *,
        target: float,
        observes: str = "tls",
        interval: int | None = None,
        response_steps: int = 300,
        gain: float = 0.15,
        max_rate: float = 1.2,
        tolerance: float = 1.0,
        minimum: float | None = None,
        maximum: float | None = None,
        target_ramp_steps: int = 0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(warmup_steps)
        _require(math.isfinite(initial) and initial > 0, f"initial must be positive, got {initial}; 0 can never grow")
        _require(
            1 <= target < 100, f"target is in percent, at least 1 and below 100; got {target} (80 % is 80, not 0.8)"
        )
        _require(response_steps >= 1, f"response_steps must be at least 1, got {response_steps}")
        for name, number in (("gain", gain), ("max_rate", max_rate), ("tolerance", tolerance)):
            _require(math.isfinite(number) and number > 0, f"{name} must be positive, got {number}")
        _require(target_ramp_steps >= 0, f"target_ramp_steps must not be negative, got {target_ramp_steps}")
        interval = max(1, response_steps // 15) if interval is None else interval
        _require(interval >= 1, f"interval must be at least 1, got {interval}")
        minimum = initial / 1000 if minimum is None else minimum
        maximum = initial * 1000 if maximum is None else maximum
        _require(
            0 < minimum <= initial <= maximum < math.inf,
            f"bounds must satisfy 0 < minimum <= initial <= maximum, got {minimum}, {initial}, {maximum}",
        )
        self.interval = interval
        self.observes = observes
        self._target, self._target_ramp_steps = target, target_ramp_steps
        self._response_steps, self._gain, self._max_rate, self._tolerance = response_steps, gain, max_rate, tolerance
        self._initial = initial
        self._bounds = (math.log(minimum / initial), math.log(maximum / initial))
        self._log_ratio = 0.0  # of the value to `initial`
        self._previous: float | None = None
        self._slope = 0.0  # points per step, smoothed
        self._damping = 1.0
        self._side = 0  # of the target, where the sparsity last was outside the tolerance: -1 below, 1 above
        self._steps_off = 0  # for how long it has stayed there
        self._ramp_from: tuple[int, float] | None = None  # step and sparsity of the first observation

    def value(self, step: int) -> float:
        return self._initial * math.exp(self._log_ratio) * self._warmup(step)

    def target(self, step: int) -> float:
        """The set-point after `step` steps, in percent."""
        if self._ramp_from is None or not self._target_ramp_steps:
            return self._target
        start, sparsity = self._ramp_from
        progress = min(1.0, (step - start) / self._target_ramp_steps)
        return sparsity + (self._target - sparsity) * progress

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        sparsity = _lookup(measured, self.observes)
        if not math.isfinite(sparsity):
            return
        if self._ramp_from is None:
            self._ramp_from = (step, sparsity)
        self._track_slope(sparsity)
        if step <= self.warmup_steps:
            return
        target = self.target(step)
        self._track_swings(sparsity - target)
        error = target - (sparsity + self._slope * self._response_steps)
        rate = max(-self._max_rate, min(self._max_rate, self._gain * error)) * self._damping / self._response_steps
        low, high = self._bounds
        self._log_ratio = max(low, min(high, self._log_ratio + rate * self.interval))

    def _track_slope(self, sparsity: float) -> None:
        if self._previous is not None:
            # Remembers a third of the response. Starts at 0, so that the first few noisy differences are not believed.
            weight = 1 - math.exp(-3 * self.interval / self._response_steps)
            self._slope += weight * ((sparsity - self._previous) / self.interval - self._slope)
        self._previous = sparsity

    def _track_swings(self, excess: float) -> None:
        side = 0 if abs(excess) <= self._tolerance else int(math.copysign(1, excess))
        if side == 0:
            self._steps_off = 0
        elif side == self._side:
            self._steps_off += self.interval
            if self._steps_off >= 3 * self._response_steps:
                self._damping, self._steps_off = min(1.0, self._damping * 2), 0
        else:
            if self._side:
                self._damping = max(1 / 16, self._damping / 2)
            self._side, self._steps_off = side, 0


COEFFICIENTS: dict[str, type[ConstantCoefficient] | type[AdaptiveFactor] | type[SetPointController]] = {
    "constant": ConstantCoefficient,
    "adaptive": AdaptiveFactor,
    "set_point": SetPointController,
}


def make_coefficient(spec: Mapping[str, Any]) -> Coefficient:
    """A coefficient from plain data: `{"kind": "set_point", "initial": 0.05, "target": 80}`.

    `kind` is a key of `COEFFICIENTS`, the rest are the arguments of that class.

    Raises:
        ValueError: no kind, an unknown kind or key (the message names the nearest), a missing key, a bad setting.
    """
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in COEFFICIENTS:
        raise ValueError(f"unknown kind of coefficient {kind!r}{did_you_mean(str(kind), COEFFICIENTS)}")
    parameters = inspect.signature(COEFFICIENTS[kind]).parameters
    for key in settings:
        if key not in parameters:
            raise ValueError(f"unknown setting {key!r} of a {kind} coefficient{did_you_mean(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ValueError(f"a {kind} coefficient needs {key!r}")
    return COEFFICIENTS[kind](**settings)


def _lookup(measured: Mapping[str, float], name: str) -> float:
    if name not in measured:
        raise ValueError(f"the coefficient observes {name!r}, which is not measured{did_you_mean(name, measured)}")
    return measured[name]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
