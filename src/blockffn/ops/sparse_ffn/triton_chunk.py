"""A chunk of 2 to 64 tokens over the union of their experts: each union expert's weights are read once for all tokens.

Same two launches as for one token, with matrix products over the chunk padded to at least 16 tokens. A token that does not
activate an expert of the union gets a hidden value of exactly 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.sparse_ffn.triton_decode import largest_divisor
from blockffn.ops.sparse_ffn.triton_parts import (
    active_mask,
    let_next_kernel_start,
    nth_active,
    silu,
    store_split,
    wait_for_previous_kernel,
)

MAX_CHUNK = 64


@dataclass(frozen=True)
class ChunkConfig:
    """Launch shape: `up_rows` rows of `up` per program in steps of `up_cols`, `down_rows` x `down_cols` of `down` per step."""

    up_rows: int = 16
    up_cols: int = 256
    up_warps: int = 4
    up_stages: int = 4
    up_programs: int = 1056
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
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    COUNTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[t, rank * F + f] = weight[t] * silu(up[expert, f] . x[t]) over the union in ascending order; 0 where inactive."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    active = active_mask(weights_ptr, num_tokens, E, TOKENS, BLOCK_E, BLOCK_T)
    ranks = tl.cumsum(active, axis=0)
    steps: tl.constexpr = F // ROWS
    columns = tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, TOKENS)
    present = tokens < num_tokens
    for item in range(tl.program_id(0), tl.sum(active, axis=0) * steps, tl.num_programs(0)):
        expert = nth_active(active, ranks, item // steps, BLOCK_E)
        rows = expert * F + (item % steps) * ROWS + tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            inside = start + columns < D
            tile = tl.load(up_ptr + rows[:, None] * D + start + columns[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(
                x_ptr + tokens[None, :] * D + start + columns[:, None],
                mask=present[None, :] & inside[:, None],
                other=0.0,
            )
            acc = tl.dot(tile, x, acc, input_precision="ieee")
        weights = tl.load(weights_ptr + tokens * E + expert, mask=present, other=0.0).to(tl.float32)[None, :]
        hidden = tl.where(weights != 0, silu(acc) * weights, 0.0)
        at = hidden_ptr + tokens[None, :] * (E * F) + item * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(at, hidden.to(hidden_ptr.dtype.element_ty))


@triton.jit
def _down_kernel(
    down_ptr,
    weights_ptr,
    hidden_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = sum over union rows of hidden[t, row] * down[row]; the rows are dealt to `SPLITS` programs per column block."""
    let_next_kernel_start(PDL)
    # The up kernel began after the routing weights were complete, and this one began after it: no need to wait for them.
    active = active_mask(weights_ptr, num_tokens, E, TOKENS, BLOCK_E, BLOCK_T)
    ranks = tl.cumsum(active, axis=0)
    steps: tl.constexpr = F // ROWS
    num_items = tl.sum(active, axis=0) * steps
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    local_rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    inside = (columns < D)[None, :]
    offsets = local_rows[:, None] * D + columns[None, :]

    item = tl.program_id(1)
    block = nth_active(active, ranks, item // steps, BLOCK_E) * F + (item % steps) * ROWS
    wanted = inside & (item * ROWS + local_rows < num_items * ROWS)[:, None]
    tile = tl.load(down_ptr + block * D + offsets, mask=wanted, other=0.0)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    while item < num_items:
        hidden = tl.load(hidden_ptr + tokens[:, None] * (E * F) + item * ROWS + local_rows[None, :])
        current = tile
        item += SPLITS
        block = nth_active(active, ranks, item // steps, BLOCK_E) * F + (item % steps) * ROWS
        wanted = inside & (item * ROWS + local_rows < num_items * ROWS)[:, None]
        tile = tl.load(down_ptr + block * D + offsets, mask=wanted, other=0.0)
        acc = tl.dot(hidden, current, acc, input_precision="ieee")
    at = tokens[:, None] * D + columns[None, :]
    mask = (tokens < num_tokens)[:, None] & inside
    store_split(acc, tl.program_id(1), tl.program_id(0), at, mask, y_ptr, partial_ptr, counter_ptr, TOKENS * D, SPLITS)


def chunk_tokens(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    config: ChunkConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN of 1 to 64 tokens. All tensors contiguous; `pdl` needs compute capability 9.0 or newer.

    Repeated calls are bit-equal: sums run in float32, in an order that depends only on the union.
    """
    T, (E, F, D) = x_TD.shape[0], up_proj_EFD.shape
    assert 1 <= T <= MAX_CHUNK
    config = config or ChunkConfig()
    up_rows, down_rows = largest_divisor(F, config.up_rows), largest_divisor(F, config.down_rows)
    tokens, block_e = max(16, triton.next_power_of_2(T)), triton.next_power_of_2(E)
    column_tiles = triton.cdiv(D, config.down_cols)
    counters = triton.next_power_of_2(column_tiles)
    hidden = torch.empty(tokens * E * F, dtype=x_TD.dtype, device=x_TD.device)
    partial = torch.empty(config.splits * tokens * D, dtype=torch.float32, device=x_TD.device)
    counter = torch.empty(counters, dtype=torch.int32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    shape = {
        "E": E,
        "D": D,
        "F": F,
        "TOKENS": tokens,
        "BLOCK_E": block_e,
        "BLOCK_T": min(tokens, max(1, 4096 // block_e)),
    }
    launch = {"launch_pdl": True} if pdl else {}
    _up_kernel[(min(config.up_programs, E * F // up_rows),)](
        x_TD, up_proj_EFD, weights_TE, hidden, counter, T,
        **shape, BLOCK_D=min(triton.next_power_of_2(D), config.up_cols), ROWS=up_rows, STAGES=config.up_stages,
        COUNTERS=counters, PDL=pdl, num_warps=config.up_warps, **launch,
    )  # fmt: skip
    _down_kernel[(column_tiles, config.splits)](
        down_proj_EFD, weights_TE, hidden, y_TD, partial, counter, T,
        **shape, BLOCK_D=config.down_cols, ROWS=down_rows, SPLITS=config.splits,
        PDL=pdl, num_warps=config.down_warps, **launch,
    )  # fmt: skip
    return y_TD
