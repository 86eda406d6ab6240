"""The index of active experts: a union that is sorted, complete, and the same as a loop in Python finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockffn.ops.active_experts import ActiveExperts, active_experts


def random_weights(T: int, E: int, active_share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(T, E, generator=generator)
    return weights * (torch.rand(T, E, generator=generator) < active_share)


def check_against_loop(index: ActiveExperts, weights: Tensor, threshold: float) -> None:
    T, E = weights.shape
    active = [[t for t in range(T) if not abs(weights[t, e].item()) <= threshold] for e in range(E)]
    union = [e for e in range(E) if active[e]]
    assert index.num_union.item() == len(union)
    assert index.union_E.tolist() == union + [E] * (E - len(union))
    assert index.num_tokens_E.tolist() == [len(tokens) for tokens in active]
    assert index.tokens_ET.tolist() == [tokens + [T] * (T - len(tokens)) for tokens in active]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 17),
    share=st.floats(0, 1),
    threshold=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_index_equals_a_loop_over_tokens(T: int, E: int, share: float, threshold: float, seed: int) -> None:
    weights = random_weights(T, E, share, seed)
    check_against_loop(active_experts(weights, threshold=threshold), weights, threshold)


def test_union_of_empty_chunk_is_empty() -> None:
    index = active_experts(torch.zeros(3, 5))
    assert index.num_union.item() == 0
    assert index.union_E.tolist() == [5] * 5


def test_negative_weight_is_active() -> None:
    assert active_experts(torch.tensor([[0.0, -1.0]])).union_E.tolist() == [1, 2]


def test_nan_weight_is_active_so_that_it_is_not_hidden() -> None:
    assert active_experts(torch.tensor([[0.0, float("nan")]]), threshold=0.5).num_union.item() == 1


def test_index_is_int32() -> None:
    assert {tensor.dtype for tensor in active_experts(torch.ones(2, 3))} == {torch.int32}


def test_weights_that_are_no_float_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T, E\]"):
        active_experts(torch.ones(3))
    with pytest.raises(ValueError, match="int64"):
        active_experts(torch.ones(3, 4, dtype=torch.long))


def test_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"-0\.5"):
        active_experts(torch.ones(1, 2), threshold=-0.5)


def test_registered_op_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.blockffn.active_experts, (random_weights(4, 6, 0.5), 0.0))
