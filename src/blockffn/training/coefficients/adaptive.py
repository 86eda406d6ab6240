"""The paper's adaptive factor (arXiv 2507.08771, appendix B), which follows its own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

from blockffn.presets import did_you_mean
from blockffn.training.coefficients.base import Stateful, observed, require


class AdaptiveFactor(Stateful):
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
        require(math.isfinite(initial) and initial > 0, f"initial must be positive, got {initial}; 0 can never grow")
        if rule not in ("paper", "reference"):
            raise ValueError(f"unknown rule {rule!r}{did_you_mean(rule, ('paper', 'reference'))}")
        if max_factor is None:
            max_factor = math.inf if rule == "paper" else 4.0
        require(adjust_every >= 1, f"adjust_every must be at least 1, got {adjust_every}")
        require(min_factor >= 1, f"min_factor must be at least 1, got {min_factor}")
        require(max_factor >= 1, f"max_factor must be at least 1, got {max_factor}")
        require(hold_steps >= warmup_steps, f"hold_steps ({hold_steps}) must cover warmup_steps ({warmup_steps})")
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
        mean, previous = observed(measured, self.observes), self._previous_mean
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
