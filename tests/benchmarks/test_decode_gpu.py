"""The benchmark of decoding on a GPU, rehearsed on the CPU: routers as sparse as asked for, bytes counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import decode_gpu


def test_routers_reach_the_share_and_neighbours_share_experts() -> None:
    model = decode_gpu.random_model("blockffn", torch.device("cpu"), torch.float32, tiny=True)
    clock = decode_gpu.Clock(torch.device("cpu"), 1, 10)
    unions = []
    for locality in (0.0, 4.0):
        decode_gpu.shift_routers(model, share=0.2, locality=locality)
        parts = decode_gpu.Bench("sparse", model, clock, 32).prepare(8)
        assert parts.active / model.config.num_experts == pytest.approx(0.2, abs=0.06)
        unions.append(parts.union)
    assert unions[1] < 0.7 * unions[0]


def test_a_dense_step_reads_every_weight_but_the_embeddings() -> None:
    model = decode_gpu.random_model("dense", torch.device("cpu"), torch.float32, tiny=True)
    clock = decode_gpu.Clock(torch.device("cpu"), 1, 10)
    parts = decode_gpu.Bench("dense", model, clock, 32).prepare(4)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.model.embed_tokens.weight.numel()
    cache = model.config.num_hidden_layers * 36 * 2 * 2 * 32
    assert parts.bytes_of()["step"] == 4 * (weights + cache)


def test_the_script_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "decode.json"
    monkeypatch.setattr(decode_gpu, "CHECKED", [("nano", "blockffn", {"num_hidden_layers": 1})])
    options = ["--device", "cpu", "--tiny", "--tokens", "1", "4", "--rounds", "1", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["decode_gpu.py", *options, "--json", str(path)])
    decode_gpu.main()
    data = json.loads(path.read_text())
    assert [(r["model"], r["engine"]) for r in data["text"]] == [
        ("sparse", "graphs"), ("dense", "graphs"), ("dense", "Hugging Face generate"),
    ]  # fmt: skip
    assert {(r["model"], r["num_tokens"]) for r in data["parts"] if r["part"] == "step"} == {
        ("sparse", 1), ("dense", 1), ("sparse", 4), ("dense", 4),
    }  # fmt: skip
    assert data["left_out"] == []
