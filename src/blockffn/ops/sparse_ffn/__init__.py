"""The sparse feed-forward network: `y = sum_e weights[:, e] * down_e(act(up_e(x)))` over active experts.

Contract, equal for every backend:

    x_TD          [T, D]     tokens
    up_proj_EFD   [E, F, D]  one contiguous block per expert
    down_proj_EFD [E, F, D]  the transpose of the usual `[D, F]`, so that an expert is one read
    weights_TE    [T, E]     routing weights; an expert with weight 0 contributes exactly nothing
    gate_proj_EFD [E, F, D]  optional; the expert is then `silu(gate x) * (up x)` instead of `silu(up x)`
    returns       [T, D]     in the dtype of `x_TD`

All tensors share one device and, on every backend but `reference`, one dtype for `x` and the projections.

Backends, in the order in which `auto` tries them:
    cpu        native kernels that read active rows only; batch-invariant; no gradient
    triton     GPU kernels that read active experts only; differentiable, but gated experts (up to 64 tokens)
    dense      two matrix products over all experts; differentiable; the training path
    reference  the definition, in float32, one expert after the other; differentiable; slow

`triton_invariant` is `triton` for `batch_invariant=True`: slower, no gradient, never preferred otherwise.

`sparse_ffn_packed` is the same op over `PackedExperts` (bf16, int8 or int4 in the layout that the CPU reads fastest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.ops.backend import Backend, choose_backend
from blockffn.ops.quantization import PackedExperts
from blockffn.ops.sparse_ffn.cpu import pays_plain, refuses_packed, refuses_plain, sparse_ffn_cpu, sparse_ffn_packed_cpu
from blockffn.ops.sparse_ffn.dense import sparse_ffn_dense
from blockffn.ops.sparse_ffn.reference import sparse_ffn_packed_reference, sparse_ffn_reference
from blockffn.ops.sparse_ffn.triton import (
    needs_gradient,
    pays_triton,
    refuses_triton,
    refuses_triton_invariant,
    sparse_ffn_triton,
    sparse_ffn_triton_invariant,
)

BACKENDS: dict[str, Backend] = {
    # Never preferred: `auto` takes it where `batch_invariant=True` leaves nothing else on a GPU.
    "triton_invariant": Backend(
        sparse_ffn_triton_invariant, refuses_triton_invariant, pays=lambda *args, **kwargs: False, batch_invariant=True
    ),
    "cpu": Backend(sparse_ffn_cpu, refuses_plain, pays_plain, batch_invariant=True),
    "triton": Backend(sparse_ffn_triton, refuses_triton, pays_triton),
    "dense": Backend(sparse_ffn_dense),
    "reference": Backend(sparse_ffn_reference),
}

PACKED_BACKENDS: dict[str, Backend] = {
    "cpu": Backend(sparse_ffn_packed_cpu, refuses_packed, batch_invariant=True),
    "reference": Backend(sparse_ffn_packed_reference),
}


def sparse_ffn(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
    threshold: float = 0.0,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Apply the active experts of each token and sum them, weighted. Shapes as in the module docstring.

    Args:
        threshold: experts with `|weight| <= threshold` are skipped; trades quality for speed at run time.
        batch_invariant: only use a backend for which a token's result is bit-equal in any batch, so that verifying k
            drafted tokens rounds like decoding them one by one.
        backend: a name in `BACKENDS`, or `auto`: the fastest that takes the arguments.

    Raises:
        ValueError: shapes disagree, `threshold` is negative, or `backend` is unknown or cannot take the arguments.
    """
    check_shapes(x_TD, up_proj_EFD, down_proj_EFD, weights_TE, gate_proj_EFD)
    weights_TE = apply_threshold(weights_TE, threshold)
    arguments = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    name = choose_backend(
        "sparse_ffn", BACKENDS, backend, *arguments, gate_proj_EFD=gate_proj_EFD, batch_invariant=batch_invariant
    )
    result: Tensor = BACKENDS[name].run(*arguments, gate_proj_EFD=gate_proj_EFD)
    return result


def takes_token_kernel(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, *, backend: str = "auto"
) -> bool:
    """Whether `sparse_ffn` computes this by the Triton kernel of one token, which can also norm a router's logits.

    Raises:
        ValueError: as `sparse_ffn`.
    """
    arguments = (x_TD, up_proj_EFD, down_proj_EFD, weights_TE)
    check_shapes(*arguments, None)
    name = choose_backend("sparse_ffn", BACKENDS, backend, *arguments)
    return name == "triton" and len(x_TD) == 1 and not needs_gradient(*arguments)


def sparse_ffn_packed(
    x_TD: Tensor,
    experts: PackedExperts,
    weights_TE: Tensor,
    *,
    threshold: float = 0.0,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`sparse_ffn` over experts packed by `blockffn.ops.quantization.pack_experts`.

    `x_TD` is float32 or bfloat16 whatever the format of the experts. Other arguments as for `sparse_ffn`.

    Raises:
        ValueError: shapes disagree, `threshold` is negative, or `backend` is unknown or cannot take the arguments.
    """
    T, E, D = x_TD.shape[0], experts.num_experts, experts.hidden_size
    if x_TD.shape != (T, D):
        raise ValueError(f"sparse_ffn_packed: x has shape {tuple(x_TD.shape)}, expected {(T, D)}")
    if weights_TE.shape != (T, E):
        expected = (T, E)
        raise ValueError(f"sparse_ffn_packed: weights has shape {tuple(weights_TE.shape)}, expected {expected}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    arguments = (x_TD, experts, weights_TE, threshold)
    name = choose_backend("sparse_ffn_packed", PACKED_BACKENDS, backend, *arguments, batch_invariant=batch_invariant)
    result: Tensor = PACKED_BACKENDS[name].run(*arguments)
    return result


def apply_threshold(weights_TE: Tensor, threshold: float) -> Tensor:
    """Set `|weight| <= threshold` to zero. Raises `ValueError` for a negative threshold."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if threshold == 0:
        return weights_TE
    return torch.where(weights_TE.abs() <= threshold, 0, weights_TE)


def check_shapes(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, gate_proj_EFD: Tensor | None
) -> None:
    """Raise `ValueError` naming the tensor whose shape breaks the contract."""
    if x_TD.ndim != 2 or up_proj_EFD.ndim != 3:
        raise ValueError(
            f"sparse_ffn needs x [T, D] and up_proj [E, F, D], got {tuple(x_TD.shape)} and {tuple(up_proj_EFD.shape)}"
        )
    (T, D), (E, F, _) = x_TD.shape, up_proj_EFD.shape
    expected = {
        "up_proj": (up_proj_EFD, (E, F, D)),
        "down_proj": (down_proj_EFD, (E, F, D)),
        "weights": (weights_TE, (T, E)),
    }
    if gate_proj_EFD is not None:
        expected["gate_proj"] = (gate_proj_EFD, (E, F, D))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"sparse_ffn: {name} has shape {tuple(tensor.shape)}, expected {shape}")
