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
