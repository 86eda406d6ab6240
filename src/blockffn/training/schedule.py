"""Warm-up, stable, decay: the learning-rate factor as a pure function of the step."""

from __future__ import annotations

from blockffn.training.config import ScheduleSettings


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
