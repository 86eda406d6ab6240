"""Lines and tables in a terminal of 80 columns and in a file."""

from __future__ import annotations

import io
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from blockffn import cli
from blockffn.cli.output import check_file, doing, print_next, print_table, print_text
from blockffn.cli.train_draft import acceptance_table

WORDS = "words and numbers [1] of a line that no terminal of this width holds " * 3


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=80, force_terminal=terminal, color_system=None, highlight=False), file


def test_text_is_wrapped_on_a_terminal_and_one_line_in_a_file() -> None:
    for terminal in (True, False):
        shown, file = console(terminal=terminal)
        print_text(shown, WORDS.strip())
        lines = file.getvalue().splitlines()
        assert " ".join(map(str.strip, lines)) == WORDS.strip()
        assert (max(map(len, lines)) <= 80) == terminal
        assert (len(lines) == 1) != terminal


def test_a_title_may_be_wider_than_its_table() -> None:
    shown, file = console(terminal=True)
    table = Table("a", title="a title of many more letters than the table", caption="and so is this caption")
    print_table(shown, table)
    lines = file.getvalue().splitlines()
    assert lines[0] == table.title
    assert table.caption in lines


def test_what_takes_a_while_is_said_on_a_terminal_and_taken_back() -> None:
    shown, file = console(terminal=True)
    with doing(shown, "packing"):
        assert file.getvalue() == "packing …\r"
    assert file.getvalue().endswith("\r\x1b[2K")
    shown, file = console(terminal=False)
    with doing(shown, "packing"):
        pass
    assert file.getvalue() == ""


def test_an_error_is_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = f"error: /a/{'path-' * 20}folder holds no model: {WORDS}".strip()
    assert cli._fitting(text) == text
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = cli._fitting(text).splitlines()
    assert " ".join(lines) == text
    assert [len(line) > 80 for line in lines].count(True) == 1  # the path, which stays whole


def test_what_comes_next_can_be_copied_from_a_terminal_of_80_columns() -> None:
    short, long = "blockffn report runs/x", f"blockffn prepare {'own-' * 13}.jsonl --tokenizer dense --out FOLDER"
    shown, file = console(terminal=True)
    print_next(shown, short, short)
    assert file.getvalue() == f"next: {short}; {short}\n"
    shown, file = console(terminal=True)
    print_next(shown, short, long)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["next:", f"  {short}"]
    assert "\n".join(lines[2:]).replace(" \\\n    ", " ").strip() == long
    shown, file = console(terminal=False)
    print_next(shown, short, long)
    assert file.getvalue() == f"next: {short}; {long}\n"


def test_acceptance_of_a_draft_fits_80_columns() -> None:
    row = {"acceptance_length": 2.345, "acceptance_by_depth": [1.0, 0.5, 0.25, 0.125, 0.0625]}
    card = {"heldout_text": row, "decoding": {"chain": row, "tree": row, "ngram": None}}
    shown, file = console(terminal=True)
    print_table(shown, acceptance_table(card))
    lines = [line for line in file.getvalue().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["greedy", "decoding,", "tree", "2.35", "100", "50", "25", "12", "6"]
    assert "n-grams" not in file.getvalue()


@pytest.mark.parametrize("command", [["bench", "decode"], ["advise"], ["convert"]])
def test_paragraphs_of_help_fill_the_terminal(command: list[str]) -> None:
    """A line that ends early is the last of its paragraph: no line break of the source is left."""
    text = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    lines = [line.strip() for line in text.split("╭─ Arguments")[0].splitlines()[2:]]
    for line, following in pairwise(lines):
        if line and following:
            assert len(f" {line} {following.split()[0]}") > 79, line


def test_checking_a_file_to_write_leaves_things_as_they_are(tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "folder" / "new.json"
    there.write_text("results")
    for path in (there, new, None):
        check_file("--json", path)
    assert there.read_text() == "results"
    assert new.parent.is_dir()
    assert not new.exists()


def test_checking_a_pipe_does_not_wait_for_its_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_file("--json", tmp_path / "pipe")
