"""Prompts of several kinds, as Spec-Bench has them, and pieces of a text to continue."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from blockffn.data.compressed import open_compressed
from blockffn.data.json_lines import read_json_lines, read_records

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
# Spec-Bench lists its multi-turn conversations by their eight topics.
_MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
TEXT = "text"  # the kind of a piece of running text


@dataclass(frozen=True)
class Prompt:
    """What to continue, and of which kind it is."""

    task: str
    text: str


@dataclass(frozen=True)
class EncodedPrompt:
    """The same in tokens."""

    task: str
    ids: tuple[int, ...]


def read_prompts(path: Path, *, tasks: Collection[str] | None = None, per_task: int | None = None) -> list[Prompt]:
    """The first turns of a file like Spec-Bench's `question.jsonl`: one object a line with `category` and `turns`.

    Args:
        tasks: kinds to keep; `None`: all. per_task: at most so many of each, evenly spaced.

    Raises:
        ValueError: a line is of another form, or nothing is left.
    """
    found: dict[str, list[Prompt]] = {}
    for where, record in read_records(path):
        category, turns = record.get("category"), record.get("turns")
        if not isinstance(category, str) or not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise ValueError(f"{where}: a prompt needs a category (text) and turns (a list of texts)")
        task = "mt_bench" if category in _MT_BENCH else category
        found.setdefault(task, []).append(Prompt(task, turns[0]))
    return _selected(found, tasks, per_task, path)


def own_prompts(*, tasks: Collection[str] | None = None, per_task: int | None = None) -> list[Prompt]:
    """The few prompts of each kind that come with the package. Arguments and errors as for `read_prompts`."""
    with as_file(files("blockffn.evaluation.decoding") / "prompts.jsonl") as path:
        return read_prompts(path, tasks=tasks, per_task=per_task)


def text_pieces(path: Path, *, count: int, characters: int = 1200) -> list[Prompt]:
    """Pieces of a text to continue, evenly spaced and begun at a word.

    Args:
        path: a text file, or `.jsonl` with a field `text`; compressed or not.

    Raises:
        ValueError: the file is not text, or too short for one piece.
    """
    if ".jsonl" in path.suffixes:
        text = "\n\n".join(text for text, _ in read_json_lines(path))
    else:
        with open_compressed(path) as stream:
            text = stream.read().decode("utf-8", errors="replace")
    if len(text) < characters:
        raise ValueError(f"{path} has {len(text)} characters; a piece to continue needs {characters}")
    count = max(1, min(count, len(text) // characters))
    step = (len(text) - characters) // count
    pieces = []
    for i in range(count):
        piece = text[i * step : i * step + characters]
        pieces.append(Prompt(TEXT, piece[piece.find(" ") + 1 :] if i else piece))
    return pieces


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_tokens: int
) -> list[EncodedPrompt]:
    """Prompts in tokens, behind the beginning-of-sequence token if there is one; long ones lose their beginning."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for prompt in prompts:
        ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        encoded.append(EncodedPrompt(prompt.task, tuple(bos + ids[max(len(ids) + len(bos) - max_tokens, 0) :])))
    return encoded


def _selected(
    found: dict[str, list[Prompt]], tasks: Collection[str] | None, per_task: int | None, path: Path
) -> list[Prompt]:
    unknown = sorted(set(tasks or ()) - set(found))
    if unknown:
        raise ValueError(f"{path} has no prompts of the kind {unknown[0]!r}; it has {', '.join(sorted(found))}")
    if per_task is not None and per_task < 1:
        raise ValueError(f"at least one prompt of each kind is needed, got {per_task}")
    chosen = []
    for task in sorted(tasks or found, key=lambda name: (TASKS.index(name) if name in TASKS else len(TASKS), name)):
        prompts = found[task]
        count = min(per_task or len(prompts), len(prompts))
        chosen += [prompts[i * len(prompts) // count] for i in range(count)]
    if not chosen:
        raise ValueError(f"{path} holds no prompts")
    return chosen
