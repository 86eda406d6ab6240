"""What the README shows works: its commands and its Python, run as they stand (on a smaller model)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockffn.data.tokenizer import train_tokenizer
from tests.models.conftest import tiny_model

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_example_runs(tmp_path: Path, code: str) -> None:
    folder = tmp_path / "runs" / "demo" / "blockffn" / "model"
    tiny_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer(["def main(): return 1"] * 50, vocab_size=300).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_commands_on_ones_own_text_run(tmp_path: Path) -> None:
    commands = next(text for language, text in BLOCKS if language == "bash" and "blockffn prepare" in text)
    assert "steps=2000" in commands
    small = "steps=2 compile=false model.num_experts=8 batch_size=2"
    commands = commands.replace("steps=2000", small).replace("--vocab-size 8192", "--vocab-size 400")
    import json
    import lzma

    sentence = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. "
    books = [json.dumps({"text": f"Chapter {i}. " + sentence * 40}) for i in range(60)]
    (tmp_path / "books.jsonl.xz").write_bytes(lzma.compress("\n".join(books).encode()))
    (tmp_path / "notes").mkdir()
    for i in range(20):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"Note {i}: " + sentence * 9)
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "nano" / "report.html").is_file()


def test_files_that_the_readme_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert not missing


def test_the_methods_page_names_files_that_exist() -> None:
    named = re.findall(r"`([a-z_]+/[a-z_/]+(?:\.py)?/?)`", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"))
    missing = [n for n in named if not (ROOT / "src" / "blockffn" / n).exists()]
    assert len(named) >= 8
    assert not missing
