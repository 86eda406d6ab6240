"""Sparsity against masks made by hand and against a plain Python oracle."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from blockffn.metrics import SparsityMeter, chunk_level_sparsity, reuse_ratio, token_level_sparsity
from blockffn.routing import Routing
from tests.metrics import oracle


def weights_of(*rows: list[set[int]], num_experts: int = 4) -> torch.Tensor:
    """Weights of the given active experts, of either sign."""
    weights = torch.zeros(len(rows), len(rows[0]), num_experts)
    for b, row in enumerate(rows):
        for t, experts in enumerate(row):
            for e in experts:
                weights[b, t, e] = 0.5 if e % 2 else -0.5
    return weights


def routing(weights: torch.Tensor) -> Routing:
    return Routing(torch.zeros_like(weights), torch.zeros_like(weights), weights)


@st.composite
def packed_batches(draw) -> tuple[torch.Tensor, list[list[int]]]:
    """Weights `[B, T, E]` and rows of documents with padding before, between and after them."""
    num_rows, length = draw(st.integers(1, 3)), draw(st.integers(0, 20))
    documents = []
    for _ in range(num_rows):
        row, document = [], 0
        while len(row) < length:
            padding = draw(st.booleans())
            row += [-1 if padding else document] * draw(st.integers(1, 9))
            document += not padding
        documents.append(row[:length])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.0, 0.2, 0.7]))
    weights = torch.rand(num_rows, length, 5, generator=generator) - 0.5
    return weights * (torch.rand(weights.shape, generator=generator) < density), documents


def close(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, rel=1e-12, abs=1e-10, nan_ok=True)


def test_sparsity_of_a_row_made_by_hand():
    weights = weights_of([{0, 1}, {1}, {1, 2}, set()])
    assert token_level_sparsity(weights).item() == pytest.approx(100 * (1 - 5 / 16))
    assert chunk_level_sparsity(weights, window=2).item() == pytest.approx(100 * (1 - (2 + 2) / 8))
    assert chunk_level_sparsity(weights, window=4).item() == pytest.approx(100 * (1 - 3 / 4))
    # {0,1} keeps 1 of 2, {1} keeps all, {1,2} keeps none; the token without experts starts no pair.
    assert reuse_ratio(weights).item() == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)


def test_neither_windows_nor_pairs_hold_padding_or_two_documents():
    weights = weights_of([{0}, {0}, {0}, {1}, {1}, {1}, {2, 3}, {2, 3}])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1]])
    assert token_level_sparsity(weights, document_ids=documents).item() == pytest.approx(75)
    assert chunk_level_sparsity(weights, window=2, document_ids=documents).item() == pytest.approx(75)
    assert reuse_ratio(weights, document_ids=documents).item() == pytest.approx(100)


@given(packed_batches(), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_functions_equal_the_oracle_on_packed_rows(batch, window):
    weights, documents = batch
    sets, ids = oracle.active_sets(weights), torch.tensor(documents).view(weights.shape[:2])
    assert close(
        token_level_sparsity(weights, document_ids=ids).item(), oracle.token_level_sparsity(sets, documents, 5)
    )
    assert close(
        chunk_level_sparsity(weights, window=window, document_ids=ids).item(),
        oracle.chunk_level_sparsity(sets, documents, 5, window),
    )
    assert close(reuse_ratio(weights, document_ids=ids).item(), oracle.reuse_ratio(sets, documents))


@given(packed_batches())
@settings(max_examples=50, deadline=None)
def test_the_meter_equals_the_oracle_on_two_layers_and_two_updates(batch):
    weights, documents = batch
    layers, ids = [weights, weights.roll(1, dims=2) * (weights > 0)], torch.tensor(documents).view(weights.shape[:2])
    meter = SparsityMeter(2, 5, windows=(1, 3, 4))
    for _ in range(2):
        meter.update([routing(w) for w in layers], ids)
    report = meter.compute()
    assert report.tokens == 2 * sum(d >= 0 for row in documents for d in row)
    for layer, w in zip(report.layers, layers):
        sets = oracle.active_sets(w)
        assert close(layer.tls, oracle.token_level_sparsity(sets, documents, 5))
        assert close(layer.reuse_ratio, oracle.reuse_ratio(sets, documents))
        for window in (1, 3, 4):
            expected = oracle.chunk_level_sparsity(sets, documents, 5, window)
            assert close(layer.cls.get(window, math.nan), expected)
    doubled = [row for w in layers for row in oracle.active_sets(w)]
    assert close(report.tls, oracle.token_level_sparsity(doubled, documents * 2, 5))
    assert close(report.reuse_ratio, oracle.reuse_ratio(doubled, documents * 2))
    assert close(report.cls.get(3, math.nan), oracle.chunk_level_sparsity(doubled, documents * 2, 5, 3))


def test_expert_use_is_by_layer_and_expert_and_finds_the_dead():
    meter = SparsityMeter(2, 4)
    used, narrow = weights_of([{0, 1}, {1}, {1, 2}, {3}]), weights_of([{0}, {0}, {0}, {0}])
    meter.update([routing(used), routing(narrow)], torch.tensor([[0, 0, 0, -1]]))
    report = meter.compute()
    assert report.expert_use[0] == pytest.approx((100 / 3, 100, 100 / 3, 0))
    assert report.expert_use[1] == pytest.approx((100, 0, 0, 0))
    assert report.dead_experts == (1, 3)


def test_sources_are_told_apart_by_token_or_by_row():
    a, b = [{0}, {0}, {1}, {1}], [{0, 1, 2}, {1, 2, 3}, {0, 1, 2}, {3, 0, 2}]
    by_row, by_token = (SparsityMeter(1, 4, windows=(2,), num_sources=2) for _ in range(2))
    by_row.update([routing(weights_of(a, b))], source_ids=torch.tensor([0, 1]))
    documents, sources = torch.tensor([[0] * 4 + [1] * 4]), torch.tensor([[0] * 4 + [1] * 4])
    by_token.update([routing(weights_of(a + b))], documents, sources)
    for meter in (by_row, by_token):
        report = meter.compute(["code", "prose"])
        code, prose = report.sources["code"], report.sources["prose"]
        assert (code.tokens, prose.tokens, report.tokens) == (4, 4, 8)
        assert (code.tls, prose.tls) == pytest.approx((75, 25))
        assert (code.cls[2], prose.cls[2]) == pytest.approx((75, 0))
        assert (code.reuse_ratio, prose.reuse_ratio) == pytest.approx((100 * 2 / 3, 100 * 2 / 3))


def test_tokens_without_a_known_source_count_in_the_whole_only():
    meter = SparsityMeter(1, 4, num_sources=1)
    meter.update([routing(weights_of([{0}, {0, 1}]))], source_ids=torch.tensor([[0, -1]]))
    report = meter.compute()
    assert report.tokens == 2
    assert report.sources["0"].tokens == 1
    assert report.sources["0"].tls == pytest.approx(75)


def test_windows_that_never_fit_are_left_out():
    meter = SparsityMeter(1, 4, windows=(1, 4, 8))
    meter.update([routing(weights_of([{0}] * 6))], torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert set(meter.compute().cls) == {1}


def test_a_meter_that_saw_nothing_reports_nan_and_null():
    report = SparsityMeter(1, 2, windows=(1,)).compute()
    assert math.isnan(report.tls)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == {
        "tls": None, "cls": {}, "reuse_ratio": None, "tokens": 0, "sources": {},
        "layers": [{"tls": None, "cls": {}, "reuse_ratio": None, "tokens": 0, "dead_experts": 0,
                    "expert_use": [None, None]}],
    }  # fmt: skip


def test_the_report_is_ready_for_json_and_for_logs():
    meter = SparsityMeter(1, 4, windows=(2,), num_sources=1)
    meter.update([routing(weights_of([{0}, {0, 1}]))], source_ids=torch.tensor([0]))
    report = meter.compute(["code"])
    assert report.scalars() == pytest.approx({"tls": 62.5, "cls2": 50.0, "reuse_ratio": 100.0})
    whole = {"tls": 62.5, "cls": {"2": 50.0}, "reuse_ratio": 100.0, "tokens": 2}
    layer = {**whole, "dead_experts": 2, "expert_use": [100.0, 50.0, 0.0, 0.0]}
    assert json.loads(json.dumps(report.to_dict())) == {**whole, "layers": [layer], "sources": {"code": whole}}


@pytest.mark.parametrize("reference_counting", [False, True])
def test_updating_never_reads_a_value_back_from_the_device(reference_counting):
    with FakeTensorMode():  # raises wherever control flow or shapes depend on a tensor's values
        documents = torch.zeros(2, 16, dtype=torch.long)
        meter = SparsityMeter(1, 4, reference_counting=reference_counting, num_sources=2)
        meter.update([routing(torch.zeros(2, 16, 4))], documents, documents)
        with pytest.raises(DataDependentOutputException):
            meter.compute()


def test_reset_forgets():
    meter = SparsityMeter(1, 4)
    meter.update([routing(weights_of([{0}, {1}]))])
    meter.reset()
    assert meter.compute().tokens == 0


def test_reference_counting_by_hand():
    # Two documents of 3 and 5 tokens; one position aligns the first, two end the row.
    experts = [{0}, {1}, {2}, {3}, {0}, {0, 1}, {1}, {2}, {3}, {0, 1, 2}, {0, 1, 2}]
    documents = [0, 0, 0, -1, 1, 1, 1, 1, 1, -1, -1]
    meter = SparsityMeter(1, 4, windows=(1, 2, 4), reference_counting=True)
    meter.update([routing(weights_of(experts))], torch.tensor([documents]))
    report = meter.compute()
    # TLS counts all 11 positions; the line of windows drops each document's first token and the end of the row.
    line = [{1}, {2}, {3}, {0, 1}, {1}, {2}, {3}]
    assert report.tokens == 11
    assert report.tls == pytest.approx(100 * (1 - sum(map(len, experts)) / 44))
    assert report.cls[1] == pytest.approx(100 * (1 - sum(map(len, line)) / 28))
    assert report.cls[2] == pytest.approx(100 * (1 - (2 + 3 + 2) / 12))  # the second window spans both documents
    assert report.cls[4] == pytest.approx(100 * (1 - 4 / 4))


def test_reference_counting_joins_rows_and_leaves_the_reuse_ratio_alone():
    rows = [[{0}, {1}, {1}], [{2}, {2}, {3}]]
    honest, reference = (SparsityMeter(1, 4, windows=(4,), reference_counting=r) for r in (False, True))
    for meter in (honest, reference):
        meter.update([routing(weights_of(*rows))])
    assert honest.compute().cls == {}
    assert reference.compute().cls[4] == pytest.approx(100 * (1 - 3 / 4))
    assert reference.compute().reuse_ratio == honest.compute().reuse_ratio


def test_reference_counting_tells_sources_apart_by_a_windows_first_token():
    meter = SparsityMeter(1, 4, windows=(2,), reference_counting=True, num_sources=2)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    meter.update([routing(weights_of([{0}, {0}, {0}, {1}, {2}, {2, 3}]))], documents, documents)
    report = meter.compute()
    assert report.sources["0"].cls[2] == pytest.approx(100 * (1 - (1 + 3) / 8))
    assert report.sources["1"].cls == {}


def _count_half(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    meter = SparsityMeter(1, 4, windows=(2,))
    meter.update([routing(weights_of([[{0}, {0, 1}], [{2}, {3}]][rank]))])
    meter.all_reduce()
    report = meter.compute()
    assert report.tokens == 4
    assert report.tls == pytest.approx(100 * (1 - 5 / 16))
    assert report.cls[2] == pytest.approx(50)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_add_up(tmp_path):
    mp.spawn(_count_half, args=(str(tmp_path / "rendezvous"),), nprocs=2)


def test_wrong_input_is_an_error_that_names_it():
    meter = SparsityMeter(1, 4)
    good = routing(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="counts 1 layers, got 2 routings"):
        meter.update([good, good])
    with pytest.raises(ValueError, match=r"layer 0 has routing weights \[1, 2, 3\]; expected \[1, 2, 4\]"):
        meter.update([routing(torch.zeros(1, 2, 3))])
    with pytest.raises(ValueError, match=r"document_ids must have shape \[1, 2\], got \[1, 3\]"):
        meter.update([good], torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="make it with num_sources"):
        meter.update([good], source_ids=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"source_ids must have shape \[1, 2\] or \[1\], got \[3\]"):
        SparsityMeter(1, 4, num_sources=1).update([good], source_ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="1 sources need as many labels"):
        SparsityMeter(1, 4, num_sources=1).compute(["a", "b"])
    with pytest.raises(ValueError, match="a window must hold at least 1 position, got 0"):
        SparsityMeter(1, 4, windows=(0,))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        SparsityMeter(0, 4)
    with pytest.raises(ValueError, match=r"shape \[B, T, E\], got \[2, 4\]"):
        token_level_sparsity(torch.zeros(2, 4))
