"""The command `blockffn`. One file per verb; heavy libraries are imported when a verb runs, not before."""

from __future__ import annotations

import inspect as inspect_object
import os
import sys

import typer

from blockffn.cli import (
    advise,
    analyze,
    bench,
    convert,
    demo,
    evaluate,
    formats,
    generate,
    inspect,
    prepare,
    presets,
    report,
    threshold,
    train,
    train_draft,
    write,
    zero_shot,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Sparse language models with differentiable ReLU routing: train, measure, generate.\n\n"
    "Start with [bold]blockffn demo[/]: it trains a small model on this machine and shows what it learnt.",
)
for verb in (
    demo, prepare, train, train_draft, evaluate, zero_shot, analyze, generate, advise, bench, threshold, formats,
    convert, inspect, report, presets, write,
):  # fmt: skip
    verb.register(app)


def _unwrap_help(commands: typer.Typer) -> None:
    """Paragraphs of help as one line each, for any terminal's width; as docstrings they keep the source's lines."""
    for command in commands.registered_commands:
        text = command.help or inspect_object.getdoc(command.callback) or ""
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _unwrap_help(group.typer_instance)


_unwrap_help(app)


def main() -> None:
    """Run the command line. What a user can get wrong is one line on stderr and exit code 2, not a traceback.

    `BLOCKFFN_DEBUG=1` in the environment shows the traceback.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bars say what takes time
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("BLOCKFFN_DEBUG"):
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Print `error` for a person; returns the exit code. Errors that are ours are raised again."""
    show = getattr(error, "show", None)  # usage errors of the command-line library know how to show themselves
    if show is not None:
        show()
        return int(getattr(error, "exit_code", 2))
    from blockffn.errors import UserFacingError

    if isinstance(error, (ValueError, OSError, UserFacingError)):
        text = _of_the_system(error) if isinstance(error, OSError) else str(error)
        print(_fitting(f"error: {' '.join(text.split())}"), file=sys.stderr)
        return 2
    raise error


def _of_the_system(error: OSError) -> str:
    """Which path the operating system refused, and what to do about it."""
    path, other = error.filename, error.filename2
    if path is None:
        return str(error) if error.strerror is None else error.strerror.lower()
    if isinstance(error, FileNotFoundError):
        return f"there is no {path}; check the path"
    if isinstance(error, FileExistsError):
        return f"{path} is there already and is no folder; choose another path"
    if isinstance(error, NotADirectoryError):
        return f"{path} cannot be there: a part of its path is a file, not a folder; check the path"
    if isinstance(error, IsADirectoryError):
        return f"{other or path} is a folder; name a file"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied; choose another path, or change who may use this one"
    return f"{path}: {(error.strerror or str(error)).lower()}"


def _fitting(text: str) -> str:
    """`text` broken between words where standard error is a terminal; names and paths stay whole."""
    if not sys.stderr.isatty():
        return text
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
