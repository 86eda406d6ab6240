from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blockffn.training import language_model_loss as module
from blockffn.training.language_model_loss import language_model_loss


def test_it_is_the_summed_cross_entropy_of_the_next_token() -> None:
    hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 3] = -100
    logits = hidden @ head.T
    expected = sum(
        -F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b in range(2) for t in range(4) if labels[b, t + 1] >= 0
    )
    torch.testing.assert_close(language_model_loss(hidden, head, labels), expected)


def test_in_pieces_it_has_the_same_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    whole = language_model_loss(hidden, head, labels)
    expected = torch.autograd.grad(whole, [hidden, head])
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", 4 * 11 * 3)
    pieces = language_model_loss(hidden, head, labels)
    torch.testing.assert_close(pieces, whole)
    for actual, wanted in zip(torch.autograd.grad(pieces, [hidden, head]), expected):
        torch.testing.assert_close(actual, wanted)
