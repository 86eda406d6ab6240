"""Sparsity counted token by token with plain Python sets: slow, and obviously right."""

from __future__ import annotations

import math

import torch

Sets = list[list[set[int]]]


def active_sets(weights: torch.Tensor) -> Sets:
    """`[B, T, E]` to the set of active experts of each token."""
    return [[{e for e, w in enumerate(token) if w != 0} for token in row] for row in weights.tolist()]


def token_level_sparsity(sets: Sets, documents: list[list[int]], num_experts: int) -> float:
    used = [len(s) for row, ids in zip(sets, documents) for s, d in zip(row, ids) if d >= 0]
    return 100 * (1 - sum(used) / (len(used) * num_experts)) if used else math.nan


def chunk_level_sparsity(sets: Sets, documents: list[list[int]], num_experts: int, window: int) -> float:
    unions = []
    for row, ids in zip(sets, documents):
        for start in range(0, len(row), window):
            group = ids[start : start + window]
            if len(group) == window and len(set(group)) == 1 and group[0] >= 0:
                unions.append(len(set().union(*row[start : start + window])))
    return 100 * (1 - sum(unions) / (len(unions) * num_experts)) if unions else math.nan


def reuse_ratio(sets: Sets, documents: list[list[int]]) -> float:
    ratios = [
        len(row[t] & row[t + 1]) / len(row[t])
        for row, ids in zip(sets, documents)
        for t in range(len(row) - 1)
        if ids[t] == ids[t + 1] and ids[t] >= 0 and row[t]
    ]
    return 100 * sum(ratios) / len(ratios) if ratios else math.nan
