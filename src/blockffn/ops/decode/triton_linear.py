"""Norms and products of a decode step.

A program of a product takes rows of the weight and reads `x` from L2: of one token whole rows, 32 KiB at a time; of two
to eight tokens 16 rows, each warp a part of their columns, for tensor cores. It requests its first weights, which no
kernel of the step writes, before it waits for the kernel that writes `x`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops.gpu import has_dependent_launch, num_processors
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, silu, wait_for_previous_kernel

TILE_BYTES = 32 << 10
MAX_COLUMNS = 2048  # of a tile that is not a whole row
MAX_DOT_TOKENS = 8  # that a product of our own takes; more go to cuBLAS
DOT_ROWS, DOT_COLUMNS = 16, 256  # of a weight, that a warp takes at once
PROGRAMS = 3  # per processor, of a product after a norm: each computes the norm once


@triton.jit
def sum_and_norm(
    x_ptr, branch_ptr, norm, columns, scale, eps, D: tl.constexpr, BRANCH: tl.constexpr, DTYPE: tl.constexpr
):
    """One token's `x + scale * branch` and its norm, in float32, rounded to `DTYPE` where the model rounds."""
    inside = columns < D
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        x += scale * tl.load(branch_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = x.to(DTYPE).to(tl.float32)
    normed = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / D + eps))
    normed = (normed.to(DTYPE).to(tl.float32) * norm.to(tl.float32)).to(DTYPE).to(tl.float32)
    return x, normed


@triton.jit
def _add_norm_kernel(
    x_ptr, branch_ptr, norm_ptr, sum_ptr, normed_ptr, scale, eps, x_stride, branch_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BRANCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    norm = tl.load(norm_ptr + columns, mask=columns < D, other=0.0)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    x, normed = sum_and_norm(
        x_ptr + token * x_stride, branch_ptr + token * branch_stride, norm, columns, scale, eps, D, BRANCH, dtype
    )
    if BRANCH:
        tl.store(sum_ptr + token * D + columns, x.to(dtype), mask=columns < D)
    tl.store(normed_ptr + token * D + columns, normed.to(dtype), mask=columns < D)


@triton.jit
def _norm_linear_kernel(
    x_ptr, branch_ptr, norm_ptr, weight_ptr, up_ptr, sum_ptr, out_ptr, scale, eps, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BRANCH: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: out = weight . norm(x + scale * branch); the first program stores the sum."""
    columns = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tile = tl.load(weight_ptr + at, mask=(rows < N)[:, None] & inside, other=0.0)
    if GATED:
        up_tile = tl.load(up_ptr + at, mask=(rows < N)[:, None] & inside, other=0.0)
    norm = tl.load(norm_ptr + columns, mask=columns < D, other=0.0)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x, normed = sum_and_norm(x_ptr, branch_ptr, norm, columns, scale, eps, D, BRANCH, dtype)
    if BRANCH:  # noqa: SIM102  # one is known when compiling, the other is not
        if tl.program_id(0) == 0:
            tl.store(sum_ptr + columns, x.to(dtype), mask=columns < D)
    block = tl.program_id(0)
    while block * ROWS < N:
        current = tile
        out_rows = block * ROWS + tl.arange(0, ROWS)
        block += tl.num_programs(0)
        rows = block * ROWS + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        if GATED:
            current_up = up_tile
            up_tile = tl.load(up_ptr + at, mask=(rows < N)[:, None] & inside, other=0.0)
        tile = tl.load(weight_ptr + at, mask=(rows < N)[:, None] & inside, other=0.0)
        out = tl.sum(current.to(tl.float32) * normed[None, :], axis=1)
        if GATED:
            out = silu(out) * tl.sum(current_up.to(tl.float32) * normed[None, :], axis=1)
        tl.store(out_ptr + out_rows, out.to(dtype), mask=out_rows < N)


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, out_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    """One token: out = weight . x, in steps of `BLOCK_D` columns with one step in flight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    wanted = (rows < N)[:, None]
    tile = tl.load(weight_ptr + at, mask=wanted & (columns < D)[None, :], other=0.0)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    out = tl.zeros([ROWS], tl.float32)
    start = 0
    while start < D:
        current = tile
        x = tl.load(x_ptr + start + columns, mask=start + columns < D, other=0.0).to(tl.float32)
        start += BLOCK_D
        tile = tl.load(weight_ptr + at + start, mask=wanted & (start + columns < D)[None, :], other=0.0)
        out += tl.sum(current.to(tl.float32) * x[None, :], axis=1)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _dot_linear_kernel(
    x_ptr, weight_ptr, out_ptr, N, T, x_stride,
    TOKENS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = weight . x[t] on tensor cores, in steps of `PARTS * BLOCK_D` columns with one step in flight.

    Each warp sums its own part of the columns: one chain of products is slower.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PARTS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tokens = tl.arange(0, TOKENS)
    at = weight_ptr + rows.to(tl.int64)[None, :, None] * D + columns[:, None, :]
    wanted, present = (rows < N)[None, :, None], (tokens < T)[None, None, :]
    tile = tl.load(at, mask=wanted & (columns < D)[:, None, :], other=0.0)
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    parts = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
    start = 0
    while start < D:
        current = tile
        x = tl.load(
            x_ptr + tokens[None, None, :] * x_stride + start + columns[:, :, None],
            mask=present & (start + columns < D)[:, :, None], other=0.0,
        )  # fmt: skip
        start += PARTS * BLOCK_D
        tile = tl.load(at + start, mask=wanted & (start + columns < D)[:, None, :], other=0.0)
        parts = tl.dot(current, x, parts, input_precision="ieee")
    out = tl.sum(parts, axis=0).to(out_ptr.dtype.element_ty)
    mask = (tokens < T)[None, :] & (rows < N)[:, None]
    tl.store(out_ptr + tokens[None, :] * N + rows[:, None], out, mask=mask)


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """gate = silu(gate) * up, in place."""
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(gate_ptr + at, (silu(gate) * up).to(gate_ptr.dtype.element_ty), mask=at < size)


def add_norm(
    x: Tensor, norm: Tensor, *, eps: float, branch: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    T, D = x.shape
    normed = torch.empty(T, D, dtype=x.dtype, device=x.device)
    total = x if branch is None else torch.empty_like(normed)
    other = x if branch is None else branch
    _add_norm_kernel[(T,)](
        x, other, norm, total, normed, scale, eps, x.stride(0), other.stride(0),
        D=D, BLOCK_D=triton.next_power_of_2(D), BRANCH=branch is not None, num_warps=4, **launch(x),
    )  # fmt: skip
    return total, normed


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if len(x) > 1:
        x, normed = add_norm(x, norm, eps=eps, branch=branch, scale=scale)
        out = linear(normed, weight)
        if up is not None:
            block = 1024
            other = linear(normed, up)
            grid = (triton.cdiv(out.numel(), block),)
            _gate_kernel[grid](out, other, out.numel(), BLOCK=block, num_warps=4, **launch(x))
        return out, x
    N, D = weight.shape
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    total = x if branch is None else torch.empty_like(x)
    block_d = triton.next_power_of_2(D)
    rows = rows_of_tile(block_d, weight, tiles=1 if up is None else 2)
    programs = min(triton.cdiv(N, rows), PROGRAMS * num_processors(x.device))
    _norm_linear_kernel[(programs,)](
        x, x if branch is None else branch, norm, weight, weight if up is None else up, total, out, scale, eps, N,
        D=D, BLOCK_D=block_d, ROWS=rows, BRANCH=branch is not None, GATED=up is not None,
        num_warps=warps_of_row(block_d), **launch(x),
    )  # fmt: skip
    return out, total


def linear(x: Tensor, weight: Tensor, *, float_output: bool = False) -> Tensor:
    if len(x) == 1:
        return row_linear(x, weight, float_output=float_output)
    if len(x) <= MAX_DOT_TOKENS and x.element_size() == 2:
        return dot_linear(x, weight, float_output=float_output)
    out = F.linear(x, weight)
    return out.float() if float_output else out


def row_linear(x: Tensor, weight: Tensor, *, float_output: bool = False) -> Tensor:
    """`linear` of one token."""
    assert len(x) == 1
    N, D = weight.shape
    out = torch.empty(1, N, dtype=torch.float32 if float_output else x.dtype, device=x.device)
    block_d = min(triton.next_power_of_2(D), MAX_COLUMNS)
    # Where rows are longer than a tile, the next one is in flight beside it.
    rows = rows_of_tile(block_d, weight, tiles=1 if block_d >= D else 2)
    _linear_kernel[(triton.cdiv(N, rows),)](
        x, weight, out, N, D=D, BLOCK_D=block_d, ROWS=rows, num_warps=warps_of_row(block_d), **launch(x)
    )
    return out


def dot_linear(x: Tensor, weight: Tensor, *, float_output: bool = False) -> Tensor:
    """`linear` of a few tokens in 16 bits."""
    assert x.element_size() == 2
    T, (N, D) = len(x), weight.shape
    out = torch.empty(T, N, dtype=torch.float32 if float_output else x.dtype, device=x.device)
    programs = triton.cdiv(N, DOT_ROWS)
    # What was fastest on an H100: few programs have all their bytes in flight, of many each needs less.
    parts = 8 if programs <= 2 * num_processors(x.device) else 2
    _dot_linear_kernel[(programs,)](
        x, weight, out, N, T, x.stride(0), TOKENS=max(8, triton.next_power_of_2(T)), D=D, ROWS=DOT_ROWS, PARTS=parts,
        BLOCK_D=DOT_COLUMNS, num_warps=parts, **launch(x),
    )  # fmt: skip
    return out


def rows_of_tile(block_d: int, weight: Tensor, *, tiles: int = 1) -> int:
    """Rows that make `TILE_BYTES` together, in `tiles` tiles; a power of two."""
    rows = TILE_BYTES // (block_d * weight.element_size() * tiles)
    return max(1, min(rows, triton.next_power_of_2(weight.shape[0])))


def warps_of_row(block_d: int) -> int:
    return 4 if block_d <= 4096 else 8


def launch(x: Tensor) -> dict[str, bool]:
    """Whether a kernel on the device of `x` is launched while the one before it still runs."""
    pdl = has_dependent_launch(x.device)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}
