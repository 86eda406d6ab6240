"""From the logits of one token to the inputs of the next step, without the host."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn.ops.decode.inputs import StepInputs
from blockffn.ops.decode.triton_linear import launch
from blockffn.ops.sparse_ffn.triton_parts import let_next_kernel_start, wait_for_previous_kernel

BLOCK = 1024  # logits of a program


@triton.jit
def _ordered(logits, index):
    """int64 that order as `argmax` does: by value, what is not a number first, then the smaller index first."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    value = tl.where(logits != logits, 0x7FFFFFFF, value)
    return (value.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def _advance_kernel(
    logits_ptr, length_ptr, token_ptr, position_ptr, chosen_ptr, best_ptr, counter_ptr, V,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program finds the best of its logits; the one that finishes last finds the best of all."""
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + index, mask=index < V, other=float("-inf"))
    tl.store(best_ptr + program, tl.max(_ordered(logits, index), axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == PROGRAMS - 1:
        # Other processors wrote these: .cg reads them from L2, never from a stale line of L1.
        best = tl.max(tl.load(best_ptr + tl.arange(0, PROGRAMS), cache_modifier=".cg"), axis=0)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        length = tl.load(length_ptr)
        tl.store(chosen_ptr + length % 2, token)
        tl.store(token_ptr, token)
        tl.store(length_ptr, length + 1)
        tl.store(position_ptr, length + 1)
        tl.store(counter_ptr, 0)


def advance(logits: Tensor, inputs: StepInputs, chosen: Tensor) -> None:
    V = logits.shape[-1]
    programs = triton.next_power_of_2(triton.cdiv(V, BLOCK))
    best = torch.empty(programs, dtype=torch.int64, device=logits.device)
    _advance_kernel[(programs,)](
        logits, inputs.length, inputs.tokens, inputs.positions, chosen, best, inputs.counter, V,
        BLOCK=BLOCK, PROGRAMS=programs, num_warps=4, **launch(logits),
    )  # fmt: skip
