"""Where results go: checked before the work, written after it; and how lines and tables fit a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 120


def check_json(path: Path | None) -> None:
    """`check_file` of `--json`."""
    check_file("--json", path)


def check_plot(path: Path | None) -> None:
    """`check_file` of `--plot`, which also says by its name what is drawn."""
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {path} must end in .png or .svg")
    check_file("--plot", path)


def check_file(option: str, path: Path | None) -> None:
    """Make the folder of a file to write and open the file, so that a wrong path fails before anything is computed.

    Raises:
        ValueError: it cannot be written. What a file holds stays, and one that was not there is not left behind.
    """
    if path is None:
        return
    if os.path.isdir(path):  # unlike a `Path`, it has an answer for names that are too long
        raise ValueError(f"{option} {path} is a folder; name a file")
    new = not os.path.exists(path)
    if not new and not os.path.isfile(path):  # a pipe, which would wait for its reader
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{option} {path} cannot be written ({reason}); name another file") from error
    if new:
        path.unlink(missing_ok=True)  # another process of the same training may have been faster


def check_folder(option: str, path: Path | None) -> None:
    """Make a folder to write into, so that a wrong path fails before anything is computed.

    Raises:
        ValueError: it cannot be made.
    """
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{option} {path} cannot be made a folder ({reason}); name another") from error


def write_json(path: Path | None, values: Any) -> None:
    """Write `values`, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def print_lines(
    console: Console, lines: Sequence[tuple[str, str]], *, left: bool = False, style: str | None = None
) -> None:
    """Print headings and texts in two columns: wrapped within the second on a terminal, one line each in a file."""
    from rich.table import Table
    from rich.text import Text

    width = 8 if left else 12
    if not console.is_terminal:
        for heading, text in lines:
            padded = heading.ljust(width) if left else heading.rjust(width)
            console.print(Text(f"{padded}  {text}"), style=style or "", soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="left" if left else "right", width=width, style="" if left else "bold")
    table.add_column(overflow="fold")
    for heading, text in lines:
        table.add_row(heading, Text(text))
    console.print(table, style=style or "")


def print_text(console: Console, text: str, *, style: str | None = None) -> None:
    """Print a text that holds no markup: wrapped at words on a terminal, one line in a file."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def print_next(console: Console, *commands: str) -> None:
    """What to enter next. A line that a terminal has no room for is broken so that it can still be copied whole."""
    line = f"next: {'; '.join(commands)}"
    if console.is_terminal and len(line) > console.width:
        line = "\n".join(["next:", *(_broken(command, console.width) for command in commands)])
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _broken(command: str, width: int) -> str:
    """A command, broken before options where its lines are longer than `width`; a single long word stays whole."""
    lines = ["  "]
    for part in command.replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(part) + len(" \\") > width and lines[-1].strip():
            lines[-1] = lines[-1].rstrip() + " \\"
            lines.append("    ")
        lines[-1] += part + " "
    return "\n".join(lines).rstrip()


@contextmanager
def doing(console: Console, text: str) -> Iterator[None]:
    """Say what takes a while, on a terminal only, and take it back at the end. The line stands still: a moving one
    would disturb what is measured meanwhile."""
    if console.is_terminal:
        console.print(f"{text} …", style="dim", end="\r", markup=False, no_wrap=True)
    try:
        yield
    finally:
        if console.is_terminal:
            console.file.write("\r\x1b[2K")
            console.file.flush()


def print_table(console: Console, table: Table) -> None:
    """Print a table between its title and its caption, which may be wider than it is."""
    if table.title:
        print_text(console, str(table.title), style="italic")
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    console.print(table)
    table.title, table.caption = title, caption
    if caption:
        print_text(console, f"{caption}\n", style="dim")


def table_console(width: int = WIDE) -> Console:
    """For tables: as wide as the terminal, and in a file as wide as it takes to cut no cell."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
