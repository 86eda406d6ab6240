"""One token: a program takes rows of `up` and the same rows of `down`; a second launch adds the programs' sums.

Both projections are stored `[E, F, D]`, so hidden unit `f` of an expert needs row `f` of either and nothing else: all
its bytes are requested at once. Every program reads the `E` routing weights, or computes them from the router's logits,
and ranks the active experts itself, so there is no compaction launch and no host synchronisation. Sums run in float32
in a fixed order: repeated calls are bit-equal.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.gpu import num_processors
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, relu_rmsnorm, silu, wait_for_previous_kernel


@triton.jit
def _rows_kernel(
    x_ptr, up_ptr, down_ptr, gate_ptr, weights_ptr, logits_ptr, router_norm_ptr, partial_ptr, router_eps, threshold,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, ROUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[program] = sum over its rows of weight * silu(up[row] . x) * down[row].

    `GATED`: silu(gate[row] . x) * (up[row] . x) instead. With `ROUTE` each program computes the weights from the
    logits, and the first one stores them.
    """
    experts = tl.arange(0, BLOCK_E)
    if ROUTE:
        router_norm = tl.load(router_norm_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if ROUTE:
        logits = tl.load(logits_ptr + experts, mask=experts < E, other=0.0)
        rounded = relu_rmsnorm(logits, router_norm, router_eps, threshold, E).to(weights_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(weights_ptr + experts, rounded, mask=experts < E)
        weights = tl.where(experts < E, rounded.to(tl.float32), 0.0)
    else:
        weights = tl.load(weights_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)
    active = weights != 0
    ranks = tl.cumsum(active.to(tl.int32), axis=0)
    steps: tl.constexpr = F // ROWS
    partial = tl.zeros([BLOCK_D], tl.float32)
    item = tl.program_id(0)
    chosen = active & (ranks == item // steps + 1)
    place = tl.sum(tl.where(chosen, experts + 1, 0), axis=0)  # of the expert, counted from 1; 0 past the last one
    while place > 0:
        expert = place.to(tl.int64) - 1  # so that offsets do not overflow
        rows = expert * F + (item % steps) * ROWS + tl.arange(0, ROWS)
        at = rows[:, None] * D + columns[None, :]
        up = tl.load(up_ptr + at, mask=inside[None, :], other=0.0)
        down = tl.load(down_ptr + at, mask=inside[None, :], other=0.0)
        if GATED:
            gate = tl.load(gate_ptr + at, mask=inside[None, :], other=0.0)
        if ROUTE:
            weight = tl.sum(tl.where(chosen, weights, 0.0), axis=0)
        else:
            weight = tl.load(weights_ptr + expert).to(tl.float32)
        item += tl.num_programs(0)
        chosen = active & (ranks == item // steps + 1)
        place = tl.sum(tl.where(chosen, experts + 1, 0), axis=0)
        hidden = tl.sum(up.to(tl.float32) * x[None, :], axis=1)
        if GATED:
            hidden *= silu(tl.sum(gate.to(tl.float32) * x[None, :], axis=1))
        else:
            hidden = silu(hidden)
        hidden *= weight
        partial += tl.sum(down.to(tl.float32) * hidden[:, None], axis=0)
    tl.store(partial_ptr + tl.program_id(0) * D + columns, partial, mask=inside)


@triton.jit
def _sum_kernel(
    partial_ptr, y_ptr,
    D: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    programs = tl.arange(0, BLOCK_P)
    mask = (programs < PROGRAMS)[:, None] & (columns < D)[None, :]
    wait_for_previous_kernel(PDL)
    partial = tl.load(partial_ptr + programs[:, None] * D + columns[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + columns, tl.sum(partial, axis=0).to(y_ptr.dtype.element_ty), mask=columns < D)


@dataclass(frozen=True)
class RouterLogits:
    """What BlockFFN's router has yet to norm: `logits [E]` in float32, `norm [E]`; weights up to `threshold` are 0."""

    logits: Tensor
    norm: Tensor
    eps: float
    threshold: float


def ffn_of_one_token(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
    router: RouterLogits | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN for `T == 1`. All tensors contiguous; `pdl` needs compute capability 9.0 or newer.

    Args:
        router: compute the weights from these, and leave them in `weights_TE`.
    """
    E, F, D = up_proj_EFD.shape
    block_d = triton.next_power_of_2(D)
    # Two programs per processor, 32 KiB of weights each: what keeps the memory busy. Measured on an H200.
    rows = max(1, min(F & -F, 16384 // (block_d * x_TD.element_size())))
    programs = min(2 * num_processors(x_TD.device), E * F // rows)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    launch = {"launch_pdl": True} if pdl else {}
    route = router or RouterLogits(weights_TE, weights_TE, 0.0, 0.0)  # not read without a router
    _rows_kernel[(programs,)](
        x_TD, up_proj_EFD, down_proj_EFD, up_proj_EFD if gate_proj_EFD is None else gate_proj_EFD, weights_TE,
        route.logits, route.norm, partial, route.eps, route.threshold,
        E=E, D=D, F=F, BLOCK_E=triton.next_power_of_2(E), BLOCK_D=block_d, ROWS=rows, GATED=gate_proj_EFD is not None,
        ROUTE=router is not None, PDL=pdl, num_warps=4 if block_d <= 4096 else 8, **launch,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(D, 16),)](
        partial, y_TD,
        D=D, PROGRAMS=programs, BLOCK_P=triton.next_power_of_2(programs), BLOCK_D=16, PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
    return y_TD
