"""The small operations between the large products of a decode step, fused so that a step has few launches.

Two modules compute the same functions on plain tensors: `reference`, in torch, the definition, on any device; and
`triton`, for GPUs, which reads nothing back to the host, so that a step can be captured in a CUDA graph.

    add_norm(x, norm, eps=, branch=, scale=)            residual sum, and its RMS norm
    norm_linear(x, weight, norm=, eps=, branch=, ...)   the same, then a product; with `up` the gated unit
    norm_route(x, router, norm=, ..., out=)             the same, then BlockFFN's router
    norm_route_experts(x, router, norm=, ..., out=)     the same, then the routed experts
    linear(x, weight)                                   a product
    grouped_attention, latent_attention                 rotate, write to the cache, attend over its valid rows
    count_active(weights_LTE)                           experts per layer: of the step together, and of each token
    advance(logits, inputs, chosen)                     the best token, and the inputs of the step that follows it

`x` is `[T, D]` with contiguous rows, T from 1 to 64; a `branch [T, D]` times `scale` is added to it first. Products
are in the dtype of `x` and sum in float32.
"""

from __future__ import annotations

from types import ModuleType

import torch

from blockffn.ops.decode import reference
from blockffn.ops.gpu import refuses_device

MAX_TOKENS = 64


def kernels(device: torch.device, backend: str = "auto") -> ModuleType:
    """The module that computes a step's operations on `device`; `auto`: `triton` on a GPU, `reference` elsewhere.

    Raises:
        ValueError: an unknown backend, or one that cannot run there.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r} for decode steps; choose reference, triton or auto")
    reason = refuses_device(device)
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot run decode steps: {reason}")
    from blockffn.ops.decode import triton

    return triton
