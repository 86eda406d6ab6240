"""A coefficient that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping

from blockffn.training.coefficients.base import Stateful, require


class ConstantCoefficient(Stateful):
    """The same value at every step, after a linear warm-up from 0."""

    interval = None

    def __init__(self, value: float, *, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        require(math.isfinite(value) and value >= 0, f"value must be finite and not negative, got {value}")
        self._value = value

    def value(self, step: int) -> float:
        return self._value * self._warmup(step)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Nothing: a constant does not react."""
