"""What the Triton kernels share: activation, routing, dependent launch, the scan over weights, the split reduction."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def relu_rmsnorm(logits, norm, eps, threshold, E: tl.constexpr):
    """`norm * RMSNorm(ReLU(logits))`, 0 up to the threshold; what is not a number stays so, and spreads past `E`."""
    activated = tl.where(logits <= 0, 0.0, logits)
    weights = activated * (1.0 / tl.sqrt_rn(tl.sum(activated * activated, axis=0) / E + eps)) * norm
    return tl.where(tl.abs(weights) <= threshold, 0.0, weights)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """With dependent launch, a kernel starts while the one before it drains; that one's results exist from here on."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def active_words(weights_ptr, num_tokens, E: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr):
    """The union of up to `TOKENS` tokens as bits: bit `c` of lane `l` is expert `LANES * c + l`.

    Returns the words, their bit counts and the running sum of these, `[LANES]` each. One load per token and bit, all in
    flight at once: a thread keeps its own experts, and none are exchanged until the sum. A `[tokens, experts]` tile
    with a reduction is slower (a layer of 128 experts, 8 tokens: 25 µs instead of 19).
    """
    lanes = tl.arange(0, LANES)
    words = tl.zeros([LANES], tl.int32)
    counts = tl.zeros([LANES], tl.int32)
    for chunk in tl.static_range((E + LANES - 1) // LANES):
        experts = chunk * LANES + lanes
        active = tl.zeros([LANES], tl.int32)
        for t in tl.static_range(TOKENS):
            token = tl.minimum(t, num_tokens - 1)
            weights = tl.load(weights_ptr + token * E + experts, mask=experts < E, other=0.0)
            active |= (weights != 0).to(tl.int32)
        words |= active << chunk
        counts += active
    return words, counts, tl.cumsum(counts, axis=0)


@triton.jit
def num_active(active):
    return tl.max(active[2], axis=0)


@triton.jit
def num_active_below(active, lane, LANES: tl.constexpr):
    """Active experts in the lanes below `lane`."""
    return tl.sum(tl.where(tl.arange(0, LANES) < lane, active[1], 0), axis=0)


@triton.jit
def nth_active(active, n, E: tl.constexpr, LANES: tl.constexpr):
    """The `n`-th active expert in the order of lanes, then of bits; some expert past the last one."""
    words, counts, ranks = active
    before = ranks - counts
    found = (before <= n) & (n < ranks)
    word = tl.sum(tl.where(found, words, 0), axis=0)
    # The lane and the experts before it share an integer; either is at most 512.
    place = tl.sum(tl.where(found, before * 1024 + tl.arange(0, LANES), 0), axis=0)
    lane, left = place % 1024, n - place // 1024
    expert = lane
    for chunk in tl.static_range((E + LANES - 1) // LANES):
        bit = (word >> chunk) & 1
        expert = tl.where((bit == 1) & (left == 0), chunk * LANES + lane, expert)
        left -= bit
    return expert


@triton.jit
def row_of_item(active, item, E: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The first of the `ROWS` rows of an item, int64 so that offsets do not overflow.

    Items number the blocks of rows of the active experts.
    """
    steps: tl.constexpr = F // ROWS
    return nth_active(active, item // steps, E, LANES).to(tl.int64) * F + (item % steps) * ROWS


@triton.jit
def store_split(
    acc, split, output_tile, offsets, mask, y_ptr, partial_ptr, counter_ptr, partial_size, SPLITS: tl.constexpr
):
    """Write `acc` to `y`; of several splits, the one that finishes last adds all of them in a fixed order.

    The result does not depend on which split is last. `counter_ptr[output_tile]` must be 0 before the launch.
    """
    if SPLITS == 1:
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split * partial_size + offsets, acc, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + output_tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros_like(acc)
            for s in tl.static_range(SPLITS):
                # Other processors wrote these: .cg reads them from L2, never from a stale line of L1.
                total += tl.load(partial_ptr + s * partial_size + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=mask)
