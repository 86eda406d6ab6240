"""Lay documents out in rows of one length, on a grid of aligned chunks. Pure functions of lengths, without tokens.

A chunk of `align` tokens never holds two documents, so windows of that length need not ask where a document ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Segments in the order of rows; row `r` holds segments `row_starts[r]` to `row_starts[r + 1]` (exclusive).

    Attributes:
        documents: `[S]` index of the segment's document.
        starts: `[S]` first token, counted from the document's first.
        lengths: `[S]` number of tokens, without padding.
        columns: `[S]` column of the row in which the segment begins; a multiple of the alignment.
        row_starts: `[R + 1]`.
    """

    documents: IntArray
    starts: IntArray
    lengths: IntArray
    columns: IntArray
    row_starts: IntArray

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


def check_alignment(sequence_length: int, align: int) -> None:
    """Raise `ValueError` unless rows are whole chunks."""
    if align < 1 or sequence_length < 1:
        raise ValueError(f"sequence_length {sequence_length} and chunk length {align} must be positive")
    if sequence_length % align:
        below = sequence_length // align * align
        choices = f"{below} or {below + align}" if below else f"{align}"
        raise ValueError(
            f"sequence_length {sequence_length} is not a multiple of the chunk length {align}; use {choices}, "
            "or another chunk length"
        )


def cut_documents(lengths: IntArray, sequence_length: int) -> tuple[IntArray, IntArray, IntArray]:
    """Cut documents into segments of at most `sequence_length` tokens, all but the last of a document full.

    Args:
        lengths: `[N]` tokens of each document.

    Returns:
        `documents`, `starts`, `lengths`, each `[S]`, as in `Packing`, in the documents' order.
    """
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    index = np.arange(len(documents), dtype=np.int64) - np.repeat(counts.cumsum() - counts, counts)
    starts = index * sequence_length
    return documents, starts, np.minimum(lengths[documents] - starts, sequence_length)


def pack(lengths: IntArray, *, sequence_length: int, align: int) -> Packing:
    """Pack documents into rows: each segment goes to the fullest open row with room for it, else to a new one.

    Every token of every document occurs once. The result depends on the arguments alone; rows are in the order of their
    first segments, so a prefix of the rows covers a prefix of the documents roughly. Time is linear in the number of
    documents (a second for a million).

    Args:
        lengths: int `[N]`, tokens of each document.
        sequence_length: tokens of a row, a multiple of `align`.
        align: every segment is padded to a multiple of this.

    Raises:
        ValueError: `sequence_length` is not a multiple of `align`.
    """
    check_alignment(sequence_length, align)
    documents, starts, segment_lengths = cut_documents(np.asarray(lengths, dtype=np.int64), sequence_length)
    chunks = -(-segment_lengths // align)
    rows = _best_fit(chunks, sequence_length // align)
    order = np.argsort(rows, kind="stable")
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    row_starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=row_starts[1:])
    before = np.concatenate([[0], chunks[order].cumsum()])
    columns = (before[:-1] - before[row_starts[rows[order]]]) * align
    return Packing(documents[order], starts[order], segment_lengths[order], columns, row_starts)


def _best_fit(sizes: IntArray, capacity: int) -> IntArray:
    """Row of each item, rows numbered by their first item. Items that fill a row never enter the loop."""
    rows = np.arange(len(sizes), dtype=np.int64)  # until the end, a row is named by its first item
    open_rows: list[deque[int]] = [deque() for _ in range(capacity)]  # by room left
    with_room = 0  # bit r is set while open_rows[r] holds a row
    partial = np.flatnonzero(sizes < capacity)
    chosen = []
    for item, size in zip(partial.tolist(), sizes[partial].tolist()):
        fitting = with_room >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].popleft()
            if not open_rows[room]:
                with_room &= ~(1 << room)
        else:
            row, room = item, capacity
        room -= size
        if room:
            open_rows[room].append(row)
            with_room |= 1 << room
        chosen.append(row)
    rows[partial] = chosen
    return np.unique(rows, return_inverse=True)[1].astype(np.int64)
