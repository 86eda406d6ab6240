"""Warm-up, stable, decay: the learning-rate factor as a pure function of the step."""

from __future__ import annotations

from blockffn.training.config import ScheduleSettings

WARM_STEPS = 10  # compiling and first-touch costs lie in the first steps and say nothing of the rate


def learning_rate_factor(step: int, *, steps: int, schedule: ScheduleSettings) -> float:
    """Factor in 0…1 for 0-based `step` of `steps`: linear warm-up, constant, linear fall to `final_fraction`."""
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    decay_steps = round(steps * schedule.decay_fraction)
    into_decay = step - (steps - decay_steps) + 1
    if into_decay <= 0:
        return 1.0
    return 1.0 + (schedule.final_fraction - 1.0) * into_decay / decay_steps


class StepBudget:
    """How many steps a run has: all of them, or as many as fit into a time limit at the rate seen so far."""

    def __init__(self, steps: int, max_seconds: float | None, *, first_step: int) -> None:
        self.steps, self.max_seconds, self.first_step = steps, max_seconds, first_step
        self._warm: float | None = None

    def total(self, step: int, seconds: float) -> int:
        """Steps that the run will have had at its end, as judged before `step` at `seconds` of training."""
        done = step - 1 - self.first_step
        if self.max_seconds is None or done < WARM_STEPS:
            return self.steps
        if self._warm is None:
            self._warm = seconds
        if done == WARM_STEPS:
            return self.steps
        rate = (done - WARM_STEPS) / max(seconds - self._warm, 1e-9)
        return min(self.steps, max(step, step - 1 + int((self.max_seconds - seconds) * rate)))
