"""The benchmark of the sparse FFN checks before it times, and its routing is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockffn.ops import native

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from layers import SHAPES, Chunk, Shape, routing_weights  # noqa: E402  (a script's neighbour, not a package)


@pytest.mark.parametrize("chunk", [Chunk(1, 0.15, 0.15), Chunk(8, 0.15, 0.3), Chunk(32, 0.15, 0.35), Chunk(2, 0.5, 1)])
def test_routing_has_the_share_and_the_union_that_it_promises(chunk: Chunk) -> None:
    torch.manual_seed(0)
    shape = SHAPES["1.2B"]
    weights = routing_weights(chunk, shape)
    num_active, num_union = chunk.counts(shape)
    assert (weights != 0).sum(dim=1).eq(num_active).all()
    assert weights.any(dim=0).sum() == num_union


def test_a_union_cannot_exceed_what_the_tokens_activate() -> None:
    assert Chunk(2, 0.125, 1.0).counts(Shape(64, 16, 32)) == (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")
def test_the_script_writes_table_data_and_plot(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/ops.py", "--device", "cpu", "--shapes", "0.1B", "--tokens", "1"]
    options = ["--methods", "step", "dense f32", "--rounds", "1", "--seconds", "0.001"]
    out = ["--json", str(tmp_path / "ops.json"), "--plot", str(tmp_path / "ops.png")]
    done = subprocess.run([*command, *options, *out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cpu int4 step" in done.stdout
    data = json.loads((tmp_path / "ops.json").read_text())
    assert {row["method"] for row in data["results"]} == {
        "cpu bf16 step", "cpu int8 step", "cpu int4 step", "torch dense f32",
    }  # fmt: skip
    assert all(row["times_dense_f32"] > 0 and row["percent_of_floor"] > 0 for row in data["results"])
    assert {"device", "isa", "date", "copy_bandwidth"} <= set(data["machine"])
    assert (tmp_path / "ops.png").stat().st_size > 1000
