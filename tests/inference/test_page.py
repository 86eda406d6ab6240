"""The examples of docs/inference.md run as they stand, one after the other; those that need CUDA are left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blockffn.data.tokenizer import train_tokenizer
from tests.models.conftest import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "nano" / "model"
    tiny_model(vocab_size=300, max_position_embeddings=256).save_pretrained(folder)
    train_tokenizer(["It was a dark and stormy night. One two"] * 50, vocab_size=300).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = [block for block in blocks if "CUDA" not in block]
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert float(shown.splitlines()[-1]) >= 1
    assert re.search(r"None [1-9]", shown)
