"""One token, as `ops/sparse_ffn/triton_token.py`, with every byte requested before the first is used.

The compiler delays a load to its first use where it can: in the kernel in use, `down` is requested after `up` has come,
one more latency of the memory. Loads before the loop cannot be delayed. Optionally int8 with a scale for each row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, silu, wait_for_previous_kernel
from candidates.scan import active_words, num_active, row_of_item

LANES = tl.constexpr(32)


@dataclass(frozen=True)
class TokenConfig:
    """`rows` of an expert at a time and program; then `sum_cols` columns of the sum over programs."""

    rows: int = 4
    programs: int = 256
    warps: int = 4
    sum_cols: int = 16
    sum_warps: int = 4


@triton.jit
def _rows_kernel(
    x_ptr, up_ptr, down_ptr, up_scale_ptr, down_scale_ptr, weights_ptr, partial_ptr,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """partial[program] = sum over its rows of weight * silu(up[row] . x) * down[row]."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + columns, mask=inside, other=0.0)
    active = active_words(weights_ptr, 1, E, 1, LANES)
    steps: tl.constexpr = F // ROWS
    local_rows = tl.arange(0, ROWS)
    end = num_active(active) * steps
    item = tl.program_id(0)
    row = row_of_item(active, item, E, F, ROWS, LANES)
    at = local_rows[:, None] * D + columns[None, :]
    wanted = (item * ROWS + local_rows < end * ROWS)[:, None] & inside[None, :]
    # Before the loop: inside it, the compiler would request `down` only after `up` has come.
    up = tl.load(up_ptr + row * D + at, mask=wanted, other=0.0)
    down = tl.load(down_ptr + row * D + at, mask=wanted, other=0.0)
    weight = tl.load(weights_ptr + row // F, mask=item < end, other=0.0)
    if SCALED:
        up_scale = tl.load(up_scale_ptr + row + local_rows)
        down_scale = tl.load(down_scale_ptr + row + local_rows)
    partial = tl.zeros([BLOCK_D], tl.float32)
    while item < end:
        preact = tl.sum(up.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        if SCALED:
            hidden = silu(preact * up_scale) * weight.to(tl.float32) * down_scale
        else:
            hidden = silu(preact) * weight.to(tl.float32)
        partial += tl.sum(down.to(tl.float32) * hidden[:, None], axis=0)
        item += tl.num_programs(0)
        row = row_of_item(active, item, E, F, ROWS, LANES)
        wanted = (item * ROWS + local_rows < end * ROWS)[:, None] & inside[None, :]
        up = tl.load(up_ptr + row * D + at, mask=wanted, other=0.0)
        down = tl.load(down_ptr + row * D + at, mask=wanted, other=0.0)
        weight = tl.load(weights_ptr + row // F, mask=item < end, other=0.0)
        if SCALED:
            up_scale = tl.load(up_scale_ptr + row + local_rows)
            down_scale = tl.load(down_scale_ptr + row + local_rows)
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


def ffn_of_one_token(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    config: TokenConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN for `T == 1`. All tensors contiguous; `pdl` needs compute capability 9.0 or newer."""
    E, F, D = up_proj_EFD.shape
    config = config or TokenConfig()
    rows = min(F & -F, config.rows)
    programs = min(config.programs, E * F // rows)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    launch = {"launch_pdl": True} if pdl else {}
    _rows_kernel[(programs,)](
        x_TD, up_proj_EFD, down_proj_EFD, *(scales or (None, None)), weights_TE, partial,
        E=E, D=D, F=F, BLOCK_D=triton.next_power_of_2(D), ROWS=rows, SCALED=scales is not None, PDL=pdl,
        num_warps=config.warps, **launch,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(D, config.sum_cols),)](
        partial, y_TD,
        D=D, PROGRAMS=programs, BLOCK_P=triton.next_power_of_2(programs), BLOCK_D=config.sum_cols, PDL=pdl,
        num_warps=config.sum_warps, **launch,
    )  # fmt: skip
    return y_TD
