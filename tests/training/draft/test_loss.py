"""The divergence through a frozen head equals the one written out, whatever the size of the pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockffn.training.draft import loss as module
from blockffn.training.draft.loss import head_divergence

S, N, D, V = 2, 7, 6, 11
IDS = torch.tensor([9, 2, 4, 0])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(S, N, D).requires_grad_(), torch.randn(N, D), torch.randn(V, D), torch.rand(S, N)


def written_out(x: Tensor, target: Tensor, head: Tensor, ids: Tensor | None) -> Tensor:
    head_of_draft = head if ids is None else head[ids]
    theirs = (target @ head_of_draft.T).log_softmax(dim=-1)
    ours = (x @ head_of_draft.T).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(ours, theirs.expand_as(ours), log_target=True, reduction="none").sum(dim=-1)


@pytest.mark.parametrize("ids", [None, IDS], ids=["all tokens", "reduced"])
@pytest.mark.parametrize("limit", [1, 1 << 20], ids=["one token a piece", "one piece"])
def test_loss_and_gradient_equal_the_ones_written_out(
    monkeypatch: pytest.MonkeyPatch, limit: int, ids: Tensor | None
) -> None:
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", limit)
    x, target, head, weights = inputs()
    loss, divergences, hits = head_divergence(x, target, head, ids, weights)
    (3 * loss).backward()
    again = x.detach().clone().requires_grad_()
    expected = written_out(again, target, head, ids)
    torch.testing.assert_close(divergences, expected)
    (3 * (expected * weights).sum()).backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(loss, (expected * weights).sum())
    chosen = (x @ (head if ids is None else head[ids]).T).argmax(dim=-1)
    assert torch.equal(hits, (chosen if ids is None else ids[chosen]) == (target @ head.T).argmax(dim=-1))


def test_a_first_choice_outside_the_reduced_vocabulary_is_no_hit() -> None:
    head = torch.eye(4)
    target = torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    ids = torch.tensor([0, 1, 3])
    _, divergences, hits = head_divergence(target[None], target, head, ids, torch.ones(1, 2))
    assert hits.tolist() == [[False, True]]
    torch.testing.assert_close(divergences, torch.zeros(1, 2))
