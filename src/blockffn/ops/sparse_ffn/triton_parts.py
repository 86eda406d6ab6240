"""What the Triton kernels share: activation, dependent launch, the scan over routing weights, the split reduction."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


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
def rank_active(weights_ptr, num_tokens, E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The union of up to `TOKENS` tokens: a mask over the experts, and for each the number of active ones up to it.

    One load per token, all in flight at once: a thread keeps its own experts, and none are exchanged until the scan.
    A `[tokens, experts]` tile with a reduction is slower (a layer of 128 experts, 8 tokens: 25 µs instead of 19).
    """
    experts = tl.arange(0, BLOCK_E)
    active = tl.zeros([BLOCK_E], tl.int32)
    for t in tl.static_range(TOKENS):
        token = tl.minimum(t, num_tokens - 1)
        weights = tl.load(weights_ptr + token * E + experts, mask=experts < E, other=0.0)
        active |= (weights != 0).to(tl.int32)
    return active, tl.cumsum(active, axis=0)


@triton.jit
def nth_active(active, ranks, n, BLOCK_E: tl.constexpr):
    """The `n`-th active expert, 0 if there is none; int64, so that offsets do not overflow."""
    found = (active != 0) & (ranks == n + 1)
    return tl.sum(tl.where(found, tl.arange(0, BLOCK_E), 0), axis=0).to(tl.int64)


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
