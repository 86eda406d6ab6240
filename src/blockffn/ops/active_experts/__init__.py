"""Which experts a chunk of tokens activates, and for which tokens: the index that sparse kernels walk.

Contract, equal for every backend:

    weights_TE  [T, E]  routing weights, any float dtype; `|weight| <= threshold` is inactive (NaN is active, so that it
                        is seen and not dropped)
    threshold   >= 0; the default 0 means `weights != 0`
    returns     `ActiveExperts`, int32 tensors whose shapes depend on `T` and `E` alone: no host synchronisation, safe
                inside a CUDA graph, no dynamic shapes under `torch.compile`

Registered as `torch.ops.blockffn.active_experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from blockffn.ops.active_experts.reference import active_experts_reference
from blockffn.ops.backend import Backend, choose_backend
from blockffn.ops.gpu import refuses_device
from blockffn.ops.registration import define


class ActiveExperts(NamedTuple):
    """The union of active experts of `T` tokens and each expert's tokens. All int32, on the device of the weights.

    Attributes:
        union_E: `[E]`; the first `num_union` entries are the active experts, ascending; the rest are `E`.
        num_union: `[]`; how many experts at least one token activates.
        num_tokens_E: `[E]`; how many tokens activate each expert, by expert id.
        tokens_ET: `[E, T]`; row `e`: the `num_tokens_E[e]` tokens of expert `e`, ascending; the rest are `T`.
    """

    union_E: Tensor
    num_union: Tensor
    num_tokens_E: Tensor
    tokens_ET: Tensor


def _run_triton(weights_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from blockffn.ops.active_experts.triton import active_experts_kernels

    return active_experts_kernels(weights_TE, threshold)


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        _run_triton,
        refuses=lambda weights_TE, threshold: refuses_device(weights_TE.device),
        pays=lambda weights_TE, threshold: weights_TE.device.type == "cuda",
        batch_invariant=True,
    ),
    "reference": Backend(active_experts_reference, batch_invariant=True),
}


def active_experts(weights_TE: Tensor, *, threshold: float = 0.0, backend: str = "auto") -> ActiveExperts:
    """Index the active experts of a chunk. Shapes as in the module docstring.

    Raises:
        ValueError: `weights_TE` is not a matrix of floats, `threshold` is negative, or `backend` is unknown.
    """
    if weights_TE.ndim != 2 or not weights_TE.is_floating_point():
        raise ValueError(f"active_experts needs float weights [T, E], got {weights_TE.dtype} {tuple(weights_TE.shape)}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    name = choose_backend("active_experts", BACKENDS, backend, weights_TE, threshold)
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = BACKENDS[name].run
    return ActiveExperts(*run(weights_TE, threshold))


def _fake(weights_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, E = weights_TE.shape
    shapes: tuple[tuple[int, ...], ...] = ((E,), (), (E,), (E, T))
    union_E, num_union, num_tokens_E, tokens_ET = (weights_TE.new_empty(s, dtype=torch.int32) for s in shapes)
    return union_E, num_union, num_tokens_E, tokens_ET


define(
    "active_experts(Tensor weights_TE, float threshold) -> (Tensor, Tensor, Tensor, Tensor)",
    {"CompositeExplicitAutograd": active_experts_reference},
    fake=_fake,
)
