"""Routers that activate a given share of experts for a token and for eight tokens together, without being trained.

A token's hidden state has a part that all tokens share, one that changes slowly along a text (what attention averaged)
and one of its own. A router's row reads a random direction of the slow part and one of the token's own: the weight of
the first sets how much neighbours share, and so the chunk-level sparsity. The common part stands in for a bias, which
sets how often an expert is active, and so the token-level sparsity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.metrics.sparsity import chunk_level_sparsity, token_level_sparsity

WINDOW = 8  # tokens of the chunk-level sparsity that is aimed at
SMOOTH = 32  # tokens over which a state is averaged to find what changes slowly
STEPS = 12  # of the bisection
RIDGE = 0.1


def mean_direction(x_NTD: Tensor) -> Tensor:
    """`[D]` whose product with a typical state is 1, and with all others nearly so: what a bias would read."""
    x_ND = x_NTD.flatten(0, 1)
    mean_D = x_ND.mean(dim=0)
    deviation_ND = x_ND - mean_D
    covariance_DD = deviation_ND.T @ deviation_ND / len(x_ND)
    covariance_DD.diagonal().add_(RIDGE * covariance_DD.diagonal().mean())  # there may be fewer states than dimensions
    direction_D = torch.linalg.solve(covariance_DD, mean_D)
    return direction_D / (direction_D @ mean_D)


def local_router(
    sample_NTD: Tensor, x_NTD: Tensor, *, num_experts: int, tls: float, cls8: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The projection `[E, D]` of a router that has these sparsities, in percent, on states `x [N, T, D]`.

    Experts differ: their shares of tokens lie between a half and one and a half of the mean. Where the chunk-level
    sparsity asked for lies beyond what the states allow, the nearest is taken.

    Args:
        sample_NTD: other states, in which directions are found: one found in `x` would respond to it too strongly.

    Returns:
        The projection, and the weight of the slow part, between 0 and 1.

    Raises:
        ValueError: percentages that no routing has, or states without a common direction.
    """
    check_targets(tls, cls8)
    bias_D = mean_direction(sample_NTD)
    scale_NT1 = x_NTD @ bias_D.unsqueeze(-1)
    if float((scale_NT1 <= 0).float().mean()) > 0.01:
        raise ValueError("the states have no common direction that could stand in for a bias; enlarge their mean")
    scale_NT1 = scale_NT1.clamp_min(0.1)
    slow_ED = _unit_variance(_slow_directions(sample_NTD, num_experts, generator), x_NTD)
    own_ED = _unit_variance(torch.randn(num_experts, x_NTD.shape[-1], generator=generator), x_NTD)
    slow_NTE, own_NTE = (x_NTD @ rows.T / scale_NT1 for rows in (slow_ED, own_ED))
    shares_E = (1 - tls / 100) * (0.5 + torch.rand(num_experts, generator=generator))
    shares_E *= (1 - tls / 100) / shares_E.mean()

    def thresholds(slow: float) -> tuple[Tensor, Tensor]:
        ratios = slow**0.5 * slow_NTE + (1 - slow) ** 0.5 * own_NTE
        ordered = ratios.flatten(0, 1).sort(dim=0).values
        places = ((1 - shares_E) * len(ordered)).long().clamp(max=len(ordered) - 1)
        return ratios, ordered.gather(0, places.unsqueeze(0))[0]

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        slow = (low + high) / 2
        ratios, threshold_E = thresholds(slow)
        if float(chunk_level_sparsity((ratios > threshold_E).float(), window=WINDOW)) < cls8:
            low = slow
        else:
            high = slow
    slow = (low + high) / 2
    _, threshold_E = thresholds(slow)
    return slow**0.5 * slow_ED + (1 - slow) ** 0.5 * own_ED - threshold_E.unsqueeze(-1) * bias_D, slow


def locality(x_NTD: Tensor, weight_ED: Tensor) -> dict[str, float]:
    """`tls`, `cls8` and `cls32` in percent of a projection for states `[N, T, D]`."""
    active = (x_NTD @ weight_ED.T > 0).float()
    chunks = {f"cls{window}": float(chunk_level_sparsity(active, window=window)) for window in (WINDOW, 32)}
    return {"tls": float(token_level_sparsity(active))} | chunks


def check_targets(tls: float, cls8: float) -> None:
    """Raise `ValueError` unless `0 < cls8 <= tls < 100`."""
    if not 0 < cls8 <= tls < 100:
        raise ValueError(
            f"sparsity is in percent, and eight tokens use at least the experts of one: 0 < CLS8 <= TLS < 100; got "
            f"TLS {tls} and CLS8 {cls8}"
        )


def _slow_directions(x_NTD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random combinations `[count, D]` of the states' running means, less the mean of all."""
    total_NTD = x_NTD.cumsum(dim=1)
    slow_NTD = (total_NTD[:, SMOOTH:] - total_NTD[:, :-SMOOTH]) / SMOOTH
    slow_ND = slow_NTD.flatten(0, 1)
    slow_ND = slow_ND - slow_ND.mean(dim=0)
    return torch.randn(count, len(slow_ND), generator=generator) @ slow_ND


def _unit_variance(rows_ED: Tensor, x_NTD: Tensor) -> Tensor:
    spread_E = (x_NTD.flatten(0, 1) @ rows_ED.T).std(dim=0)
    return rows_ED / spread_E.unsqueeze(-1)
