"""BlockFFN's router in a decode step, and the counts of active experts."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops.decode.inputs import Router, StepInputs
from blockffn.ops.decode.triton_linear import add_norm, launch, rows_of_tile, sum_and_norm, warps_of_row
from blockffn.ops.gpu import has_dependent_launch
from blockffn.ops.sparse_ffn import sparse_ffn, takes_token_kernel
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, relu_rmsnorm, wait_for_previous_kernel
from blockffn.ops.sparse_ffn.triton_token import RouterLogits, ffn_of_one_token

LEAST_PROGRAMS = 64  # that share the rows of a router, which are few


@triton.jit
def _norm_logits_kernel(
    x_ptr, branch_ptr, norm_ptr, weight_ptr, sum_ptr, normed_ptr, logits_ptr, scale, eps,
    E: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BRANCH: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: each program multiplies a few rows of the router; the first stores the sum and its norm."""
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
    x, normed = sum_and_norm(x_ptr, branch_ptr, norm, columns, scale, eps, D, BRANCH, dtype)
    if tl.program_id(0) == 0:
        if BRANCH:
            tl.store(sum_ptr + columns, x.to(dtype), mask=inside)
        tl.store(normed_ptr + columns, normed.to(dtype), mask=inside)
    logits = tl.sum(tile.to(tl.float32) * normed[None, :], axis=1)
    if ROUND:
        logits = logits.to(dtype).to(tl.float32)
    tl.store(logits_ptr + rows, logits, mask=rows < E)


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
    weight, float32 = router.weight, router.float32
    (T, D), E = x.shape, len(weight)
    if T > 1:
        total, normed = add_norm(x, norm, eps=eps, branch=branch, scale=scale)
        return total, normed, F.linear(normed.float(), weight.float()) if float32 else F.linear(normed, weight)
    normed, logits = torch.empty_like(x), torch.empty(1, E, dtype=torch.float32, device=x.device)
    total = x if branch is None else torch.empty_like(x)
    block_d = triton.next_power_of_2(D)
    rows = min(rows_of_tile(block_d, weight), triton.next_power_of_2(triton.cdiv(E, LEAST_PROGRAMS)))
    _norm_logits_kernel[(triton.cdiv(E, rows),)](
        x, x if branch is None else branch, norm, weight, total, normed, logits, scale, eps,
        E=E, D=D, BLOCK_D=block_d, ROWS=rows, BRANCH=branch is not None, ROUND=not float32,
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
