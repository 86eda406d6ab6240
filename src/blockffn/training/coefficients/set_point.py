"""A controller of ours: name a sparsity and it moves the coefficient until the model has it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from blockffn.training.coefficients.base import Stateful, observed, require


class SetPointController(Stateful):
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
        require(math.isfinite(initial) and initial > 0, f"initial must be positive, got {initial}; 0 can never grow")
        require(
            1 <= target < 100, f"target is in percent, at least 1 and below 100; got {target} (80 % is 80, not 0.8)"
        )
        require(response_steps >= 1, f"response_steps must be at least 1, got {response_steps}")
        for name, number in (("gain", gain), ("max_rate", max_rate), ("tolerance", tolerance)):
            require(math.isfinite(number) and number > 0, f"{name} must be positive, got {number}")
        require(target_ramp_steps >= 0, f"target_ramp_steps must not be negative, got {target_ramp_steps}")
        interval = max(1, response_steps // 15) if interval is None else interval
        require(interval >= 1, f"interval must be at least 1, got {interval}")
        minimum = initial / 1000 if minimum is None else minimum
        maximum = initial * 1000 if maximum is None else maximum
        require(
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
        sparsity = observed(measured, self.observes)
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
