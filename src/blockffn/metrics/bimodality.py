"""Whether numbers gather around one value or around two: a mixture of two normal distributions against one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS = 500


@dataclass(frozen=True)
class TwoComponentFit:
    """Two normal distributions fitted to numbers, the lower mean first.

    Attributes:
        means, deviations, shares: of the components; the shares add up to 1.
        bic_gain: Bayesian information criterion of one normal distribution less that of two; above 10 is strong
            evidence for two (Kass and Raftery, 1995).
        modes: peaks of the mixture's density, 1 or 2. Two components can overlap so much that there is one.
    """

    means: tuple[float, float]
    deviations: tuple[float, float]
    shares: tuple[float, float]
    bic_gain: float
    modes: int

    @property
    def bimodal(self) -> bool:
        """Two components fit better, and their mixture has two peaks."""
        return self.bic_gain > 10 and self.modes == 2


def two_component_fit(values: Sequence[float]) -> TwoComponentFit | None:
    """Fit by expectation maximisation, begun at the lower and upper half; `None` for fewer than 10 or all equal.

    Deviations are kept above a hundredth of that of all numbers, where the likelihood would grow without end.

    Raises:
        ValueError: a number is not finite.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if not np.isfinite(x).all():
        raise ValueError("the numbers to fit must be finite")
    if len(x) < 10 or x[0] == x[-1]:
        return None
    floor, half = x.std() / 100, len(x) // 2
    means = np.array([x[:half].mean(), x[half:].mean()])
    deviations = np.maximum([x[:half].std(), x[half:].std()], floor)
    shares = np.array([0.5, 0.5])
    for _ in range(STEPS):
        logs = _log_density(x, means, deviations, shares)
        member = np.exp(logs - np.logaddexp(*logs))
        counts = np.maximum(member.sum(axis=1), 1e-9)
        means = (member @ x) / counts
        deviations = np.maximum(np.sqrt((member * (x - means[:, None]) ** 2).sum(axis=1) / counts), floor)
        shares = counts / counts.sum()
    two = np.logaddexp(*_log_density(x, means, deviations, shares)).sum()
    one = _log_density(x, x.mean()[None], x.std()[None], np.ones(1)).sum()
    order = np.argsort(means)
    low, high = (int(i) for i in order)
    return TwoComponentFit(
        means=(float(means[low]), float(means[high])),
        deviations=(float(deviations[low]), float(deviations[high])),
        shares=(float(shares[low]), float(shares[high])),
        bic_gain=float(2 * (two - one) - 3 * math.log(len(x))),  # five parameters instead of two
        modes=_modes(means, deviations, shares),
    )


def _log_density(
    x: NDArray[np.float64], means: NDArray[np.float64], deviations: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`[components, values]`: logarithm of each component's share times its density."""
    z = (x - means[:, None]) / deviations[:, None]
    return np.log(shares / deviations)[:, None] - 0.5 * (z * z + math.log(2 * math.pi))


def _modes(means: NDArray[np.float64], deviations: NDArray[np.float64], shares: NDArray[np.float64]) -> int:
    """Peaks of the density. All lie between the two means."""
    margin = deviations.max() / 10
    grid = np.linspace(means.min() - margin, means.max() + margin, 2001)
    density = np.logaddexp(*_log_density(grid, means, deviations, shares))
    return int(((density[1:-1] > density[:-2]) & (density[1:-1] >= density[2:])).sum())
