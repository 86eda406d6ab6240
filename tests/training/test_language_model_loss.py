from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.training import language_model_loss as module
from blockffn.training.language_model_loss import language_model_loss


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden[:, :-1] @ head.T).reshape(-1, head.shape[0])
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, 3] = labels[1, 8] = -100
    return hidden, head, labels


def test_it_is_the_summed_cross_entropy_of_the_next_token() -> None:
    hidden, head, labels = inputs()
    logits = hidden @ head.T
    expected = sum(
        -F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b in range(2) for t in range(8) if labels[b, t + 1] >= 0
    )
    torch.testing.assert_close(language_model_loss(hidden, head, labels), expected)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_value_and_gradients_are_those_of_the_plain_formula_in_pieces_of_any_size(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels = inputs()
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", 8 * 64 * rows)
    loss = language_model_loss(hidden, head, labels)
    expected = plain(hidden, head, labels)
    torch.testing.assert_close(loss, expected)
    # The caller divides and adds other terms: the gradient scales with what arrives.
    for actual, wanted in zip(
        torch.autograd.grad(loss / 3, [hidden, head]), torch.autograd.grad(expected / 3, [hidden, head])
    ):
        torch.testing.assert_close(actual, wanted)


def test_no_target_means_no_loss_and_no_gradient() -> None:
    hidden, head, labels = inputs()
    loss = language_model_loss(hidden, head, torch.full_like(labels, -100))
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, [hidden, head]))


def test_under_autocast_it_agrees_to_bfloat16_and_keeps_the_dtype_of_its_inputs() -> None:
    hidden, head, labels = inputs(torch.float32)
    expected = plain(hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_model_loss(hidden, head, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for actual, wanted in zip(torch.autograd.grad(loss, [hidden, head]), torch.autograd.grad(expected, [hidden, head])):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() / wanted.norm() < 2e-2
