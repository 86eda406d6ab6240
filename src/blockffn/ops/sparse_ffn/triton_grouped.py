"""Any number of tokens by grouped products over the active (token, expert) pairs, sorted by expert; both directions.

Nothing depends on the number of pairs on the host: buffers are sized for all `T * E` pairs and persistent programs take
tiles until there are none left. Three products cover both directions:

    gathered rows of [T, D] times an expert's [F, D], transposed   -> pairs [N, F]   (hidden; its gradient)
    pairs [N, F] times an expert's [F, D], added into rows of [T, D]                 (output; gradient of x)
    pairs [N, F], transposed, times gathered rows of [T, D]        -> experts [E, F, D]  (gradients of the projections)

The second adds with float32 atomics, so the last bits of its result may differ between runs. Expert `e` has the tokens
`tokens_ET[e, :num_tokens_E[e]]`, as `active_experts` lists them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.active_experts.triton import active_experts_kernels
from blockffn.ops.gpu import num_processors
from blockffn.ops.sparse_ffn.triton_parts import silu


@triton.jit
def _find_tile(counts_ptr, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a row tile (`E` when there is no such tile), its tile within the expert, and where its pairs begin."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    before = (tl.cumsum(tiles, axis=0) <= tile) & (experts < E)
    expert = tl.sum(before.to(tl.int32), axis=0)
    first_tile = tl.sum(tl.where(before, tiles, 0), axis=0)
    first_pair = tl.sum(tl.where(before, counts, 0), axis=0)
    return expert, tile - first_tile, first_pair


@triton.jit
def _num_tiles(counts_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    return tl.sum((counts + BLOCK_M - 1) // BLOCK_M, axis=0)


@triton.jit
def _gather_kernel(
    rows_ptr, proj_ptr, weights_ptr, tokens_ptr, counts_ptr, preact_ptr, hidden_ptr, dpreact_ptr, dweights_ptr,
    T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BACKWARD: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Forward: preact = up x and hidden = weight * silu(preact). Backward: down dy and, from it, both gradients."""
    for tile in range(tl.program_id(0), _num_tiles(counts_ptr, E, BLOCK_E, BLOCK_M), tl.num_programs(0)):
        expert, local_tile, first_pair = _find_tile(counts_ptr, tile, E, BLOCK_E, BLOCK_M)
        local_rows = local_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = local_rows < tl.load(counts_ptr + expert)
        tokens = tl.load(tokens_ptr + expert.to(tl.int64) * T + local_rows, mask=valid, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + tokens * E + expert, mask=valid, other=0.0).to(tl.float32)
        pairs = (first_pair + local_rows).to(tl.int64)
        dweights = tl.zeros([BLOCK_M], tl.float32)
        for first_f in tl.static_range(0, F, BLOCK_F):
            features = first_f + tl.arange(0, BLOCK_F)
            columns = tl.arange(0, BLOCK_D)
            acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
            for start in range(0, D, BLOCK_D):
                inside = start + columns < D
                a = tl.load(
                    rows_ptr + tokens[:, None] * D + start + columns[None, :],
                    mask=valid[:, None] & inside[None, :],
                    other=0.0,
                )
                b = tl.load(
                    proj_ptr + (expert.to(tl.int64) * F + features[None, :]) * D + start + columns[:, None],
                    mask=inside[:, None] & (features < F)[None, :], other=0.0,
                )  # fmt: skip
                acc = tl.dot(a, b, acc, input_precision="ieee")
            at = pairs[:, None] * F + features[None, :]
            mask = valid[:, None] & (features < F)[None, :]
            if BACKWARD:
                preact = tl.load(preact_ptr + at, mask=mask, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(preact)
                dweights += tl.sum(tl.where(mask, acc * preact * sigmoid, 0.0), axis=1)
                dpreact = acc * weights[:, None] * sigmoid * (1.0 + preact * (1.0 - sigmoid))
                tl.store(dpreact_ptr + at, dpreact.to(dpreact_ptr.dtype.element_ty), mask=mask)
            else:
                if SAVE:
                    tl.store(preact_ptr + at, acc.to(preact_ptr.dtype.element_ty), mask=mask)
                tl.store(hidden_ptr + at, (silu(acc) * weights[:, None]).to(hidden_ptr.dtype.element_ty), mask=mask)
        if BACKWARD:
            tl.store(dweights_ptr + tokens * E + expert, dweights.to(dweights_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _scatter_kernel(
    pairs_ptr, proj_ptr, tokens_ptr, counts_ptr, out_ptr,
    T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[token] += pairs[pair] @ proj[expert], in float32."""
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    num_items = _num_tiles(counts_ptr, E, BLOCK_E, BLOCK_M) * column_tiles
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        expert, local_tile, first_pair = _find_tile(counts_ptr, item // column_tiles, E, BLOCK_E, BLOCK_M)
        local_rows = local_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = local_rows < tl.load(counts_ptr + expert)
        tokens = tl.load(tokens_ptr + expert.to(tl.int64) * T + local_rows, mask=valid, other=0).to(tl.int64)
        pairs = (first_pair + local_rows).to(tl.int64)
        columns = (item % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, F, BLOCK_F):
            features = start + tl.arange(0, BLOCK_F)
            a = tl.load(
                pairs_ptr + pairs[:, None] * F + features[None, :],
                mask=valid[:, None] & (features < F)[None, :],
                other=0.0,
            )
            b = tl.load(
                proj_ptr + (expert.to(tl.int64) * F + features[:, None]) * D + columns[None, :],
                mask=(features < F)[:, None] & (columns < D)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(a, b, acc, input_precision="ieee")
        mask = valid[:, None] & (columns < D)[None, :]
        tl.atomic_add(out_ptr + tokens[:, None] * D + columns[None, :], acc, mask=mask, sem="relaxed")


@triton.jit
def _outer_kernel(
    pairs_ptr, rows_ptr, tokens_ptr, counts_ptr, out_ptr,
    T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[expert] = sum over the expert's pairs of pairs[pair]^T rows[token]; zeros for an expert without tokens."""
    expert = tl.program_id(2)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    first_pair = tl.sum(tl.where(experts < expert, counts, 0), axis=0).to(tl.int64)
    count = tl.load(counts_ptr + expert)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_M):
        local_rows = start + tl.arange(0, BLOCK_M)
        valid = local_rows < count
        tokens = tl.load(tokens_ptr + expert.to(tl.int64) * T + local_rows, mask=valid, other=0).to(tl.int64)
        a = tl.load(
            pairs_ptr + (first_pair + local_rows)[None, :] * F + features[:, None],
            mask=valid[None, :] & (features < F)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            rows_ptr + tokens[:, None] * D + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = (expert.to(tl.int64) * F + features[:, None]) * D + columns[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(features < F)[:, None] & (columns < D)[None, :])


def grouped_forward(
    x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor, *, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(y_TD, preact, hidden, num_tokens_E, tokens_ET)`; all but the first are what `grouped_backward` needs.

    `preact` and `hidden` hold a row of width F for each pair, in buffers for `T * E` pairs; `preact` only if `save`.
    """
    (T, _), (E, F, _) = x_TD.shape, up_proj_EFD.shape
    _, _, num_tokens_E, tokens_ET = active_experts_kernels(weights_TE, 0.0)
    hidden = x_TD.new_empty(T * E, F)
    preact = x_TD.new_empty(T * E if save else 0, F)
    _gather(x_TD, up_proj_EFD, weights_TE, tokens_ET, num_tokens_E, preact, hidden, hidden, hidden, save=save)
    y_TD = _scatter(hidden, down_proj_EFD, tokens_ET, num_tokens_E, T).to(x_TD.dtype)
    return y_TD, preact, hidden, num_tokens_E, tokens_ET


def grouped_backward(
    dy_TD: Tensor, x_TD: Tensor, up_proj_EFD: Tensor, down_proj_EFD: Tensor, weights_TE: Tensor,
    preact: Tensor, hidden: Tensor, num_tokens_E: Tensor, tokens_ET: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `x`, `up_proj`, `down_proj` and `weights`; the last is 0 where the weight is 0."""
    dpreact, dweights_TE = torch.empty_like(hidden), torch.zeros_like(weights_TE)
    pairs = (tokens_ET, num_tokens_E)
    _gather(dy_TD, down_proj_EFD, weights_TE, *pairs, preact, hidden, dpreact, dweights_TE, backward=True)
    ddown_EFD = _outer(hidden, dy_TD, *pairs, down_proj_EFD)
    dup_EFD = _outer(dpreact, x_TD, *pairs, up_proj_EFD)
    dx_TD = _scatter(dpreact, up_proj_EFD, *pairs, x_TD.shape[0]).to(x_TD.dtype)
    return dx_TD, dup_EFD, ddown_EFD, dweights_TE


def _gather(
    rows_TD: Tensor, proj_EFD: Tensor, weights_TE: Tensor, tokens_ET: Tensor, num_tokens_E: Tensor,
    preact: Tensor, hidden: Tensor, dpreact: Tensor, dweights_TE: Tensor, *, save: bool = False, backward: bool = False,
) -> None:  # fmt: skip
    (T, _), (E, F, D) = rows_TD.shape, proj_EFD.shape
    block_m, block_f = _block_m(T), min(triton.next_power_of_2(F), 128)
    _gather_kernel[(2 * num_processors(rows_TD.device),)](
        rows_TD, proj_EFD, weights_TE, tokens_ET, num_tokens_E, preact, hidden, dpreact, dweights_TE,
        T, E=E, D=D, F=F, BLOCK_E=triton.next_power_of_2(E), BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_D=64,
        BACKWARD=backward, SAVE=save, **_pipeline(rows_TD, block_m, block_f),
    )  # fmt: skip


def _scatter(rows_NF: Tensor, proj_EFD: Tensor, tokens_ET: Tensor, num_tokens_E: Tensor, T: int) -> Tensor:
    E, F, D = proj_EFD.shape
    out = torch.zeros(T, D, dtype=torch.float32, device=proj_EFD.device)
    block_m, block_d = _block_m(T), min(triton.next_power_of_2(D), 128)
    _scatter_kernel[(2 * num_processors(out.device),)](
        rows_NF, proj_EFD, tokens_ET, num_tokens_E, out,
        T, E=E, D=D, F=F, BLOCK_E=triton.next_power_of_2(E), BLOCK_M=block_m,
        BLOCK_F=min(triton.next_power_of_2(F), 64), BLOCK_D=block_d, **_pipeline(rows_NF, block_m, block_d),
    )  # fmt: skip
    return out


def _outer(rows_NF: Tensor, rows_TD: Tensor, tokens_ET: Tensor, num_tokens_E: Tensor, like_EFD: Tensor) -> Tensor:
    E, F, D = like_EFD.shape
    out = torch.empty_like(like_EFD)
    block_f, block_d = min(triton.next_power_of_2(F), 128), min(triton.next_power_of_2(D), 128)
    _outer_kernel[(triton.cdiv(D, block_d), triton.cdiv(F, block_f), E)](
        rows_NF, rows_TD, tokens_ET, num_tokens_E, out,
        rows_TD.shape[0], E=E, D=D, F=F, BLOCK_E=triton.next_power_of_2(E), BLOCK_M=64,
        BLOCK_F=block_f, BLOCK_D=block_d, **_pipeline(rows_NF, block_f, block_d),
    )  # fmt: skip
    return out


def _block_m(num_tokens: int) -> int:
    return 128 if num_tokens > 1024 else 64


def _pipeline(operand: Tensor, rows: int, columns: int) -> dict[str, int]:
    """Warps and stages for an accumulator of `rows` x `columns`; float32 operands fill shared memory sooner."""
    return {"num_warps": 8 if rows * columns >= 128 * 128 else 4, "num_stages": 3 if operand.element_size() <= 2 else 2}
