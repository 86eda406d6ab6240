"""Up to 64 tokens, as `ops/sparse_ffn/triton_union.py`: another scan, wider rows for large unions, more of `down`
in flight. Optionally int8 with a scale for each row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.gpu import num_processors
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, silu, store_split, wait_for_previous_kernel
from candidates.scan import active_words, num_active, row_of_item


@dataclass(frozen=True)
class UnionConfig:
    """As `UnionConfig` in the package, and two options.

    From `wide_union` experts on, if `wide_rows` is not 0, a program of the up kernel multiplies `wide_rows` rows in
    steps of `wide_cols` columns. `down_depth` blocks of `down` are in flight.
    """

    up_rows: int = 16
    up_cols: int = 512
    up_stages: int = 4
    up_programs: int = 2
    up_parts: int = 4
    wide_rows: int = 0
    wide_cols: int = 128
    wide_stages: int = 4
    wide_union: int = 1000
    up_warps: int = 4
    down_warps: int = 4
    splits: int = 16
    down_rows: int = 128
    down_cols: int = 64
    down_depth: int = 1
    lanes: int = 32


@triton.jit
def _rows_of_hidden(
    x_ptr, up_ptr, up_scale_ptr, down_scale_ptr, weights_ptr, hidden_ptr, active, num_union, num_tokens,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The columns of a step are cut into `PARTS`, each summed by its own warp: one chain of products is slower."""
    steps: tl.constexpr = F // ROWS
    columns = tl.arange(0, PARTS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    local_rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    present = tokens < num_tokens
    for item in range(tl.program_id(0), num_union * steps, tl.num_programs(0)):
        row = row_of_item(active, item, E, F, ROWS, LANES)
        rows = row + local_rows
        weights = tl.load(weights_ptr + tokens * E + row // F, mask=present, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            up_scale = tl.load(up_scale_ptr + rows)
            weights = weights * tl.load(down_scale_ptr + rows)[:, None]
        if PARTS == 1:
            preact = tl.zeros([ROWS, TOKENS], tl.float32)
            for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                k = start + tl.arange(0, BLOCK_D)
                tile = tl.load(up_ptr + rows[:, None] * D + k[None, :], mask=(k < D)[None, :], other=0.0)
                x = tl.load(
                    x_ptr + tokens[None, :] * D + k[:, None], mask=(k < D)[:, None] & present[None, :], other=0.0
                )
                preact = tl.dot(tile.to(x.dtype), x, preact, input_precision="ieee")
        else:
            parts = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
            for start in tl.range(0, D, PARTS * BLOCK_D, num_stages=STAGES):
                inside = start + columns < D
                tile = tl.load(
                    up_ptr + rows[None, :, None] * D + start + columns[:, None, :], mask=inside[:, None, :], other=0.0
                )
                x = tl.load(
                    x_ptr + tokens[None, None, :] * D + start + columns[:, :, None],
                    mask=inside[:, :, None] & present[None, None, :], other=0.0,
                )  # fmt: skip
                parts = tl.dot(tile.to(x.dtype), x, parts, input_precision="ieee")
            preact = tl.sum(parts, axis=0)
        if SCALED:
            preact *= up_scale[:, None]
        hidden = tl.where(weights != 0, silu(preact) * weights, 0.0)
        at = hidden_ptr + tokens[None, :] * (E * F) + item * ROWS + local_rows[:, None]
        tl.store(at, hidden.to(hidden_ptr.dtype.element_ty))


@triton.jit
def up_kernel(
    x_ptr, up_ptr, up_scale_ptr, down_scale_ptr, weights_ptr, hidden_ptr, counter_ptr,
    num_tokens, wide_union,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDE_ROWS: tl.constexpr, WIDE_BLOCK_D: tl.constexpr, WIDE_STAGES: tl.constexpr,
    SCALED: tl.constexpr, COUNTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden[t, rank * F + f] = weight[t] * silu(up[expert, f] . x[t]) over the union, ascending; 0 where inactive."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    active = active_words(weights_ptr, num_tokens, E, TOKENS, LANES)
    num_union = num_active(active)
    if WIDE_ROWS > 0 and num_union >= wide_union:
        _rows_of_hidden(
            x_ptr, up_ptr, up_scale_ptr, down_scale_ptr, weights_ptr, hidden_ptr, active, num_union, num_tokens,
            E, D, F, TOKENS, WIDE_ROWS, 1, WIDE_BLOCK_D, WIDE_STAGES, SCALED, LANES,
        )  # fmt: skip
    else:
        _rows_of_hidden(
            x_ptr, up_ptr, up_scale_ptr, down_scale_ptr, weights_ptr, hidden_ptr, active, num_union, num_tokens,
            E, D, F, TOKENS, ROWS, PARTS, BLOCK_D, STAGES, SCALED, LANES,
        )  # fmt: skip


@triton.jit
def _tile_of_down(
    down_ptr, active, item, end, offsets, inside,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`[ROWS, columns]` of an item, 0 past the last one."""
    row = row_of_item(active, item, E, F, ROWS, LANES)
    wanted = (item * ROWS + tl.arange(0, ROWS) < end * ROWS)[:, None] & inside
    return tl.load(down_ptr + row * D + offsets, mask=wanted, other=0.0)


@triton.jit
def down_kernel(
    down_ptr, weights_ptr, hidden_ptr, y_ptr, partial_ptr, counter_ptr,
    num_tokens,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over union rows of hidden[t, row] * down[row]."""
    let_next_kernel_start(PDL)
    # The up kernel waited for the routing weights before it let this one start: they can be read at once.
    active = active_words(weights_ptr, num_tokens, E, TOKENS, LANES)
    steps: tl.constexpr = F // ROWS
    split = tl.program_id(1)
    item = split
    end = num_active(active) * steps
    stride: tl.constexpr = SPLITS
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, TOKENS)
    local_rows = tl.arange(0, ROWS)
    inside = (columns < D)[None, :]
    offsets = local_rows[:, None] * D + columns[None, :]
    hidden_at = hidden_ptr + tokens[:, None] * (E * F) + local_rows[None, :]

    tile = _tile_of_down(down_ptr, active, item, end, offsets, inside, E, D, F, ROWS, LANES)
    if DEPTH > 1:
        tile_1 = _tile_of_down(down_ptr, active, item + stride, end, offsets, inside, E, D, F, ROWS, LANES)
    if DEPTH > 2:
        tile_2 = _tile_of_down(down_ptr, active, item + 2 * stride, end, offsets, inside, E, D, F, ROWS, LANES)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    while item < end:
        hidden = tl.load(hidden_at + item * ROWS)
        current = tile
        last = _tile_of_down(down_ptr, active, item + DEPTH * stride, end, offsets, inside, E, D, F, ROWS, LANES)
        if DEPTH == 1:
            tile = last
        else:
            tile = tile_1
        if DEPTH == 2:
            tile_1 = last
        if DEPTH == 3:
            tile_1 = tile_2
            tile_2 = last
        item += stride
        acc = tl.dot(hidden, current.to(hidden.dtype), acc, input_precision="ieee")
    at = tokens[:, None] * D + columns[None, :]
    mask = (tokens < num_tokens)[:, None] & inside
    store_split(acc, split, tl.program_id(0), at, mask, y_ptr, partial_ptr, counter_ptr, TOKENS * D, SPLITS)


def ffn_over_union(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    config: UnionConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN of 1 to 64 tokens. All tensors contiguous; `pdl` needs compute capability 9.0 or newer."""
    T, (E, F, D) = x_TD.shape[0], up_proj_EFD.shape
    config = config or UnionConfig()
    tokens = max(8, triton.next_power_of_2(T))
    up_rows, down_rows, wide_rows = (min(F & -F, n) for n in (config.up_rows, config.down_rows, config.wide_rows))
    column_tiles = triton.cdiv(D, config.down_cols)
    counters = triton.next_power_of_2(column_tiles)
    hidden = torch.empty(tokens * E * F, dtype=x_TD.dtype, device=x_TD.device)
    partial = torch.empty(config.splits * tokens * D, dtype=torch.float32, device=x_TD.device)
    counter = torch.empty(counters, dtype=torch.int32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    shape = {"E": E, "D": D, "F": F, "TOKENS": tokens, "LANES": config.lanes, "PDL": pdl}
    launch = {"launch_pdl": True} if pdl else {}
    up_kernel[(min(config.up_programs * num_processors(x_TD.device), E * F // up_rows),)](
        x_TD, up_proj_EFD, *(scales or (None, None)), weights_TE, hidden, counter, T, config.wide_union,
        **shape, ROWS=up_rows, PARTS=config.up_parts,
        BLOCK_D=max(16, min(triton.next_power_of_2(D), config.up_cols) // config.up_parts), STAGES=config.up_stages,
        WIDE_ROWS=wide_rows, WIDE_BLOCK_D=config.wide_cols, WIDE_STAGES=config.wide_stages,
        SCALED=scales is not None, COUNTERS=counters, num_warps=config.up_warps, **launch,
    )  # fmt: skip
    down_kernel[(column_tiles, config.splits)](
        down_proj_EFD, weights_TE, hidden, y_TD, partial, counter, T,
        **shape, ROWS=down_rows, BLOCK_D=config.down_cols, SPLITS=config.splits, DEPTH=config.down_depth,
        num_warps=config.down_warps, **launch,
    )  # fmt: skip
    return y_TD
