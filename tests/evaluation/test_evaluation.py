"""Held-out loss and samples, against plain loops over tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from blockffn.data.batch import Batch
from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.perplexity import evaluate
from blockffn.evaluation.run import load_run
from blockffn.evaluation.sample import generate_sample
from tests.models.conftest import tiny_model


@pytest.fixture
def batch() -> Batch:
    """Two rows of 16: documents of 7 and 5 tokens and padding; one document of 16."""
    documents = torch.full((2, 16), -1, dtype=torch.int32)
    documents[0, :7], documents[0, 7:12], documents[1] = 0, 1, 0
    ids = torch.randint(3, 61, (2, 16))
    labels = torch.where(documents >= 0, ids, -100)
    labels[0, [0, 7]] = labels[1, 0] = -100
    positions = torch.tensor([[*range(7), *range(5), *range(5, 9)], [*range(16)]])
    sources = torch.where(documents >= 0, torch.tensor([[0], [1]]), -1).to(torch.int16)
    return Batch(ids, labels, positions, documents, sources)


@torch.no_grad()
def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    log_p = model(ids[None]).logits[0].log_softmax(-1)
    return [-log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)]


@pytest.mark.parametrize("method", ["blockffn", "dense"])
def test_loss_perplexity_and_bits_are_those_of_the_tokens(batch: Batch, method: str) -> None:
    model = tiny_model("gqa", method)
    first = token_losses(model, batch.input_ids[0, :7]) + token_losses(model, batch.input_ids[0, 7:12])
    second = token_losses(model, batch.input_ids[1])
    lengths = np.arange(61) % 5
    result = evaluate(model, [batch], token_bytes=lengths, source_names=["a", "b"])
    mean = sum(first + second) / (len(first) + len(second))
    assert result.tokens == 6 + 4 + 15
    assert result.heldout_loss == pytest.approx(mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    targets = [*batch.input_ids[0, 1:7], *batch.input_ids[0, 8:12], *batch.input_ids[1, 1:]]
    num_bytes = sum(int(lengths[t]) for t in targets)
    assert result.bits_per_byte == pytest.approx(sum(first + second) / math.log(2) / num_bytes, rel=1e-5)
    assert result.sources["a"]["loss"] == pytest.approx(sum(first) / len(first), rel=1e-5)
    assert result.sources["b"]["tokens"] == 15
    assert (result.sparsity is None) == (method == "dense")


@torch.no_grad()
def test_sparsity_counts_the_documents_tokens_only(batch: Batch) -> None:
    model = tiny_model()
    active = 0
    for ids in (batch.input_ids[0, :7], batch.input_ids[0, 7:12], batch.input_ids[1]):
        active += sum(int((r.weights != 0).sum()) for r in model(ids[None], output_routing=True).routings)
    result = evaluate(model, [batch])
    assert result.sparsity is not None
    assert result.sparsity.tls == pytest.approx(100 * (1 - active / (28 * 2 * 6)))
    values = result.to_dict()
    assert len(values["layers"]) == 2
    assert set(values["cls"]) == {"1", "2", "4", "8", "16"}


def test_nothing_to_predict_is_an_error(batch: Batch) -> None:
    empty = Batch(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids, batch.document_ids,
                  batch.source_ids)  # fmt: skip
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(tiny_model(), [empty])


def test_evaluation_restores_the_training_mode(batch: Batch) -> None:
    model = tiny_model().train()
    evaluate(model, [batch])
    assert model.training


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["naïve café — ☕ numbers 1 2 3 and words, many words"] * 20, vocab_size=300)


def test_a_sample_lists_each_token_with_its_experts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=300)
    sample = generate_sample(model, tokenizer, "naïve ☕", max_new_tokens=10)
    prompt = "".join(t["text"] for t in sample["tokens"] if not t["generated"])
    assert prompt == "naïve ☕"
    generated = [t for t in sample["tokens"] if t["generated"]]
    assert 1 <= len(generated) <= 10
    assert all(0 <= t["active_experts"] <= 6 for t in generated)
    assert sample["tokens_per_second"] > 0


def test_a_sample_is_decided_by_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=300)
    texts = [generate_sample(model, tokenizer, "a", max_new_tokens=10, seed=s)["text"] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_dense_sample_has_no_experts(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = generate_sample(
        tiny_model("gqa", "dense", vocab_size=300), tokenizer, "a", max_new_tokens=4, temperature=0
    )
    assert sample["num_experts"] is None
    assert "active_experts" not in sample["tokens"][0]


def test_a_prompt_beyond_the_context_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="exceed the cache's capacity of 64; ask for at most"):
        generate_sample(tiny_model(vocab_size=300), tokenizer, "word " * 10, max_new_tokens=60)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        load_run(tmp_path, device="cpu")
