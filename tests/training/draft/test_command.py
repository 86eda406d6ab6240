"""`blockffn train-draft` in this process: options become settings, and the card is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from blockffn.cli import app

QUICK = ["batch_size=4", "data.sequence_length=64", "data.align=8", "acceptance.prompts=1",
         "acceptance.prompt_tokens=8", "acceptance.new_tokens=8", "evaluate_rows=4", "log_every=1"]  # fmt: skip


@pytest.mark.parametrize("layout", ["ours", "published", "eagle3"])
def test_a_draft_is_converted_beside_its_target(circle: Path, target_run: Path, tmp_path: Path, layout: str) -> None:
    run, out = str(tmp_path / "draft"), tmp_path / layout
    given = ["train-draft", str(target_run), "--data", str(circle), "--out", run, "--draft-vocab", "80", "steps=1"]
    assert CliRunner().invoke(app, given + QUICK).exit_code == 0
    convert = ["convert", run, "--to", layout, "--out", str(out), "--json", str(tmp_path / "receipt.json")]
    refused = CliRunner().invoke(app, convert)
    assert "add --target" in str(refused.exception)
    done = CliRunner().invoke(app, [*convert, "--target", str(target_run)])
    assert done.exit_code == 0, done.output
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["bytes"] == (out / "model.safetensors").stat().st_size
    assert ("inexact" in receipt) == ("not the same" in done.output) == (layout == "eagle3")
    again = CliRunner().invoke(app, [*convert, "--target", str(target_run)])
    assert "exists" in str(again.exception)
    wrong = CliRunner().invoke(app, ["convert", str(target_run), "--target", run, "--out", str(tmp_path / "x")])
    assert "is for drafts" in str(wrong.exception)


def test_options_become_settings_and_a_run_goes_on(
    circle: Path,
    target_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, card = str(tmp_path / "draft"), tmp_path / "card.json"
    first = CliRunner().invoke(
        app,
        ["train-draft", str(target_run), "--data", str(circle), "--out", out, "--draft-vocab", "80", "steps=2", *QUICK],
    )
    assert first.exit_code == 0, first.output
    settings = yaml.safe_load((tmp_path / "draft" / "config.yaml").read_text())
    assert (settings["draft_vocab_size"], settings["data"]["folders"]) == (80, {str(circle): 1.0})
    again = CliRunner().invoke(app, ["train-draft", "--resume", "--out", out, "--json", str(card), "steps=3"])
    assert again.exit_code == 0, again.output
    found = json.loads(card.read_text())
    assert (found["steps"], found["draft_vocab_size"]) == (3, 80)
    for label in ("the text as it is, chain", "greedy decoding, tree", "n-grams"):
        assert label in again.output
    shown = CliRunner().invoke(app, ["inspect", out])
    assert "the 80 most frequent tokens" in shown.output
    assert f"{found['parameters']:,}" in shown.output


def test_data_on_the_command_line_leaves_the_drafts_own_row_length() -> None:
    shown = CliRunner().invoke(app, ["train-draft", "model", "--data", "books", "--show-settings"])
    assert "sequence_length: 1024" in shown.output
