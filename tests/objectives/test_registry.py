"""What all objectives have in common: one calling form, invariance to the split of a batch, no graph breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from blockffn.objectives import OBJECTIVES, objective_counts, objective_terms
from blockffn.routing import Routing

DOCUMENTS = torch.tensor([
    [0] * 3 + [1] * 10 + [-1] * 3,
    [0] * 16,
    [4] * 8 + [-1] * 2 + [5] * 6,
    [-1] * 16,
])  # fmt: skip


def routing(logits: torch.Tensor) -> Routing:
    activated = F.relu(logits)
    return Routing(logits, activated / activated.sum(dim=-1, keepdim=True).clamp_min(1e-6), activated)


def random_logits(seed: int) -> torch.Tensor:
    logits = torch.randn(4, 16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] -= 5  # an expert that no token activates
    return logits


def micro_batches() -> Iterator[slice]:
    yield from (slice(0, 1), slice(1, 3), slice(3, 4))


def test_counts_of_a_packed_batch():
    counts = objective_counts(DOCUMENTS, chunk_length=4)
    assert {name: count.item() for name, count in counts.items()} == {
        "num_tokens": 13 + 16 + 14,
        "num_pairs": (2 + 9) + 15 + (7 + 5),
        # windows of 4 hold 0001, 1111, 1111, 1---; four whole ones; 4444, 4444, --55, 5555
        "num_chunks": (2 + 1 + 1 + 1) + 4 + 4,
        "num_rows": 3,
    }


def test_counts_without_a_chunk_length_leave_chunks_out():
    assert set(objective_counts(DOCUMENTS)) == {"num_tokens", "num_pairs", "num_rows"}


def test_counts_add_up_over_micro_batches():
    whole = objective_counts(DOCUMENTS, chunk_length=4)
    parts = [objective_counts(DOCUMENTS[rows], chunk_length=4) for rows in micro_batches()]
    for name, count in whole.items():
        assert count.item() == sum(part[name].item() for part in parts)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_into_micro_batches_gives_the_value_and_gradient_of_the_whole(name):
    layers = [random_logits(0), random_logits(1)]
    counts = objective_counts(DOCUMENTS, chunk_length=4)

    def value_and_gradient(slices: list[slice]) -> tuple[float, torch.Tensor]:
        leaves = [layer.clone().requires_grad_() for layer in layers]
        total = 0.0
        for rows in slices:
            terms = objective_terms(
                [routing(leaf[rows]) for leaf in leaves],
                [name],
                document_ids=DOCUMENTS[rows],
                counts=counts,
                chunk_length=4,
                num_experts_per_tok=2,
                sharpness=3.0,
            )
            terms[name].backward()
            total += terms[name].item()
        return total, torch.stack([leaf.grad for leaf in leaves])

    value, gradient = value_and_gradient([slice(0, 4)])
    split_value, split_gradient = value_and_gradient(list(micro_batches()))
    assert value != 0
    assert split_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counts_of_the_batch_itself_change_nothing(name):
    routings = [routing(random_logits(2))]
    counts = objective_counts(DOCUMENTS, chunk_length=4)
    without = objective_terms(routings, [name], document_ids=DOCUMENTS, chunk_length=4, num_experts_per_tok=2)
    given = objective_terms(
        routings, [name], document_ids=DOCUMENTS, counts=counts, chunk_length=4, num_experts_per_tok=2
    )
    torch.testing.assert_close(given[name], without[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_document_per_row_is_the_default(name):
    routings = [routing(random_logits(3))]
    whole_rows = torch.zeros(4, 16, dtype=torch.long)
    default = objective_terms(routings, [name], chunk_length=4, num_experts_per_tok=2)
    torch.testing.assert_close(
        objective_terms(routings, [name], document_ids=whole_rows, chunk_length=4, num_experts_per_tok=2), default
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_padding_gives_zero(name):
    routings = [routing(random_logits(4))]
    nothing = torch.full((4, 16), -1)
    counts = objective_counts(nothing, chunk_length=4)
    for c in (None, counts):
        assert (
            objective_terms(routings, [name], document_ids=nothing, counts=c, chunk_length=4, num_experts_per_tok=2)[
                name
            ].item()
            == 0.0
        )


def test_terms_are_means_over_layers():
    first, second = routing(random_logits(5)), routing(random_logits(6))
    for name in OBJECTIVES:
        one, two, both = (
            objective_terms(layers, [name], chunk_length=4, num_experts_per_tok=2)[name]
            for layers in ([first], [second], [first, second])
        )
        torch.testing.assert_close(both, (one + two) / 2)


def test_all_objectives_compile_into_one_graph():
    def total(logits: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        counts = objective_counts(documents, chunk_length=4)
        terms = objective_terms(
            [routing(logits)], OBJECTIVES, document_ids=documents, counts=counts, chunk_length=4, num_experts_per_tok=2
        )
        return sum(terms.values())

    eager, compiled = random_logits(7).requires_grad_(), random_logits(7).requires_grad_()
    expected = total(eager, DOCUMENTS)
    expected.backward()
    found = torch.compile(total, backend="aot_eager", fullgraph=True)(compiled, DOCUMENTS)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(ValueError, match="unknown objective 'chunk_sparsity'; did you mean 'chunk_sparsification'"):
        objective_terms([routing(random_logits(8))], ["chunk_sparsity"])


def test_a_model_without_routing_has_nothing_to_penalise():
    assert objective_terms([], []) == {}
    with pytest.raises(ValueError, match="output_routing=True"):
        objective_terms([], ["l1"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_wrong_shapes_are_errors(name):
    with pytest.raises(ValueError, match=r"shape \[B, T, E\], got \[16, 6\]"):
        objective_terms([routing(torch.zeros(16, 6))], [name], chunk_length=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"document_ids must have shape \[4, 16\] as the tokens, got \[4, 8\]"):
        objective_terms(
            [routing(random_logits(9))], [name], document_ids=DOCUMENTS[:, :8], chunk_length=4, num_experts_per_tok=2
        )


def test_counts_refuse_wrong_input():
    with pytest.raises(ValueError, match=r"shape \[B, T\], got \[16\]"):
        objective_counts(DOCUMENTS[0], chunk_length=4)
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        objective_counts(DOCUMENTS, chunk_length=0)
