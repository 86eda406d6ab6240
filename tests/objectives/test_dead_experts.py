import pytest
import torch

from blockffn.objectives import dead_experts

MARGIN = 0.1


def logits_of(*columns):
    """`[1, T, E]` from the values of each expert."""
    return torch.tensor(columns, dtype=torch.float64).T.unsqueeze(0)


def test_it_is_how_far_the_nearest_token_is_from_the_margin():
    logits = logits_of([-1.0, -0.4, -3.0], [0.02, -1.0, -1.0], [5.0, -9.0, -9.0])
    expected = ((MARGIN + 0.4) + (MARGIN - 0.02) + 0) / 3
    torch.testing.assert_close(dead_experts(logits, margin=MARGIN), torch.tensor(expected, dtype=torch.float64))


def test_only_the_nearest_token_of_an_idle_expert_receives_gradient():
    logits = logits_of([-1.0, -0.4, -3.0], [0.5, -1.0, -1.0]).requires_grad_()
    dead_experts(logits).backward()
    expected = torch.zeros_like(logits)
    expected[0, 1, 0] = -1 / 2
    torch.testing.assert_close(logits.grad, expected)


def test_padding_activates_no_expert_and_receives_no_gradient():
    logits = logits_of([-1.0, 7.0], [-2.0, 7.0]).requires_grad_()
    loss = dead_experts(logits, document_ids=torch.tensor([[0, -1]]), margin=MARGIN)
    loss.backward()
    assert loss.item() == pytest.approx(1.5 + MARGIN)
    assert (logits.grad[0, 1] == 0).all()


def test_a_row_of_padding_is_not_counted_and_its_gradient_is_finite():
    logits = torch.full((2, 3, 4), -1.0, requires_grad=True)
    loss = dead_experts(logits, document_ids=torch.tensor([[0, 0, 0], [-1, -1, -1]]), margin=MARGIN)
    loss.backward()
    assert loss.item() == pytest.approx(1 + MARGIN)
    assert (logits.grad[1] == 0).all()


def test_micro_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64) - 2
    parts = [dead_experts(part, normalizer=4) for part in logits.split(1)]
    torch.testing.assert_close(sum(parts), dead_experts(logits))


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    logits = (torch.randn(2, 5, 3, dtype=torch.float64) - 1).requires_grad_()
    assert torch.autograd.gradcheck(dead_experts, (logits,))


@pytest.mark.parametrize("shape", [(1, 0, 4), (0, 3, 4), (0, 0, 4)])
@pytest.mark.parametrize("with_documents", [False, True])
def test_without_tokens_it_is_zero(shape, with_documents):
    logits = torch.zeros(shape, requires_grad=True)
    documents = torch.zeros(shape[:2], dtype=torch.int64) if with_documents else None
    loss = dead_experts(logits, document_ids=documents)
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == 0


def test_half_precision_logits_give_a_term_in_float32():
    logits = torch.full((1, 3, 4), -1.0, dtype=torch.bfloat16)
    loss = dead_experts(logits, margin=MARGIN)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 + MARGIN, rel=1e-6)


def test_wrong_shapes_are_said():
    with pytest.raises(ValueError, match=r"\[B, T, E\]"):
        dead_experts(torch.zeros(3, 4))
