"""The operations of a decode step on a GPU; `reference` says what each computes. Imports Triton.

Up to eight tokens: products are kernels of our own, which have their first weights in flight before they wait for the
kernel before them (programmatic dependent launch); for one token they compute the norm, too. More tokens, or several in
float32: cuBLAS.
"""

from __future__ import annotations

from blockffn.ops.decode.triton_advance import advance
from blockffn.ops.decode.triton_attention import grouped_attention, latent_attention
from blockffn.ops.decode.triton_linear import add_norm, linear, norm_linear
from blockffn.ops.decode.triton_route import count_active, norm_route, norm_route_experts

__all__ = [
    "add_norm",
    "advance",
    "count_active",
    "grouped_attention",
    "latent_attention",
    "linear",
    "norm_linear",
    "norm_route",
    "norm_route_experts",
]
