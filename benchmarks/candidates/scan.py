"""A scan over routing weights that needs no barrier: the union as one word of bits for each lane of a warp."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def active_words(weights_ptr, num_tokens, E: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr):
    """The union of up to `TOKENS` tokens: bit `c` of lane `l` is expert `LANES * c + l`.

    Returns the words, their bit counts and the running sum of these, `[LANES]` each. All loads are in flight at once.
    With 32 lanes every warp holds the whole of it and its sums need no barrier; with more, a thread loads less.
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
def nth_active(active, n, E: tl.constexpr, LANES: tl.constexpr):
    """The `n`-th active expert in the order of lanes, then of bits, int64; some expert past the last one."""
    words, counts, ranks = active
    before = ranks - counts
    found = (before <= n) & (n < ranks)
    word = tl.sum(tl.where(found, words, 0), axis=0)
    # The lane and the experts before it fit one integer: E is at most 512.
    place = tl.sum(tl.where(found, before * 1024 + tl.arange(0, LANES), 0), axis=0)
    lane, left = place % 1024, n - place // 1024
    expert = lane
    for chunk in tl.static_range((E + LANES - 1) // LANES):
        bit = (word >> chunk) & 1
        expert = tl.where((bit == 1) & (left == 0), chunk * LANES + lane, expert)
        left -= bit
    return expert.to(tl.int64)


@triton.jit
def row_of_item(active, item, E: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The first of the `ROWS` rows of an item, int64: items number the rows of the active experts."""
    steps: tl.constexpr = F // ROWS
    return nth_active(active, item // steps, E, LANES) * F + (item % steps) * ROWS
