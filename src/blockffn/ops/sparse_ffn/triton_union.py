"""Up to 64 tokens over the union of their experts: two launches, each union expert's weights read once for all tokens.

Every program finds the union itself: it reads the `[T, E]` routing weights and numbers the experts that any token
activates, so there is no compaction launch and no host synchronisation; the size of the union, which the host does not
know, chooses between narrow and wide blocks of rows. The second kernel is launched while the first
still runs (programmatic dependent launch) and has its first rows of `down` in flight before it waits for the hidden
values. A token that does not activate an expert of the union gets a hidden value of exactly 0 there. Sums run in
float32 in an order that depends only on the union: repeated calls are bit-equal.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.gpu import num_processors
from blockffn.ops.sparse_ffn.triton_parts import (
    active_words,
    let_next_kernel_start,
    num_active,
    num_active_below,
    row_of_item,
    silu,
    store_split,
    wait_for_previous_kernel,
)

MAX_TOKENS = 64
PARTS = 4  # of the columns in a step over narrow blocks, one for each warp of the up kernel
LANES = 128  # of the scan over routing weights, one for each thread of four warps


@dataclass(frozen=True)
class UnionConfig:
    """Launch shape.

    A program of the up kernel multiplies `up_rows` rows of an expert, in steps of `up_cols` columns, with
    `up_stages - 1` steps in flight; there are `up_programs` per processor. Where the union has at least `wide_blocks`
    blocks of `wide_rows` rows for each processor, it takes these, in `wide_stages` steps of `wide_cols` columns;
    `wide_rows` of 0 means never. A program of the down kernel sums every `splits`-th block of `down_rows` rows over
    `down_cols` columns; with `by_expert`, the blocks of its own range of expert numbers instead. Tokens are padded to a
    power of two of at least `min_tokens`.
    """

    up_rows: int
    up_cols: int
    up_stages: int
    up_programs: int
    down_warps: int
    splits: int
    wide_rows: int = 0
    wide_cols: int = 128
    wide_stages: int = 3
    wide_blocks: float = 0.3
    down_rows: int = 128
    down_cols: int = 64
    by_expert: bool = False
    min_tokens: int = 8


# With this, a token's sums do not depend on the up to 31 others of a call: a product's tile has 16 or 32 tokens, and
# experts that only other tokens activate add exact zeros to a split and move none to another.
INVARIANT_CONFIG = UnionConfig(16, 512, 4, 2, down_warps=4, splits=16, by_expert=True, min_tokens=16)
INVARIANT_TOKENS = 32


def choose_config(num_tokens: int, num_experts: int) -> UnionConfig:
    """What was fastest on an H100 at D 2048, F 128 and unions of 31 and 100 %, as far as it was measured.

    Few tokens need all their bytes in flight at once. More tokens need fewer re-reads of `x`, hence wide blocks, where
    these keep the processors busy: from 17 tokens a third of a block for each does, with fewer tokens a whole one. More
    experts need more programs.
    """
    many = num_experts > 64
    if num_tokens <= 8:
        return UnionConfig(16, 512, 4 if many else 5, 3 if many else 2, down_warps=4, splits=16)
    if num_tokens <= 16:
        return UnionConfig(16, 512, 4, 2, down_warps=8, splits=8, wide_rows=32, wide_stages=5, wide_blocks=1.0)
    if num_tokens <= 32:
        stages = 4 if many else 5
        return UnionConfig(16, 512, 3, 2, down_warps=8, splits=8, wide_rows=64, wide_stages=stages)
    if many:
        return UnionConfig(32, 256, 2, 2, down_warps=8, splits=8, wide_rows=64)
    return UnionConfig(32, 256, 2, 1, down_warps=8, splits=8, wide_rows=64, wide_stages=4)


@triton.jit
def _narrow_blocks(
    x_ptr, up_ptr, gate_ptr, weights_ptr, hidden_ptr, active, num_tokens,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The columns of a step are cut into `PARTS`, each summed by its own warp: one chain of products is slower."""
    columns = tl.arange(0, PARTS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    local_rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    present = tokens < num_tokens
    for item in range(tl.program_id(0), num_active(active) * (F // ROWS), tl.num_programs(0)):
        row = row_of_item(active, item, E, F, ROWS, LANES)
        weights = tl.load(weights_ptr + tokens * E + row // F, mask=present, other=0.0)
        parts = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
        gate_parts = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
        for start in tl.range(0, D, PARTS * BLOCK_D, num_stages=STAGES):
            inside = start + columns < D
            at = (row + local_rows)[None, :, None] * D + start + columns[:, None, :]
            tile = tl.load(up_ptr + at, mask=inside[:, None, :], other=0.0)
            x = tl.load(
                x_ptr + tokens[None, None, :] * D + start + columns[:, :, None],
                mask=inside[:, :, None] & present[None, None, :], other=0.0,
            )  # fmt: skip
            parts = tl.dot(tile, x, parts, input_precision="ieee")
            if GATED:
                gate_tile = tl.load(gate_ptr + at, mask=inside[:, None, :], other=0.0)
                gate_parts = tl.dot(gate_tile, x, gate_parts, input_precision="ieee")
        at = hidden_ptr + tokens[None, :] * (E * F) + item * ROWS + local_rows[:, None]
        _store_hidden(at, tl.sum(parts, axis=0), tl.sum(gate_parts, axis=0), weights, GATED)


@triton.jit
def _wide_blocks(
    x_ptr, up_ptr, gate_ptr, weights_ptr, hidden_ptr, active, num_tokens,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One product a step, by all warps: `x` is read once for many rows."""
    local_rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    present = tokens < num_tokens
    for item in range(tl.program_id(0), num_active(active) * (F // ROWS), tl.num_programs(0)):
        row = row_of_item(active, item, E, F, ROWS, LANES)
        weights = tl.load(weights_ptr + tokens * E + row // F, mask=present, other=0.0)
        up = tl.zeros([ROWS, TOKENS], tl.float32)
        gate = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            at = (row + local_rows)[:, None] * D + columns[None, :]
            tile = tl.load(up_ptr + at, mask=inside[None, :], other=0.0)
            x = tl.load(
                x_ptr + tokens[None, :] * D + columns[:, None], mask=inside[:, None] & present[None, :], other=0.0
            )
            up = tl.dot(tile, x, up, input_precision="ieee")
            if GATED:
                gate_tile = tl.load(gate_ptr + at, mask=inside[None, :], other=0.0)
                gate = tl.dot(gate_tile, x, gate, input_precision="ieee")
        at = hidden_ptr + tokens[None, :] * (E * F) + item * ROWS + local_rows[:, None]
        _store_hidden(at, up, gate, weights, GATED)


@triton.jit
def _store_hidden(at, up, gate, weights, GATED: tl.constexpr):
    weights = weights.to(tl.float32)[None, :]
    activated = silu(gate) * up if GATED else silu(up)
    hidden = tl.where(weights != 0, activated * weights, 0.0)
    tl.store(at, hidden.to(at.dtype.element_ty))


@triton.jit
def _up_kernel(
    x_ptr, up_ptr, gate_ptr, weights_ptr, hidden_ptr, counter_ptr,
    num_tokens, wide_union,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDE_ROWS: tl.constexpr, WIDE_BLOCK_D: tl.constexpr, WIDE_STAGES: tl.constexpr,
    COUNTERS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden[t, rank * F + f] = weight[t] * silu(up[expert, f] . x[t]) over the union; 0 where inactive.

    `GATED`: silu(gate[expert, f] . x[t]) * (up[expert, f] . x[t]) instead.
    """
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    active = active_words(weights_ptr, num_tokens, E, TOKENS, LANES)
    if WIDE_ROWS > 0 and num_active(active) >= wide_union:
        _wide_blocks(
            x_ptr, up_ptr, gate_ptr, weights_ptr, hidden_ptr, active, num_tokens,
            E, D, F, TOKENS, LANES, WIDE_ROWS, WIDE_BLOCK_D, WIDE_STAGES, GATED,
        )  # fmt: skip
    else:
        _narrow_blocks(
            x_ptr, up_ptr, gate_ptr, weights_ptr, hidden_ptr, active, num_tokens,
            E, D, F, TOKENS, LANES, ROWS, PARTS, BLOCK_D, STAGES, GATED,
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
def _down_kernel(
    down_ptr, weights_ptr, hidden_ptr, y_ptr, partial_ptr, counter_ptr,
    num_tokens,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BY_EXPERT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over union rows of hidden[t, row] * down[row]."""
    let_next_kernel_start(PDL)
    # The up kernel waited for the routing weights before it let this one start: they can be read at once.
    active = active_words(weights_ptr, num_tokens, E, TOKENS, LANES)
    steps: tl.constexpr = F // ROWS
    stride: tl.constexpr = 1 if BY_EXPERT else SPLITS
    split = tl.program_id(1)
    if BY_EXPERT:
        share: tl.constexpr = (min(E, LANES) + SPLITS - 1) // SPLITS
        item = num_active_below(active, split * share, LANES) * steps
        end = num_active_below(active, (split + 1) * share, LANES) * steps
    else:
        item = split
        end = num_active(active) * steps
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, TOKENS)
    local_rows = tl.arange(0, ROWS)
    inside = (columns < D)[None, :]
    offsets = local_rows[:, None] * D + columns[None, :]
    hidden_at = hidden_ptr + tokens[:, None] * (E * F) + local_rows[None, :]

    tile = _tile_of_down(down_ptr, active, item, end, offsets, inside, E, D, F, ROWS, LANES)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    while item < end:
        hidden = tl.load(hidden_at + item * ROWS)
        current = tile
        item += stride
        tile = _tile_of_down(down_ptr, active, item, end, offsets, inside, E, D, F, ROWS, LANES)
        acc = tl.dot(hidden, current, acc, input_precision="ieee")
    at = tokens[:, None] * D + columns[None, :]
    mask = (tokens < num_tokens)[:, None] & inside
    store_split(acc, split, tl.program_id(0), at, mask, y_ptr, partial_ptr, counter_ptr, TOKENS * D, SPLITS)


def ffn_over_union(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
    config: UnionConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """The sparse FFN of 1 to 64 tokens. All tensors contiguous; `pdl` needs compute capability 9.0 or newer."""
    T, (E, F, D) = x_TD.shape[0], up_proj_EFD.shape
    assert 1 <= T <= MAX_TOKENS
    gated = gate_proj_EFD is not None
    config = fit_shared_memory(config or choose_config(T, E), x_TD, gated=gated)
    tokens, processors = max(config.min_tokens, triton.next_power_of_2(T)), num_processors(x_TD.device)
    up_rows, wide_rows, down_rows = (min(F & -F, n) for n in (config.up_rows, config.wide_rows, config.down_rows))
    if wide_rows <= up_rows:
        wide_rows = 0
    wide_union = math.ceil(config.wide_blocks * processors * wide_rows / F)
    column_tiles = triton.cdiv(D, config.down_cols)
    counters = triton.next_power_of_2(column_tiles)
    hidden = torch.empty(tokens * E * F, dtype=x_TD.dtype, device=x_TD.device)
    partial = torch.empty(config.splits * tokens * D, dtype=torch.float32, device=x_TD.device)
    counter = torch.empty(counters, dtype=torch.int32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    shape = {"E": E, "D": D, "F": F, "TOKENS": tokens, "LANES": LANES, "PDL": pdl}
    launch = {"launch_pdl": True} if pdl else {}
    _up_kernel[(min(config.up_programs * processors, E * F // up_rows),)](
        x_TD, up_proj_EFD, up_proj_EFD if gate_proj_EFD is None else gate_proj_EFD, weights_TE, hidden, counter,
        T, wide_union,
        **shape, ROWS=up_rows, PARTS=PARTS, BLOCK_D=max(16, min(triton.next_power_of_2(D), config.up_cols) // PARTS),
        STAGES=config.up_stages, WIDE_ROWS=wide_rows, WIDE_BLOCK_D=config.wide_cols, WIDE_STAGES=config.wide_stages,
        COUNTERS=counters, GATED=gated, num_warps=PARTS, **launch,
    )  # fmt: skip
    _down_kernel[(column_tiles, config.splits)](
        down_proj_EFD, weights_TE, hidden, y_TD, partial, counter, T,
        **shape, ROWS=down_rows, BLOCK_D=config.down_cols, SPLITS=config.splits,
        BY_EXPERT=config.by_expert, num_warps=config.down_warps, **launch,
    )  # fmt: skip
    return y_TD


def fit_shared_memory(config: UnionConfig, x_TD: Tensor, *, gated: bool = False) -> UnionConfig:
    """Smaller blocks for float32 and for gates: `choose_config` fills shared memory without."""
    if gated:
        stages = min(config.wide_stages, 4)
        config = replace(config, up_cols=config.up_cols // 2, wide_cols=config.wide_cols // 2, wide_stages=stages)
    if x_TD.element_size() <= 2:
        return config
    return replace(config, up_cols=config.up_cols // 2, wide_rows=0, down_rows=32, down_cols=32)
