"""Metrics: sparsity of routings, balance of the experts, cost of a configuration. All shares are in percent."""

from blockffn.metrics.balance import LoadStatistics, load_statistics
from blockffn.metrics.cost import (
    ParameterCounts,
    active_parameters,
    flops_per_token,
    parameter_counts,
    weight_bytes_per_token,
)
from blockffn.metrics.report import LayerSparsity, Sparsity, SparsityReport
from blockffn.metrics.sparsity import SparsityMeter, chunk_level_sparsity, reuse_ratio, token_level_sparsity

__all__ = [
    "LayerSparsity",
    "LoadStatistics",
    "ParameterCounts",
    "Sparsity",
    "SparsityMeter",
    "SparsityReport",
    "active_parameters",
    "chunk_level_sparsity",
    "flops_per_token",
    "load_statistics",
    "parameter_counts",
    "reuse_ratio",
    "token_level_sparsity",
    "weight_bytes_per_token",
]
