from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockffn.data.packing import Packing, cut_documents, pack


def test_a_hand_packed_example() -> None:
    """Rows of 8 in chunks of 2; sizes in chunks: 4 (cut), 1 (the rest), 2, 4, 1."""
    packing = pack(np.array([9, 3, 8, 2]), sequence_length=8, align=2)
    assert packing.row_starts.tolist() == [0, 1, 4, 5]
    assert packing.documents.tolist() == [0, 0, 1, 3, 2]
    assert packing.starts.tolist() == [0, 8, 0, 0, 0]
    assert packing.lengths.tolist() == [8, 1, 3, 2, 8]
    assert packing.columns.tolist() == [0, 0, 2, 6, 0]


def test_documents_are_cut_into_full_segments_and_a_rest() -> None:
    documents, starts, lengths = cut_documents(np.array([5, 10, 1, 0, 21]), 10)
    assert documents.tolist() == [0, 1, 2, 4, 4, 4]
    assert starts.tolist() == [0, 0, 0, 0, 10, 20]
    assert lengths.tolist() == [5, 10, 1, 10, 10, 1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), max_size=60),
    shape=st.sampled_from([(16, 1), (16, 4), (16, 16), (12, 3), (64, 8), (1, 1)]),
)
def test_every_token_is_once_in_a_row_and_segments_are_aligned(lengths: list[int], shape: tuple[int, int]) -> None:
    sequence_length, align = shape
    packing = pack(np.array(lengths, dtype=np.int64), sequence_length=sequence_length, align=align)
    seen = [set[int]() for _ in lengths]
    for row in range(packing.num_rows):
        end = 0
        for s in range(packing.row_starts[row], packing.row_starts[row + 1]):
            assert packing.columns[s] == end, "segments follow each other without gaps but for alignment"
            assert packing.columns[s] % align == 0
            tokens = set(range(packing.starts[s], packing.starts[s] + packing.lengths[s]))
            assert tokens
            assert not seen[packing.documents[s]] & tokens
            seen[packing.documents[s]] |= tokens
            end = packing.columns[s] + -(-packing.lengths[s] // align) * align
        assert 0 < end <= sequence_length
    assert [sorted(tokens) for tokens in seen] == [list(range(length)) for length in lengths]


def documents(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 3000, count)


def fill(packing: Packing, sequence_length: int) -> float:
    return packing.lengths.sum() / (packing.num_rows * sequence_length)


def test_rows_are_nearly_full() -> None:
    assert fill(pack(documents(20_000), sequence_length=512, align=1), 512) > 0.995
    assert fill(pack(documents(20_000), sequence_length=512, align=64), 512) > 0.97


def test_no_two_rows_would_fit_into_one() -> None:
    packing = pack(np.array([3, 3, 3, 3, 3, 3]), sequence_length=9, align=1)
    assert packing.num_rows == 2


def test_rows_keep_the_order_of_the_documents() -> None:
    packing = pack(documents(2000), sequence_length=512, align=64)
    firsts = packing.documents[packing.row_starts[:-1]]
    assert (np.diff(firsts) >= 0).all()


def test_packing_depends_on_the_lengths_alone() -> None:
    first, second = (pack(documents(500), sequence_length=128, align=32) for _ in range(2))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))


def test_nothing_packs_into_no_rows() -> None:
    assert pack(np.array([], dtype=np.int64), sequence_length=8, align=4).num_rows == 0


def test_a_length_that_the_chunk_length_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length 100 is not a multiple of the chunk length 64; use 64 or 128"):
        pack(np.array([5]), sequence_length=100, align=64)
    with pytest.raises(ValueError, match="sequence_length 10 is not a multiple of the chunk length 64; use 64,"):
        pack(np.array([5]), sequence_length=10, align=64)
    with pytest.raises(ValueError, match="sequence_length 8 and chunk length 0 must be positive"):
        pack(np.array([5]), sequence_length=8, align=0)
