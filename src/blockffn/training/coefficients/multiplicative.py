"""The controller of ReMoE and DECO: a fixed factor up while too many experts are active, and down otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping

from blockffn.training.coefficients.base import Stateful, observed, require


class MultiplicativeController(Stateful):
    """Multiplies the coefficient by `factor` while the sparsity is below `target`, else divides it, down to `initial`.

    ReMoE (arXiv 2412.14711) takes 1.05 a step from 1e-8. The step has one size, so the coefficient swings about what
    the target needs; `SetPointController` settles.

    Args:
        initial: value at the start, and the floor.
        target: sparsity in percent.
        factor: of one optimisation step.
        observes: name of the measured sparsity.
        interval: steps between observations, each of which moves by `factor ** interval`. 1, as published, reads the
            sparsity of every step from the device, which then cannot queue steps ahead.
        warmup_steps: linear from 0 to `initial`; the controller acts only afterwards.

    Raises:
        ValueError: a setting out of range.
    """

    _STATE = ("_exponent",)

    def __init__(
        self,
        initial: float,
        *,
        target: float,
        factor: float = 1.05,
        observes: str = "tls",
        interval: int = 1,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(warmup_steps)
        require(math.isfinite(initial) and initial > 0, f"initial must be positive, got {initial}; 0 can never grow")
        require(
            1 <= target < 100, f"target is in percent, at least 1 and below 100; got {target} (80 % is 80, not 0.8)"
        )
        require(math.isfinite(factor) and factor > 1, f"factor must be above 1, got {factor}")
        require(interval >= 1, f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.observes = observes
        self._initial, self._target, self._factor = initial, target, factor
        self._exponent = 0  # of the factor; whole numbers go up and down without rounding

    def value(self, step: int) -> float:
        return self._initial * self._factor**self._exponent * self._warmup(step)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        sparsity = observed(measured, self.observes)
        if step <= self.warmup_steps or not math.isfinite(sparsity):
            return
        move = self.interval if sparsity < self._target else -self.interval
        self._exponent = max(self._exponent + move, 0)
