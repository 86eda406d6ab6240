"""The benchmark of the sparse FFN checks before it times, and its routing is what it says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from blockffn.ops import native

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from layers import SHAPES, Chunk, Shape, roofline, routing_weights  # noqa: E402  (a script's neighbour, not a package)


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


def test_the_gpu_half_times_what_is_right_and_tells_where_auto_is_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rehearsed on the CPU, where the times are made up."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as the tests of the kernels, which may share this process
    pytest.importorskip("triton")
    import on_cuda

    monkeypatch.setitem(SHAPES, "tiny", Shape(32, 16, 16))
    for name, value in {"DEVICE": "cpu", "DTYPE": torch.float32, "GRAPH_BYTES": 1, "LEAST_LAYERS": 2}.items():
        monkeypatch.setattr(on_cuda, name, value)
    monkeypatch.setattr(on_cuda, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = itertools.cycle([4.0, 9.0, 8.0, 8.8, 9.0, 8.0])  # auto, index_select and dense, in turn
    monkeypatch.setattr(on_cuda, "graph_time", lambda run, layers, rounds: (next(times), 1.0))
    broken = {"none": on_cuda.Method(lambda layer: layer.none), "zero": on_cuda.Method(lambda layer: 0 * layer.x)}
    bench = on_cuda.Bench("tiny", on_cuda.METHODS | broken)
    chunks = [Chunk(8, 0.125, 0.31), Chunk(32, 0.5, 1.0)]
    bench.compile(chunks)
    rows = [row for chunk in chunks for row in bench.run(chunk, 1, 0.0)]
    assert [row.method for row in rows] == 2 * list(on_cuda.METHODS)
    assert rows[0].times_dense == 2.0
    assert rows[0].bytes_read == 5 * 2 * 32 * 16 * 2
    cells = on_cuda.print_crossing(rows)
    assert [(c["num_tokens"], c["union_share"], round(c["auto_ratio"], 2)) for c in cells] == [
        (8, 5 / 16, 0.5), (32, 1.0, 1.1),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "none, 8 tokens: AttributeError" in printed
    assert "zero: error 1.0e+00 is too large" in printed
    assert "0.50" in printed
    assert "1.10!" in printed


def test_the_chunks_on_a_gpu_cover_the_table_of_where_auto_pays() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")
    import on_cuda

    cells = {(chunk.num_tokens, chunk.union_share) for chunk in on_cuda.chunks()}
    assert cells >= set(itertools.product((1, 8, 16, 32, 64), (0.31, 0.6, 1.0)))
    for shape in (SHAPES["2048x64"], SHAPES["2.8B"]):
        for chunk in on_cuda.chunks():
            assert abs(chunk.counts(shape)[1] / shape.num_experts - chunk.union_share) < 0.02, chunk


def test_in_the_plot_a_kernel_has_a_marker_and_a_format_a_colour() -> None:
    names = ["cpu bf16 step", "cpu int4 step", "cpu bf16 packed", "torch dense bf16"]
    rows = [{"shape": "0.1B", "num_tokens": 8, "method": name, "bytes_read": 1e6 * i, "microseconds": 30.0 * i,
             "bandwidth": 48e9} for i, name in enumerate(names, start=1)]  # fmt: skip
    figure = roofline(rows)
    step, int4, packed, dense = figure.axes[0].lines[1:]
    assert step.get_marker() == int4.get_marker() != packed.get_marker() != dense.get_marker()
    assert step.get_color() == packed.get_color() == dense.get_color() != int4.get_color()
    assert figure.axes[0].get_title(loc="left") == "Time of a sparse FFN layer: 0.1B shape, 8 tokens at once"
    FigureCanvasAgg(figure).draw()
    [legend] = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())


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
