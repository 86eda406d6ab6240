"""Every pass is the draft as it will run: behind states of the target it reads its own output, token after token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.training.draft.passes import accepted_and_tried, counted_pairs, run_passes, visible_pairs
from tests.models.conftest import tiny_model

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1], [0] * 12])


def random_draft(model: BlockFFNForCausalLM) -> DraftModel:
    draft = DraftModel(model.config)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return draft


def drafted(draft: DraftModel, embeddings: Tensor, hidden: Tensor, ahead: int) -> Tensor:
    """The output behind states `[T - ahead, D]` and embeddings `[T, D]` when the last `ahead` states are its own."""
    for _ in range(ahead):
        out = draft(embeddings[None, : len(hidden)], hidden[None])[0]
        hidden = torch.cat((hidden, out[-1:]))
    return draft(embeddings[None], hidden[None])[0, -1]


@torch.no_grad()
def test_a_pass_computes_what_drafting_ahead_computes_within_each_document() -> None:
    model = tiny_model("gqa")
    draft = random_draft(model)
    embeddings, hidden = torch.randn(2, *DOCUMENTS.shape, 32).unbind()
    outputs = run_passes(draft, embeddings, hidden, DOCUMENTS, passes=3, mask_dtype=torch.float32)
    compared = 0
    for step in range(3):
        for row, pair in counted_pairs(DOCUMENTS, step).nonzero().tolist():
            begin = int((DOCUMENTS[row] == DOCUMENTS[row, pair]).nonzero()[0])
            known = hidden[row, begin : pair + 1 - step]
            expected = drafted(draft, embeddings[row, begin : pair + 1], known, step)
            torch.testing.assert_close(outputs[step, row, pair], expected, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == (4 + 3 + 10) + (3 + 2 + 9) + (2 + 1 + 8)


def test_a_pair_sees_states_of_the_target_and_then_its_own_passes() -> None:
    seen = visible_pairs(torch.zeros(1, 5, dtype=torch.int32), 2)[0, 4].view(3, 5)
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("step", [0, 1, 5])
def test_rows_that_are_too_short_teach_nothing(step: int) -> None:
    assert not counted_pairs(torch.zeros(1, 2, dtype=torch.int32), step).any()
    assert counted_pairs(torch.zeros(1, step + 3, dtype=torch.int32), step).sum() == 1


def test_padding_teaches_nothing() -> None:
    assert not counted_pairs(torch.full((1, 9), -1, dtype=torch.int32), 0).any()


def test_a_depth_is_tried_where_all_before_it_were_accepted() -> None:
    hits = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 1, 0]]]).bool()
    counted = torch.tensor([[[1, 1, 1, 1]], [[0, 1, 1, 1]]]).bool()
    accepted, tried = accepted_and_tried(hits, counted)
    assert tried.tolist() == [4, 2]  # depth 2: behind pairs 0 and 2; pair 1 missed
    assert accepted.tolist() == [3, 1]
