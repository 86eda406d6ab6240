"""A threshold on routing weights: honoured everywhere, measured by one command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from blockffn.cli import main
from blockffn.data.prepare import prepare
from blockffn.evaluation.formats import format_errors, stored_weights
from blockffn.evaluation.run import evaluate_run, load_run
from blockffn.evaluation.threshold import threshold_curve
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.reporting.threshold import threshold_curve as draw
from blockffn.settings import save_yaml
from blockffn.training.config import train_settings
from tests.models.conftest import tiny_model


@pytest.fixture
def model() -> BlockFFNForCausalLM:
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with its tokenizer, and the text `data` prepared with it."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("threshold")
    for i in range(40):
        (root / f"{i}.txt").write_text(f"Note {i}: it was a dark and stormy night; the rain fell in torrents. " * 8)
    prepare([str(root)], root / "data", vocab_size=300, valid_fraction=0.3)
    torch.manual_seed(0)
    tiny_model(vocab_size=300).save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(root / "data" / "tokenizer").save_pretrained(root / "model")
    return root


def test_a_threshold_is_what_zeroing_small_weights_would_be(model: BlockFFNForCausalLM) -> None:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    full = model(ids, output_routing=True).routings[0]
    model.set_threshold(0.9)
    cut = model(ids, output_routing=True).routings[0]
    kept = full.weights.abs() > 0.9
    assert 0 < kept.sum() < (full.weights != 0).sum()
    assert torch.equal(cut.weights, torch.where(kept, full.weights, 0))
    assert torch.equal(cut.shares, full.shares)
    model.set_threshold(0.0)
    assert torch.equal(model(ids, output_routing=True).routings[0].weights, full.weights)


def test_a_threshold_is_saved_with_the_model(model: BlockFFNForCausalLM, tmp_path: Path) -> None:
    model.set_threshold(0.5)
    model.save_pretrained(tmp_path)
    again = BlockFFNForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert again.config.routing_threshold == 0.5
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_wrong_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        tiny_model().set_threshold(-1.0)
    with pytest.raises(ValueError, match="dense model"):
        tiny_model("gqa", "dense").set_threshold(0.1)


def test_the_curve_holds_what_evaluation_says(folder: Path) -> None:
    points = threshold_curve(folder / "model", [1.5, 0.0], data=folder / "data", sequence_length=32, device="cpu")
    assert [p.threshold for p in points] == [0.0, 1.5]
    for point in points:
        alone = evaluate_run(
            folder / "model", data=folder / "data", sequence_length=32, threshold=point.threshold, device="cpu"
        )
        assert point.heldout_loss == pytest.approx(alone.heldout_loss, rel=1e-6)
        assert alone.sparsity is not None
        assert point.tls == alone.sparsity.tls
    parameters = load_run(folder / "model", device="cpu")[0].named_parameters()
    every_expert = 2 * sum(p.numel() for name, p in parameters if "routed_experts" in name)
    assert points[0].ffn_bytes == pytest.approx(every_expert * (1 - points[0].tls / 100))
    assert points[1].tls > points[0].tls
    assert points[1].ffn_bytes < points[0].ffn_bytes
    assert points[1].ffn_microseconds > 0


@pytest.mark.slow
def test_the_commands_write_curve_picture_and_table(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "blockffn", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    path, data = str(folder / "model"), str(folder / "data")
    options = ["--thresholds", "0,1", "--json", "curve.json", "--plot", "curve.png", "--sequence-length", "32"]
    assert "perplexity" in run("threshold", path, "--data", data, *options)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert '"threshold": 1.0' in (tmp_path / "curve.json").read_text()
    run("evaluate", path, "--data", data, "--threshold", "1", "--sequence-length", "32")
    run("generate", path, "--prompt", "a", "-n", "3", "--threshold", "1")
    assert "int4" in run("formats", path, "--format", "int4")


def test_the_figure_shows_every_threshold() -> None:
    figure = draw(
        [3.0, 3.1, 3.6], thresholds=[0, 0.1, 0.4], bytes_read=[10.0, 8.0, 4.0], microseconds=[20.0, 18.0, 11.0],
        sparsity=[60.0, 68.0, 84.0],
    )  # fmt: skip
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"0", "0.1", "0.4", "time", "bytes", "TLS"} <= set(texts)
    assert list(figure.axes[0].lines[0].get_xdata()) == [100.0, 80.0, 40.0]  # type: ignore[arg-type]


def test_experts_attention_and_head_are_quantised_and_nothing_else(model: BlockFFNForCausalLM) -> None:
    rows = {row.name: row for row in stored_weights(model, "int8")}
    assert len(rows) == sum(1 for _ in model.parameters())
    kept = {name for name, row in rows.items() if row.format == "bf16"}
    assert kept == {name for name in rows if "router" in name or "norm" in name or "embed_tokens" in name}
    assert all(0 < row.error < 0.01 for name, row in rows.items() if name not in kept)


def test_errors_grow_as_bits_shrink(model: BlockFFNForCausalLM) -> None:
    rows = format_errors(model)
    assert [row.format for row in rows] == ["f32", "bf16", "int8", "int4"]
    errors = [row.output_error for row in rows]
    assert errors == sorted(errors)
    assert errors[0] < 1e-5 < errors[1] < 0.01 < errors[3] < 0.5


def test_a_run_scored_from_elsewhere_says_which_folder_it_misses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "model", tmp_path / "run" / "model")
    settings = train_settings("nano", "blockffn", {"data": {"folders": {"books": 1.0}}})
    save_yaml(settings, tmp_path / "run" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run was trained on books, and there is no such folder from here"):
        evaluate_run(Path("run"), device="cpu")


def test_text_of_another_tokenizer_is_not_written_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("Quite another text, of other words. " * 400)
    prepare([str(tmp_path / "other.txt")], tmp_path / "data", vocab_size=280)
    options = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "own.jsonl"), "-n", "2", "--documents", "2"]
    monkeypatch.setattr(sys, "argv", ["blockffn", "write", str(folder / "model"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "prepared with another tokenizer" in capfd.readouterr().err


def test_labels_of_close_thresholds_do_not_cover_each_other() -> None:
    figure = draw(
        [5.5998, 5.5998, 5.6, 5.6005, 5.6036], thresholds=[0, 0.05, 0.1, 0.2, 0.4],
        bytes_read=[441.0, 428.0, 415.0, 391.0, 346.0], microseconds=[13.2, 13.0, 12.8, 12.7, 12.5],
        sparsity=[57.9, 98.6, 60.4, 62.7, 96.0],
    )  # fmt: skip
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
