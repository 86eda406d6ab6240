"""The analysis of a checkpoint, against sums written out token by token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from blockffn.data.batch import Batch
from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.analysis import analyze
from blockffn.evaluation.draft_trees import draft_tree, draft_tree_union, prefixes_of, tree_weights
from blockffn.evaluation.token_classes import CLASSES, class_of, token_classes
from blockffn.reporting.evidence import evidence_document, section_table
from tests.models.conftest import tiny_model


@pytest.fixture
def batch() -> Batch:
    """Two rows: a document of 40 tokens and padding; one document of 48. Ids below 8, so that each is frequent."""
    documents = torch.zeros(2, 48, dtype=torch.int32)
    documents[0, 40:] = -1
    ids = torch.randint(0, 8, (2, 48))
    labels = torch.where(documents >= 0, ids, -100)
    labels[:, 0] = -100
    return Batch(ids, labels, torch.arange(48).repeat(2, 1), documents, torch.zeros(2, 48, dtype=torch.int16))


CLASS_OF_ID = np.arange(61) % 3


@torch.no_grad()
def test_shares_by_class_and_norms_by_layer_are_those_of_the_tokens(batch: Batch) -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    hooks = [layer.mlp.register_forward_hook(lambda m, x, y: seen.append(y[0])) for layer in model.model.layers]
    rows = [batch.input_ids[0, :40], batch.input_ids[1]]
    active: dict[int, list[float]] = {0: [], 1: [], 2: []}
    norms: list[list[float]] = [[], []]
    weights: list[list[float]] = [[], []]
    for row in rows:
        seen.clear()
        routings = model(row[None], output_routing=True).routings
        for t, token in enumerate(row.tolist()):
            used = sum(int((r.weights[0, t] != 0).sum()) for r in routings)
            active[int(CLASS_OF_ID[token])].append(used / (2 * 6))
            for layer in range(2):
                norms[layer].append(seen[layer][0, t].norm().item())
                weights[layer].append(routings[layer].weights[0, t].norm().item())
    for hook in hooks:
        hook.remove()
    found = analyze(model, [batch], CLASS_OF_ID)
    assert found["tokens"] == 88
    by_class = {row["class"]: row for row in found["classes"]}
    for index, shares in active.items():
        assert by_class[CLASSES[index]]["tokens"] == len(shares)
        assert by_class[CLASSES[index]]["active_share"] == pytest.approx(100 * sum(shares) / len(shares))
    for layer in range(2):
        assert found["layers"][layer]["output_norm"] == pytest.approx(sum(norms[layer]) / 88, rel=1e-5)
        assert found["layers"][layer]["weight_norm"] == pytest.approx(sum(weights[layer]) / 88, rel=1e-5)
    assert not any(layer.mlp._forward_hooks for layer in model.model.layers)


def test_windows_stand_beside_routing_without_memory(batch: Batch) -> None:
    found = analyze(tiny_model(), [batch], CLASS_OF_ID)
    use = [share / 100 for layer in found["layers"] for share in layer["expert_use"]]
    row = next(row for row in found["windows"] if row["window"] == 4)
    assert row["same_tls"] == pytest.approx(100 * (found["tls"] / 100) ** 4)
    assert row["same_use"] == pytest.approx(100 * sum((1 - u) ** 4 for u in use) / len(use))
    assert row["cls"] == pytest.approx(found["cls"][4])


def test_a_dense_model_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="dense"):
        analyze(tiny_model("gqa", "dense"), [batch], CLASS_OF_ID)


@torch.no_grad()
def test_a_tree_holds_the_likeliest_paths_with_their_ancestors() -> None:
    model, prefix = tiny_model(vocab_size=9), torch.tensor([1, 2, 3])
    tree = draft_tree(model, prefix, nodes=12, depth=2, branches=9)
    probability = {}
    first = model(prefix[None]).logits[0, -1].log_softmax(-1)
    for a in range(9):
        probability[(a,)] = first[a].item()
        second = model(torch.tensor([[*prefix.tolist(), a]])).logits[0, -1].log_softmax(-1)
        probability |= {(a, b): (first[a] + second[b]).item() for b in range(9)}
    assert set(tree) == set(sorted(probability, key=lambda path: -probability[path])[:12])
    assert all(path[:-1] in tree for path in tree if len(path) > 1)

    weights = tree_weights(model, prefix, tree)
    for node in (0, 11):
        alone = model(torch.tensor([[*prefix.tolist(), *tree[node]]]), output_routing=True).routings
        for layer in range(2):
            torch.testing.assert_close(weights[layer][node], alone[layer].weights[0, -1])
    union = sum(int((layer != 0).any(dim=0).sum()) for layer in weights)
    found = draft_tree_union(model, [prefix], nodes=12, depth=2, branches=9)
    assert found["rows"][1]["union"] == pytest.approx(100 * union / (2 * 6))


def test_prefixes_are_beginnings_of_whole_documents(batch: Batch) -> None:
    assert [len(p) for p in prefixes_of(batch.document_ids, batch.input_ids, length=44)] == [44]
    assert prefixes_of(batch.document_ids, batch.input_ids, length=64) == []


@pytest.mark.parametrize(("text", "kind"), [
    ("42", "digits"), (" 7", "digits"), ("!=", "punctuation"), (" _", "punctuation"), ("\n\n", "white space"),
    ("x", "single letters"), (" the", "function words"), (" The", "function words"), (" def", "programming keywords"),
    ("return", "programming keywords"), (" London", "capitalised words"), (" house", "other word starts"),
    ("ing", "continuations"), ("Name", "continuations"), ("x2", "mixed"), ("\ufffd", "byte fragments"),
])  # fmt: skip
def test_a_tokens_text_decides_its_class(text: str, kind: str) -> None:
    assert class_of(text) == kind


def test_every_id_has_a_class() -> None:
    tokenizer = train_tokenizer(["the 1 cat"] * 9, vocab_size=270)
    classes = token_classes(tokenizer, 280)
    assert CLASSES[classes[0]] == CLASSES[classes[279]] == "special"
    assert CLASSES[classes[tokenizer.convert_tokens_to_ids("7")]] == "digits"


def test_the_document_is_plain_tables_with_their_figures(batch: Batch, tmp_path: Path) -> None:
    found = analyze(tiny_model(max_position_embeddings=128), [batch, batch], CLASS_OF_ID)
    found["draft_trees"] = {"nodes": 2, "trees": 1, "depth": 1, "rows": [{"what": "one node", "union": 9.0}]}
    document = evidence_document(found, model="runs/a", machine="m", date="2026-01-01", folder=tmp_path)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {"title", "model", "machine", "date", "sections"} <= set(document)
    for section in document["sections"]:
        assert all(len(row) == len(section["columns"]) for row in section["rows"])
        if "figure" in section:
            assert (tmp_path / section["figure"]).stat().st_size > 1000
        assert section_table(section).row_count == len(section["rows"])
    layers = document["sections"][0]
    assert layers["rows"][-1] == ["all", found["tls"], found["cls8"], found["reuse_ratio"]]
    assert len([s for s in document["sections"] if "figure" in s]) >= 5
