from __future__ import annotations

import torch

from blockffn.data.batch import Batch


def make_batch() -> Batch:
    """Two rows: documents of 3 and 2 tokens, then one of 1 token; both padded."""
    document_ids = torch.tensor([[0, 0, 0, -1, 1, 1], [0, -1, -1, -1, -1, -1]], dtype=torch.int32)
    input_ids = torch.arange(12).view(2, 6)
    labels = torch.tensor([[-100, 1, 2, -100, -100, 5], [-100] * 6])
    return Batch(input_ids, labels, input_ids % 4, document_ids, document_ids.to(torch.int16))


def test_target_tokens_are_those_with_a_label() -> None:
    assert make_batch().num_target_tokens == 3
    assert make_batch().rows(1, 2).num_target_tokens == 0


def test_rows_are_views_of_the_batch() -> None:
    batch = make_batch()
    part = batch.rows(1, 2)
    assert part.document_ids.tolist() == [[0, -1, -1, -1, -1, -1]]
    assert all(value.shape == (1, 6) for value in vars(part).values())
    assert part.input_ids.data_ptr() == batch.input_ids[1:].data_ptr()


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = make_batch().to("meta")
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
