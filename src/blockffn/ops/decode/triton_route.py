"""BlockFFN's router in a decode step, and the counts of active experts."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.decode.inputs import Router, StepInputs
from blockffn.ops.decode.triton_linear import launch, rows_of_tile, sum_and_norm, warps_of_row
from blockffn.ops.gpu import has_dependent_launch, num_processors
from blockffn.ops.sparse_ffn import sparse_ffn, takes_token_kernel
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, relu_rmsnorm, wait_for_previous_kernel
from blockffn.ops.sparse_ffn.triton_token import RouterLogits, ffn_of_one_token

# Programs that share the rows of a router, which are few, and the tokens: at least, and per processor at most.
LEAST_PROGRAMS = 64
MOST_PROGRAMS = 4


@triton.jit
def _norm_logits_kernel(
    x_ptr, branch_ptr, norm_ptr, weight_ptr, sum_ptr, normed_ptr, logits_ptr, scale, eps, T, x_stride, branch_stride,
    E: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BRANCH: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program multiplies a few rows of the router with `TOKENS` tokens; the first ones store sums and norms."""
    columns = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = columns < D
    tile = tl.load(
        weight_ptr + rows[:, None] * D + columns[None, :], mask=(rows < E)[:, None] & inside[None, :], other=0.0
    )
    norm = tl.load(norm_ptr + columns, mask=inside, other=0.0)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    for i in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(1) * TOKENS + i, T - 1)
        x, normed = sum_and_norm(
            x_ptr + token * x_stride, branch_ptr + token * branch_stride, norm, columns, scale, eps, D, BRANCH, dtype
        )
        if tl.program_id(0) == 0:
            if BRANCH:
                tl.store(sum_ptr + token * D + columns, x.to(dtype), mask=inside)
            tl.store(normed_ptr + token * D + columns, normed.to(dtype), mask=inside)
        logits = tl.sum(tile.to(tl.float32) * normed[None, :], axis=1)
        if ROUND:
            logits = logits.to(dtype).to(tl.float32)
        tl.store(logits_ptr + token * E + rows, logits, mask=rows < E)


@triton.jit
def _route_kernel(
    logits_ptr, router_norm_ptr, count_ptr, out_ptr, router_eps, threshold,
    E: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    router_norm = tl.load(router_norm_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    logits = tl.load(logits_ptr + token * E + experts, mask=experts < E, other=0.0).to(tl.float32)
    weights = relu_rmsnorm(logits, router_norm, router_eps, threshold, E)
    weights = tl.where(token < tl.load(count_ptr), weights, 0.0)
    tl.store(out_ptr + token * E + experts, weights.to(out_ptr.dtype.element_ty), mask=experts < E)


@triton.jit
def _count_kernel(
    weights_ptr, out_ptr, T, E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    layer = tl.program_id(0)
    tokens, experts = tl.arange(0, TOKENS), tl.arange(0, BLOCK_E)
    mask = (tokens < T)[:, None] & (experts < E)[None, :]
    weights = tl.load(weights_ptr + layer * T * E + tokens[:, None] * E + experts[None, :], mask=mask, other=0.0)
    active = (weights != 0).to(tl.int64)
    tl.store(out_ptr + layer * (T + 1) + 1 + tokens, tl.sum(active, axis=1), mask=tokens < T)
    tl.store(out_ptr + layer * (T + 1), tl.sum(tl.max(active, axis=0), axis=0))


def norm_route(
    x: Tensor,
    router: Router,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    inputs: StepInputs,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    x, normed, logits = _norm_logits(x, router, norm=norm, eps=eps, branch=branch, scale=scale)
    E = len(router.weight)
    _route_kernel[(len(x),)](
        logits, router.norm, inputs.count, out, router.eps, router.threshold,
        E=E, BLOCK_E=triton.next_power_of_2(E), num_warps=1, **launch(x),
    )  # fmt: skip
    return x, normed


def norm_route_experts(
    x: Tensor,
    router: Router,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    inputs: StepInputs,
    out: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    if takes_token_kernel(x, up_proj, down_proj, out, backend=backend):
        x, normed, logits = _norm_logits(x, router, norm=norm, eps=eps, branch=branch, scale=scale)
        left = RouterLogits(logits, router.norm, router.eps, router.threshold)
        pdl = has_dependent_launch(x.device)
        return x, ffn_of_one_token(normed, up_proj, down_proj, out, router=left, pdl=pdl)
    x, normed = norm_route(x, router, norm=norm, eps=eps, branch=branch, scale=scale, inputs=inputs, out=out)
    return x, sparse_ffn(normed, up_proj, down_proj, out, backend=backend)


def _norm_logits(
    x: Tensor, router: Router, *, norm: Tensor, eps: float, branch: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual sum, its norm, and the router's logits `[T, E]`."""
    (T, D), E = x.shape, len(router.weight)
    normed = torch.empty(T, D, dtype=x.dtype, device=x.device)
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    total, other = (x, x) if branch is None else (torch.empty_like(normed), branch)
    block_d = triton.next_power_of_2(D)
    least_rows = triton.next_power_of_2(triton.cdiv(E * T, LEAST_PROGRAMS))
    rows = min(rows_of_tile(block_d, router.weight), least_rows)
    tokens = triton.next_power_of_2(triton.cdiv(T * triton.cdiv(E, rows), MOST_PROGRAMS * num_processors(x.device)))
    _norm_logits_kernel[(triton.cdiv(E, rows), triton.cdiv(T, tokens))](
        x, other, norm, router.weight, total, normed, logits, scale, eps, T, x.stride(0), other.stride(0),
        E=E, D=D, BLOCK_D=block_d, ROWS=rows, TOKENS=tokens, BRANCH=branch is not None, ROUND=not router.float32,
        num_warps=warps_of_row(block_d), **launch(x),
    )  # fmt: skip
    return total, normed, logits


def count_active(weights_LTE: Tensor) -> Tensor:
    L, T, E = weights_LTE.shape
    out = torch.empty(L, 1 + T, dtype=torch.int64, device=weights_LTE.device)
    _count_kernel[(L,)](
        weights_LTE, out, T, E=E, TOKENS=triton.next_power_of_2(T), BLOCK_E=triton.next_power_of_2(E),
        num_warps=4, **launch(weights_LTE),
    )  # fmt: skip
    return out
