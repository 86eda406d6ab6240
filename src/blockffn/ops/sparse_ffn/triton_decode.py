"""One token: two launches that read the up and down rows of the active experts once, and nothing else.

The kernels find the active experts themselves: every program reads the `E` routing weights and ranks them, so there is no
compaction launch and no host synchronisation. The second kernel is launched while the first still runs (programmatic
dependent launch) and has its first block of `down` rows in flight before it waits for the hidden vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.sparse_ffn.triton_parts import (
    active_mask,
    let_next_kernel_start,
    nth_active,
    silu,
    store_split,
    wait_for_previous_kernel,
)


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape. `up_rows` rows of `up` per step of a program, `down_rows` x `down_cols` of `down`, `splits` over rows."""

    up_rows: int = 4
    up_warps: int = 4
    up_programs: int = 528
    down_rows: int = 64
    down_cols: int = 64
    down_warps: int = 4
    splits: int = 8


@triton.jit
def _up_kernel(
    x_ptr,
    up_ptr,
    weights_ptr,
    hidden_ptr,
    counter_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[rank * F + f] = weight * silu(up[expert, f] . x), for the active experts in ascending order."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    active = active_mask(weights_ptr, 1, E, 1, BLOCK_E, 1)
    ranks = tl.cumsum(active, axis=0)
    steps: tl.constexpr = F // ROWS
    columns = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), tl.sum(active, axis=0) * steps, tl.num_programs(0)):
        expert = nth_active(active, ranks, item // steps, BLOCK_E)
        rows = expert * F + (item % steps) * ROWS + tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in tl.static_range(0, D, BLOCK_D):
            inside = (start + columns) < D
            tile = tl.load(up_ptr + rows[:, None] * D + start + columns[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
            acc += tile.to(tl.float32) * x.to(tl.float32)[None, :]
        weight = tl.load(weights_ptr + expert).to(tl.float32)
        tl.store(hidden_ptr + item * ROWS + tl.arange(0, ROWS), silu(tl.sum(acc, axis=1)) * weight)


@triton.jit
def _down_kernel(
    down_ptr,
    weights_ptr,
    hidden_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = sum over active rows of hidden[row] * down[row]; each program takes `BLOCK_D` columns of every SPLITS-th block."""
    let_next_kernel_start(PDL)
    # The up kernel began after the routing weights were complete, and this one began after it: no need to wait for them.
    active = active_mask(weights_ptr, 1, E, 1, BLOCK_E, 1)
    ranks = tl.cumsum(active, axis=0)
    steps: tl.constexpr = F // ROWS
    num_items = tl.sum(active, axis=0) * steps
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    local_rows = tl.arange(0, ROWS)
    inside = (columns < D)[None, :]
    offsets = local_rows[:, None] * D + columns[None, :]

    item = tl.program_id(1)
    block = nth_active(active, ranks, item // steps, BLOCK_E) * F + (item % steps) * ROWS
    wanted = inside & (item * ROWS + local_rows < num_items * ROWS)[:, None]
    tile = tl.load(down_ptr + block * D + offsets, mask=wanted, other=0.0)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    while item < num_items:
        hidden = tl.load(hidden_ptr + item * ROWS + local_rows)
        current = tile
        item += SPLITS
        block = nth_active(active, ranks, item // steps, BLOCK_E) * F + (item % steps) * ROWS
        wanted = inside & (item * ROWS + local_rows < num_items * ROWS)[:, None]
        tile = tl.load(down_ptr + block * D + offsets, mask=wanted, other=0.0)
        acc += current.to(tl.float32) * hidden[:, None]
    y = tl.sum(acc, axis=0)
    store_split(y, tl.program_id(1), tl.program_id(0), columns, columns < D, y_ptr, partial_ptr, counter_ptr, D, SPLITS)


def decode_token(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    config: DecodeConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN of one token, `T == 1`. All tensors contiguous; `pdl` needs compute capability 9.0 or newer.

    The sums run in float32 and in an order that depends only on which experts are active: repeated calls are bit-equal.
    """
    E, F, D = up_proj_EFD.shape
    config = config or DecodeConfig()
    up_rows, down_rows = largest_divisor(F, config.up_rows), largest_divisor(F, config.down_rows)
    block_e, column_tiles = triton.next_power_of_2(E), triton.cdiv(D, config.down_cols)
    counters = triton.next_power_of_2(column_tiles)
    scratch = torch.empty(E * F + config.splits * D, dtype=torch.float32, device=x_TD.device)
    counter = torch.empty(counters, dtype=torch.int32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    launch = {"launch_pdl": True} if pdl else {}
    _up_kernel[(min(config.up_programs, E * F // up_rows),)](
        x_TD, up_proj_EFD, weights_TE, scratch, counter,
        E=E, D=D, F=F, BLOCK_E=block_e, BLOCK_D=min(triton.next_power_of_2(D), 2048), ROWS=up_rows, COUNTERS=counters,
        PDL=pdl, num_warps=config.up_warps, **launch,
    )  # fmt: skip
    _down_kernel[(column_tiles, config.splits)](
        down_proj_EFD, weights_TE, scratch, y_TD, scratch[E * F :], counter,
        E=E, D=D, F=F, BLOCK_E=block_e, BLOCK_D=config.down_cols, ROWS=down_rows, SPLITS=config.splits,
        PDL=pdl, num_warps=config.down_warps, **launch,
    )  # fmt: skip
    return y_TD


def largest_divisor(width: int, bound: int) -> int:
    """The largest power of two that divides `width` and is at most `bound`."""
    return min(width & -width, bound)
