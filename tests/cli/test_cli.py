"""The command line as a user meets it: help, mistakes, and a short run through every verb."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockffn.cli import main
from blockffn.settings import save_yaml
from blockffn.training.config import train_settings


def blockffn(*arguments: str, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "blockffn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, input=stdin, timeout=300)


VERBS = ("demo", "prepare", "train", "train-draft", "evaluate", "zero-shot", "analyze", "generate", "threshold",
         "formats", "convert", "inspect", "report", "presets", "write", "advise",
         "bench")  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = blockffn(verb, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "--preset", "nanno", "--out", "x"], "unknown size 'nanno'; did you mean 'nano'?"),
    (["train", "--method", "densse", "--out", "x"], "unknown method 'densse'; did you mean 'dense'?"),
    (["train", "--out", "x", "optimizer.lerning_rate=1"], "did you mean 'learning_rate'?"),
    (["train", "--out", "x"], "no data: give a folder that `blockffn prepare` made"),
    (["train", "--resume", "--out", "x"], "x holds no run"),
    (["train", "--out", "x", "--data", "nowhere"], "nowhere"),
    (["train", "--out", "x", "--target-sparsity", "0.8e3"], "percentage"),
    (["train", "--resume", "--out", "x", "--method", "dense"], "--method was decided when the run began"),
    (["train-draft", "--out", "x"], "no target: give the folder"),
    (["train-draft", "model", "--out", "x"], "no data: give a folder"),
    (["train-draft", "model", "--out", "x", "unrol=1"], "did you mean 'unroll'?"),
    (["train-draft", "nowhere", "--out", "x", "--data", "y"], "nowhere holds no model"),
    (["train-draft", "--resume", "--out", "x"], "x holds no run"),
    (["train-draft", "--resume", "--out", "x", "--data", "y"], "--data was decided when the run began"),
    (["train-draft", "model", "--resume", "--out", "x"], "MODEL was decided when the run began"),
    (["demo", "method=dense"], "the demo decides method itself"),
    (["evaluate", "nowhere"], "nowhere holds no model"),
    (["generate", "nowhere"], "nowhere holds no model"),
    (["generate", __file__], "it is a file; give the folder"),
    (["generate", "nowhere", "--screen-head", "int5"], "--screen-head takes int8 or int4, got 'int5'"),
    (["bench", "decode", "nowhere", "--text", "novel.txt"], "there is no novel.txt; check the path"),
    (["bench", "decode", "nowhere", "--prompts", "few.jsonl"], "there is no few.jsonl; check the path"),
    (["analyze", "nowhere"], "nowhere holds no model"),
    (["inspect", "nowhere"], "nowhere holds no model"),
    (["convert", "nowhere", "--out", "x"], "nowhere holds no model"),
    (["convert", "nowhere", "--out", "x", "--quantize", "int3"], "unknown format 'int3'"),
    (["convert", "nowhere", "--out", "x", "--ffn", "int4"], "add --quantize"),
    (["convert", "nowhere", "--out", "x", "--from-dense"], "--data FOLDER"),
    (["convert", "nowhere", "--out", "x", "--from-dense", "--experts", "some"], "must be one of gated, plain, none"),
    (["convert", "nowhere", "--out", "x", "--from-dense", "--experts", "none"], "nowhere holds no model"),
    (["convert", "nowhere", "--out", "x", "--from-dense", "--quantize", "int8"], "convert its result once more"),
    (["train", "--resume", "--out", "x", "--teacher", "y"], "--teacher was decided when the run began"),
    (["write", "nowhere", "--data", "x", "--out", "y"], "nowhere holds no model"),
    (["zero-shot", "nowhere"], "no task: give --task"),
    (["zero-shot", "nowhere", "--task", "blimp"], "is not NAME=FILE"),
    (["threshold", "nowhere"], "nowhere holds no model"),
    (["threshold", "nowhere", "--thresholds", "0 few"], "must be numbers"),
    (["threshold", "nowhere", "--plot", "curve.gif"], "must end in .png or .svg"),
    (["report", "nowhere"], "nowhere"),
    (["prepare", "nowhere.txt", "--out", "x"], "nowhere.txt"),
    (["prepare", __file__, "--out", f"{__file__}/x"], f"{__file__} is there already and is no folder; choose another"),
    (["advise", "nowhere", "--text", "."], ". is a folder; name a file"),
    (["advise", "nowhere", "--text", f"{__file__}/x"], "a part of its path is a file, not a folder; check the path"),
    (["generate", "nowhere", "--json", "."], "--json . is a folder; name a file"),
    (["generate", "nowhere", "--json", f"{__file__}/x"], f"--json {__file__}/x cannot be written (file exists)"),
    (["generate", "nowhere", "--json", "x" * 300], "cannot be written (file name too long); name another file"),
    (["threshold", "nowhere", "--plot", f"{__file__}/x.png"], "x.png cannot be written (file exists)"),
    (["analyze", "nowhere", "--figures", __file__], f"--figures {__file__} cannot be made a folder (file exists)"),
    (["write", "nowhere", "--data", "x", "--out", "."], "--out . is a folder; name a file"),
    (["convert", "nowhere", "--out", "x", "--max-shard-size", "big"], "--max-shard-size big is no size"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_no_traceback(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["blockffn", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    # In this process: a new one would spend seconds on importing torch, for each of these.
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_an_empty_corpus_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"text\x00\xff\xfe" * 100)
    for name in ("empty.txt", "binary.txt"):
        done = blockffn("prepare", name, "--out", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert name in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def mistake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that a user got wrong."""
    monkeypatch.setattr(sys, "argv", ["blockffn", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capfd.readouterr().err


def test_a_prompt_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input, which is closed" in mistake(monkeypatch, capfd, "generate", "nowhere", "--prompt", "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "not UTF-8 text" in mistake(monkeypatch, capfd, "generate", "nowhere", "--prompt", "-")


def test_a_misspelt_setting_does_not_cost_an_earlier_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blockffn").mkdir()
    for name in ("demo.json", "blockffn/report.html"):
        (tmp_path / name).write_text("{}")
    assert "did you mean 'steps'?" in mistake(monkeypatch, capfd, "demo", "--out", str(tmp_path), "stpes=3")
    assert (tmp_path / "blockffn" / "report.html").exists()


def test_a_run_resumed_from_elsewhere_says_which_folder_it_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_yaml(train_settings("nano", "blockffn", {"data": {"folders": {"books": 1.0}}}), tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    message = mistake(monkeypatch, capfd, "train", "--resume", "--out", str(tmp_path))
    assert f"{tmp_path} was trained on books, and there is no such folder from here" in message


def test_a_report_where_a_file_lies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    message = mistake(monkeypatch, capfd, "report", str(tmp_path), "--out", __file__)
    assert f"--out {__file__} cannot be made a folder (file exists)" in message


def test_presets_as_data(tmp_path: Path) -> None:
    assert blockffn("presets", "--json", "presets.json", cwd=tmp_path).returncode == 0
    tables = json.loads((tmp_path / "presets.json").read_text())
    sizes = {row["size"]: row for row in tables["sizes"]}
    assert sizes["1.2b"]["non_embedding_parameters"] == 1_187_830_952
    methods = {row["method"]: row for row in tables["methods"]}
    assert methods["deepseek"] == {
        "method": "deepseek", "router": "topk", "shared_experts": 2, "objectives": ["load_balancing (constant)"]
    }  # fmt: skip
    assert methods["dense"]["router"] is None


def test_show_settings_prints_them_resolved() -> None:
    done = blockffn("train", "--preset", "0.8b", "--show-settings", "steps=5")
    assert done.returncode == 0
    assert "steps: 5" in done.stdout
    assert "chunk_sparsification" in done.stdout


@pytest.mark.slow
def test_from_text_to_report(tmp_path: Path) -> None:
    """Prepare, train, stop, resume, evaluate, generate, report: each verb on what the one before left."""
    text = "\n\n".join(f"Number {i} is followed by number {i + 1}, and that by number {i + 2}." for i in range(3000))
    for i in range(20):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i}.txt").write_text(text[i * 5000 : (i + 1) * 5000])
    small = ["model.hidden_size=32", "model.head_dim=8", "model.num_experts=8", "model.moe_intermediate_size=8",
             "data.sequence_length=64", "compile=false", "batch_size=4", "log_every=2"]  # fmt: skip

    def run(*arguments: str) -> str:
        done = blockffn(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("prepare", "corpus", "--out", "data", "--vocab-size", "400", "--valid-fraction", "0.2")
    run("train", "--data", "data", "--out", "run", "--json", "train.json", *small, "steps=6")
    assert json.loads((tmp_path / "train.json").read_text())["step"] == 6
    run("train", "--resume", "--out", "run", "steps=8")
    run("evaluate", "run", "--json", "evaluation.json")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["perplexity"] > 1
    assert evaluation["bits_per_byte"] > 0
    assert 0 <= evaluation["cls"]["8"] <= evaluation["tls"] <= 100
    assert len(evaluation["layers"]) == 4
    reference = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert reference == evaluation
    sample = run("generate", "run", "--prompt", "Number 7", "-n", "12", "--json", "run/sample.json")
    assert sample.startswith("Number 7")
    assert len(json.loads((tmp_path / "run" / "sample.json").read_text())["tokens"]) > 3
    options = ["--stats", "--top-k", "9", "--min-p", "0.01", "--repetition-penalty", "1.1", "--stop", "\n"]
    done = blockffn("generate", "run", "--prompt", "Number 7", "-n", "12", *options, cwd=tmp_path)
    assert "MB read per token" in done.stderr
    assert done.stdout.count("\n") == 1
    run("report", "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) >= 4
