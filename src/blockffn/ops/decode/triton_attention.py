"""Attention of a decode step: rotation, writing to the cache, and attending over its valid rows, in two launches.

The committed rows of the cache are cut into splits of whole blocks, as many as keep the processors busy; how many rows
there are is read from device memory, and splits without rows end at once. One more program takes the step's own
tokens: it rotates their keys, writes them to the cache, and attends among them as the tree says. The second launch
joins the parts. Rows of the cache are requested before the kernel that makes the queries has finished.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.decode.inputs import StepInputs
from blockffn.ops.decode.triton_linear import launch
from blockffn.ops.gpu import num_processors
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, wait_for_previous_kernel

MAX_SPLITS = 64


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, base, at, columns, mask, W: tl.constexpr):
    """Rotate-half of rows: `base` offsets of rows in `x`, `at` offsets of their positions in the tables."""
    partner = tl.where(columns < W // 2, columns + W // 2, columns - W // 2)
    x = tl.load(x_ptr + base[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + base[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return (x * cos + tl.where(columns < W // 2, -1.0, 1.0)[None, :] * other * sin).to(x_ptr.dtype.element_ty)


@triton.jit
def _attend(scores, value, largest, total, acc):
    """Add a block of rows to the running softmax."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp(largest - new_largest)
    probabilities = tl.exp(scores - new_largest[:, None])
    total = total * shrink + tl.sum(probabilities, axis=1)
    acc = tl.dot(probabilities.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return new_largest, total, acc


@triton.jit
def _attention_kernel(
    q_ptr, rotated_ptr, new_ptr, cache_ptr, cos_ptr, sin_ptr, norm_ptr,
    length_ptr, count_ptr, positions_ptr, visible_ptr,
    partial_ptr, largest_ptr, total_ptr,
    q_token, q_head, rotated_token, rotated_head, new_token, cache_row,
    scale, eps,
    T: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, P: tl.constexpr, VALUE_AT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USED_M: tl.constexpr, SPLITS: tl.constexpr, MAX_SLOTS: tl.constexpr, LATENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One key head (or all latents), one split or the step's own tokens, `BLOCK_M` pairs of token and query head.

    Grouped: keys of width W are rotated, values lie `VALUE_AT` behind them. Latent: a row is a latent of width W, which
    is key and value, and a rotated key of width P.
    """
    kv_head, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile = kv_head * tl.num_programs(2) + part
    columns, rope_columns, local_n = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_w, in_p = columns < W, rope_columns < P
    # Inputs of the step and committed rows are older than the step: no need to wait.
    length = tl.load(length_ptr).to(tl.int32)
    blocks = (length + BLOCK_N - 1) // BLOCK_N
    per_split = tl.maximum((blocks + SPLITS - 1) // SPLITS, 1)
    used = (blocks + per_split - 1) // per_split
    is_own = split == SPLITS
    if (split < used) | is_own:
        block = tl.where(is_own, 0, split * per_split)
        end = tl.where(is_own, 0, tl.minimum(block + per_split, blocks))
        limit = tl.minimum(length, end * BLOCK_N)
        cache = cache_ptr + kv_head * W
        rows = block * BLOCK_N + local_n
        wanted = (rows < limit)[:, None]
        at = cache + rows.to(tl.int64)[:, None] * cache_row
        key = tl.load(at + columns[None, :], mask=wanted & in_w[None, :], other=0.0)
        if LATENT:
            value = key
            rope_key = tl.load(at + W + rope_columns[None, :], mask=wanted & in_p[None, :], other=0.0)
        else:
            value = tl.load(at + VALUE_AT + columns[None, :], mask=wanted & in_w[None, :], other=0.0)
        let_next_kernel_start(PDL)
        wait_for_previous_kernel(PDL)

        pair = part * BLOCK_M + tl.arange(0, BLOCK_M)
        token, head = pair // GROUPS, kv_head * GROUPS + pair % GROUPS
        present = (pair < T * GROUPS)[:, None]
        token = tl.minimum(token, T - 1)
        position = tl.load(positions_ptr + token)
        if LATENT:
            q_at = q_ptr + (token * q_token + head * q_head)[:, None] + columns[None, :]
            query = tl.load(q_at, mask=present & in_w[None, :], other=0.0)
            base = token * rotated_token + head * rotated_head
            rope_query = _rotated(
                rotated_ptr, cos_ptr, sin_ptr, base, position * P, rope_columns, present & in_p[None, :], P
            )
        else:
            base = token * q_token + head * q_head
            query = _rotated(q_ptr, cos_ptr, sin_ptr, base, position * W, columns, present & in_w[None, :], W)
        largest = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)

        while block < end:
            visible = rows < limit
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            if LATENT:
                scores = tl.dot(rope_query, tl.trans(rope_key), scores, input_precision="ieee")
            current = value
            block += 1
            rows = block * BLOCK_N + local_n
            wanted = (rows < limit)[:, None]
            at = cache + rows.to(tl.int64)[:, None] * cache_row
            key = tl.load(at + columns[None, :], mask=wanted & in_w[None, :], other=0.0)
            if LATENT:
                value = key
                rope_key = tl.load(at + W + rope_columns[None, :], mask=wanted & in_p[None, :], other=0.0)
            else:
                value = tl.load(at + VALUE_AT + columns[None, :], mask=wanted & in_w[None, :], other=0.0)
            scores = tl.where(visible[None, :], scores * scale, float("-inf"))
            largest, total, acc = _attend(scores, current, largest, total, acc)

        if is_own:
            count = tl.load(count_ptr).to(tl.int32)
            sees = tl.load(visible_ptr + token)
            for start in tl.range(0, T, BLOCK_N, num_stages=1):  # more would not fit a small GPU
                own = start + local_n
                exists = own < T
                clamped = tl.minimum(own, T - 1)
                own_position = tl.load(positions_ptr + clamped)
                new = new_ptr + kv_head * W
                mask = exists[:, None] & in_w[None, :]
                new_at = new + (clamped * new_token)[:, None] + columns[None, :]
                if LATENT:
                    latent = tl.load(new_at, mask=mask, other=0.0).to(tl.float32)
                    norm = tl.load(norm_ptr + columns, mask=in_w, other=0.0).to(tl.float32)
                    dtype: tl.constexpr = new_ptr.dtype.element_ty
                    latent = latent * (1.0 / tl.sqrt_rn(tl.sum(latent * latent, axis=1) / W + eps))[:, None]
                    own_key = (latent.to(dtype).to(tl.float32) * norm[None, :]).to(dtype)
                    own_value = own_key
                    rope_mask = exists[:, None] & in_p[None, :]
                    own_rope = _rotated(
                        new_ptr + W, cos_ptr, sin_ptr, clamped * new_token, own_position * P, rope_columns, rope_mask, P
                    )
                else:
                    own_key = _rotated(new, cos_ptr, sin_ptr, clamped * new_token, own_position * W, columns, mask, W)
                    own_value = tl.load(new_at + VALUE_AT, mask=mask, other=0.0)
                scores = tl.dot(query, tl.trans(own_key), input_precision="ieee")
                if LATENT:
                    scores = tl.dot(rope_query, tl.trans(own_rope), scores, input_precision="ieee")
                if part == 0:
                    stored = (own < count)[:, None]
                    to = cache + (length + own).to(tl.int64)[:, None] * cache_row
                    tl.store(to + columns[None, :], own_key, mask=stored & in_w[None, :])
                    if LATENT:
                        tl.store(to + W + rope_columns[None, :], own_rope, mask=stored & in_p[None, :])
                    else:
                        tl.store(to + VALUE_AT + columns[None, :], own_value, mask=stored & in_w[None, :])
                seen = ((sees[:, None] >> clamped[None, :].to(tl.int64)) & 1) == 1
                scores = tl.where(seen & exists[None, :], scores * scale, float("-inf"))
                largest, total, acc = _attend(scores, own_value, largest, total, acc)

        slot = tl.where(is_own, used, split)
        # Only the first `USED_M` rows count: a product needs 16, one token with few heads has less.
        stored = tl.arange(0, BLOCK_M)
        row = (tile * MAX_SLOTS + slot) * USED_M + stored
        tl.store(partial_ptr + row[:, None] * BLOCK_W + columns[None, :], acc, mask=(stored < USED_M)[:, None])
        tl.store(largest_ptr + row, largest, mask=stored < USED_M)
        tl.store(total_ptr + row, total, mask=stored < USED_M)
    else:
        let_next_kernel_start(PDL)
        wait_for_previous_kernel(PDL)


@triton.jit
def _join_kernel(
    length_ptr, partial_ptr, largest_ptr, total_ptr, out_ptr, out_token,
    GROUPS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USED_M: tl.constexpr, SPLITS: tl.constexpr, MAX_SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mean over all parts of one token and one query head: `(token and head of the group, key head)`."""
    pair, kv_head = tl.program_id(0), tl.program_id(1)
    tile = kv_head * tl.cdiv(tl.num_programs(0), BLOCK_M) + pair // BLOCK_M
    columns, every = tl.arange(0, BLOCK_W), tl.arange(0, MAX_SLOTS)
    blocks = (tl.load(length_ptr).to(tl.int32) + BLOCK_N - 1) // BLOCK_N
    per_split = tl.maximum((blocks + SPLITS - 1) // SPLITS, 1)
    num_slots = (blocks + per_split - 1) // per_split + 1
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    at = (tile * MAX_SLOTS + every) * USED_M + pair % BLOCK_M
    there = every < num_slots
    tops = tl.load(largest_ptr + at, mask=there, other=-1e30)
    factor = tl.exp(tops - tl.max(tops, axis=0))
    total = tl.sum(tl.load(total_ptr + at, mask=there, other=0.0) * factor, axis=0)
    parts = tl.load(partial_ptr + at[:, None] * BLOCK_W + columns[None, :], mask=there[:, None], other=0.0)
    out = tl.sum(parts * factor[:, None], axis=0) / total
    out_at = out_ptr + pair // GROUPS * out_token + (kv_head * GROUPS + pair % GROUPS) * W + columns
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=columns < W)


def grouped_attention(
    qkv: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs, *, heads: int, scaling: float
) -> Tensor:
    T, W = len(qkv), cos.shape[-1]
    kv_heads = cache.shape[-1] // (2 * W)
    out = torch.empty(T, heads * W, dtype=qkv.dtype, device=qkv.device)
    _run(
        (qkv, qkv, qkv[:, heads * W :], cache, cos, sin, cos), inputs, out,
        strides=(qkv.stride(0), W, 0, 0, qkv.stride(0), cache.stride(0)),
        scaling=scaling, eps=0.0, kv_heads=kv_heads, groups=heads // kv_heads, width=W, rope=W,
        value_at=kv_heads * W, latent=False,
    )  # fmt: skip
    return out


def latent_attention(
    q_latent: Tensor,
    q: Tensor,
    latents: Tensor,
    cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    inputs: StepInputs,
    *,
    norm: Tensor,
    eps: float,
    scaling: float,
) -> Tensor:
    (H, T, R), P = q_latent.shape, cos.shape[-1]
    out = torch.empty(T, H, R, dtype=q.dtype, device=q.device)
    q_rope = q[..., -P:]
    _run(
        (q_latent, q_rope, latents, cache, cos, sin, norm), inputs, out,
        strides=(
            q_latent.stride(1), q_latent.stride(0), q_rope.stride(0), q_rope.stride(1), latents.stride(0),
            cache.stride(0),
        ),
        scaling=scaling, eps=eps, kv_heads=1, groups=H, width=R, rope=P, value_at=0, latent=True,
    )  # fmt: skip
    return out


def _run(
    tensors: tuple[Tensor, ...],
    inputs: StepInputs,
    out: Tensor,
    *,
    strides: tuple[int, ...],
    scaling: float,
    eps: float,
    kv_heads: int,
    groups: int,
    width: int,
    rope: int,
    value_at: int,
    latent: bool,
) -> None:
    T, device = len(out), out.device
    block_w, block_p = (max(16, triton.next_power_of_2(size)) for size in (width, rope))
    wide = block_w > 128 or out.element_size() > 2
    block_m = max(16, min(triton.next_power_of_2(T * groups), 32 if wide else 64))
    block_n = 32 if wide else 64
    parts = triton.cdiv(T * groups, block_m)
    tiles = kv_heads * parts
    splits = max(1, min(MAX_SPLITS, num_processors(device) // tiles))
    num_warps = 4 if block_m * block_w <= 2048 else 8
    used_m = min(block_m, triton.next_power_of_2(T * groups))
    max_slots = triton.next_power_of_2(splits + 1)
    rows = tiles * max_slots * used_m
    partial = torch.empty(rows, block_w, dtype=torch.float32, device=device)
    largest, total = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    _attention_kernel[(kv_heads, splits + 1, parts)](
        *tensors, inputs.length, inputs.count, inputs.positions, inputs.visible,
        partial, largest, total,
        *strides, scaling, eps,
        T=T, GROUPS=groups, W=width, P=rope, VALUE_AT=value_at, BLOCK_W=block_w, BLOCK_P=block_p, BLOCK_M=block_m,
        BLOCK_N=block_n, USED_M=used_m, SPLITS=splits, MAX_SLOTS=max_slots, LATENT=latent,
        num_warps=num_warps,
        **launch(out),
    )  # fmt: skip
    fitting = min(4, max_slots * block_w // 8192)  # warps that have registers for the parts; more take 1 µs on an H100
    _join_kernel[(T * groups, kv_heads)](
        inputs.length, partial, largest, total, out, out.stride(0),
        GROUPS=groups, W=width, BLOCK_W=block_w, BLOCK_M=block_m, BLOCK_N=block_n, USED_M=used_m, SPLITS=splits,
        MAX_SLOTS=max_slots, num_warps=max(1 if T == 1 else 2, fitting), **launch(out),
    )  # fmt: skip
