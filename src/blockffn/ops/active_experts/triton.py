"""The index of active experts on the GPU, in two launches. Imported only where Triton is installed."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tokens_kernel(weights_ptr, num_tokens_ptr, tokens_ptr, threshold, T, E: tl.constexpr, BLOCK_T: tl.constexpr):
    """One program per expert lists its tokens, ascending, and fills the rest of its row with `T`."""
    expert = tl.program_id(0).to(tl.int64)
    row = tokens_ptr + expert * T
    count = 0
    for start in range(0, T, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        weights = tl.load(weights_ptr + tokens.to(tl.int64) * E + expert, mask=tokens < T, other=0.0).to(tl.float32)
        active = ((weights > threshold) | (weights < -threshold) | (weights != weights)) & (tokens < T)
        places = count + tl.cumsum(active.to(tl.int32), axis=0) - 1
        tl.store(row + places, tokens, mask=active)
        count += tl.sum(active.to(tl.int32), axis=0)
    for start in range(0, T, BLOCK_T):
        places = start + tl.arange(0, BLOCK_T)
        tl.store(row + places, tl.zeros([BLOCK_T], tl.int32) + T, mask=(places >= count) & (places < T))
    tl.store(num_tokens_ptr + expert, count)


@triton.jit
def _union_kernel(num_tokens_ptr, union_ptr, num_union_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    active = (tl.load(num_tokens_ptr + experts, mask=experts < E, other=0) > 0).to(tl.int32)
    count = tl.sum(active, axis=0)
    tl.store(union_ptr + tl.cumsum(active, axis=0) - 1, experts, mask=active != 0)
    tl.store(union_ptr + experts, tl.zeros([BLOCK_E], tl.int32) + E, mask=(experts >= count) & (experts < E))
    tl.store(num_union_ptr, count)


def active_experts_kernels(weights_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(union_E, num_union, num_tokens_E, tokens_ET)` of `ActiveExperts`; no host synchronisation."""
    weights_TE = weights_TE.contiguous()
    T, E = weights_TE.shape
    empty = lambda *shape: torch.empty(shape, dtype=torch.int32, device=weights_TE.device)  # noqa: E731
    union_E, num_union, num_tokens_E, tokens_ET = empty(E), empty(), empty(E), empty(E, T)
    block_t = min(1024, triton.next_power_of_2(max(T, 1)))
    _tokens_kernel[(E,)](weights_TE, num_tokens_E, tokens_ET, threshold, T, E=E, BLOCK_T=block_t, num_warps=4)
    _union_kernel[(1,)](num_tokens_E, union_E, num_union, E=E, BLOCK_E=triton.next_power_of_2(E), num_warps=4)
    return union_E, num_union, num_tokens_E, tokens_ET
