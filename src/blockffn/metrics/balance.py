"""How evenly a layer's experts share the load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadStatistics:
    """Balance of one layer's experts.

    Attributes:
        coefficient_of_variation: standard deviation of the experts' use over its mean; 0 when all are used equally.
        max_over_mean: use of the busiest expert over the mean.
        dead_experts: number of experts without use.
    """

    coefficient_of_variation: float
    max_over_mean: float
    dead_experts: int


def load_statistics(expert_use: Sequence[float]) -> LoadStatistics:
    """Balance of one layer, from how often each of its experts is used (counts, shares or percent: only ratios matter).

    A layer that uses no expert has no balance: its two ratios are NaN.

    Raises:
        ValueError: no expert, or a use that is negative or not finite.
    """
    if not expert_use:
        raise ValueError("expert_use is empty; it needs one number per expert")
    for use in expert_use:
        if not (math.isfinite(use) and use >= 0):
            raise ValueError(f"expert_use must be finite and not negative, got {use}")
    mean = math.fsum(expert_use) / len(expert_use)
    dead = sum(use == 0 for use in expert_use)
    if mean == 0:
        return LoadStatistics(math.nan, math.nan, dead)
    variance = math.fsum((use - mean) ** 2 for use in expert_use) / len(expert_use)
    return LoadStatistics(math.sqrt(variance) / mean, max(expert_use) / mean, dead)
