"""Balanced k-means: clusters of equal size, the same ones for the same input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def balanced_clusters(features_NK: Tensor, num_clusters: int, *, iterations: int = 8, seed: int = 0) -> Tensor:
    """The cluster of each row of `features`, as int64 `[N]`; every cluster has `N / num_clusters` rows.

    Lloyd's iterations on directions (rows are scaled to length 1). A row goes to the centre that it is most similar to,
    the closest pairs first, as long as there is room.

    Raises:
        ValueError: `num_clusters` does not divide the number of rows.
    """
    rows = features_NK.shape[0]
    if num_clusters < 1 or rows % num_clusters:
        near = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = min(near, key=lambda n: abs(n - num_clusters))
        raise ValueError(f"{rows} rows cannot be split into {num_clusters} equal clusters; nearest: {nearest}")
    directions = F.normalize(features_NK.float(), dim=-1)
    centres = directions[_spread_out(directions, num_clusters, seed)]
    clusters = torch.full((rows,), -1)
    for _ in range(iterations):
        assigned = _assign(directions @ centres.T)
        if torch.equal(assigned, clusters):
            break
        clusters = assigned
        membership = F.one_hot(clusters, num_clusters).to(directions.dtype)
        centres = F.normalize(membership.T.to(directions.device) @ directions, dim=-1)
    return clusters


def _spread_out(directions: Tensor, count: int, seed: int) -> list[int]:
    """Rows to begin with: one drawn, then always the one that is least similar to all chosen before."""
    chosen = [int(torch.randint(len(directions), (), generator=torch.Generator().manual_seed(seed)))]
    nearest = directions @ directions[chosen[0]]
    while len(chosen) < count:
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, directions @ directions[chosen[-1]])
    return chosen


def _assign(similarity_NE: Tensor) -> Tensor:
    rows, clusters = similarity_NE.shape
    room = [rows // clusters] * clusters
    found = [-1] * rows
    left = rows
    for pair in similarity_NE.flatten().argsort(descending=True, stable=True).tolist():
        row, cluster = divmod(pair, clusters)
        if found[row] < 0 and room[cluster]:
            found[row] = cluster
            room[cluster] -= 1
            left -= 1
            if not left:
                break
    return torch.tensor(found)
