"""Zero-shot tasks for small models: minimal pairs (BLiMP) and prediction of a passage's last word (LAMBADA).

Both read JSON lines. BLiMP has `sentence_good`, `sentence_bad`, `UID` (the paradigm) and `field`; LAMBADA has `text`.
What precedes a text and how it is cut into context and continuation follows lm-evaluation-harness, see
`blockffn.evaluation.continuations`; a test holds the two equal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockffn.data.compressed import COMPRESSED_SUFFIXES
from blockffn.data.json_lines import read_records
from blockffn.evaluation.continuations import Scores, encode_continuations, score_continuations

Score = Callable[[list[tuple[str, str]]], Scores]
TARGET_DELIMITER = " "


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Path],
    *,
    limit: int | None = None,
    precision: str = "float32",
    batch_tokens: int | None = None,
    target_delimiter: str = TARGET_DELIMITER,
) -> dict[str, Any]:
    """Score a model on tasks: name of the task (`blimp` or `lambada`) to its file of records.

    Args:
        limit: use the first so many pairs of each paradigm, or passages.
        precision, batch_tokens: as `score_continuations`.
        target_delimiter: what lm-evaluation-harness puts before each sentence of a minimal pair; a space by default, so
            that the sentence's first token is that of a word within a text.

    Returns:
        Plain data by task; shares in percent with their standard errors.

    Raises:
        ValueError: an unknown task, or a record without a field that the task needs.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    for name in files:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    read = {name: read_task(name, path, limit=limit) for name, path in files.items()}

    def score(pairs: list[tuple[str, str]]) -> Scores:
        encoded = encode_continuations(tokenizer, pairs)
        return score_continuations(model, encoded, precision=precision, batch_tokens=batch_tokens)

    results = {}
    for name, records in read.items():
        begin = time.perf_counter()
        result = _blimp(records, score, target_delimiter) if name == "blimp" else _lambada(records, score)
        results[name] = {**result, "seconds": time.perf_counter() - begin}
    return results


TASKS: dict[str, tuple[str, ...]] = {"blimp": ("sentence_good", "sentence_bad", "UID", "field"), "lambada": ("text",)}
"""The tasks, with the fields that each needs in a record."""


def find_tasks(folder: Path) -> dict[str, Path]:
    """Task files of a folder, `blimp.jsonl` and `lambada.jsonl`, plain or compressed. Raises `ValueError` for none."""
    found = {}
    for name in TASKS:
        for suffix in ("", *COMPRESSED_SUFFIXES):
            path = folder / f"{name}.jsonl{suffix}"
            if name not in found and path.is_file():
                found[name] = path
    if not found:
        raise ValueError(f"{folder} holds no task: neither {' nor '.join(f'{n}.jsonl[.xz|.gz|.zst]' for n in TASKS)}")
    return found


def read_task(name: str, path: Path, *, limit: int | None = None) -> list[dict[str, str]]:
    """Records of a task's file, at most `limit` of each paradigm. Raises `ValueError` naming file, line and field."""
    kept: list[dict[str, str]] = []
    counts: dict[str, int] = {}
    for where, record in read_records(path):
        for field in TASKS[name]:
            if not isinstance(record.get(field), str) or not record[field].strip():
                raise ValueError(f"{where}: task {name} needs text in field {field!r}; there are {sorted(record)}")
        paradigm = record.get("UID", "")
        counts[paradigm] = counts.get(paradigm, 0) + 1
        if limit is None or counts[paradigm] <= limit:
            one = {field: record[field] for field in TASKS[name]}
            if "field" in one:
                one["field"] = one["field"].replace("/", "_")  # one of BLiMP's files spells its field differently
            kept.append(one)
    if not kept:
        raise ValueError(f"{path} holds no record")
    return kept


def last_word(text: str) -> tuple[str, str]:
    """A passage as context and last word, which begins with its space; words are what single spaces part."""
    context, _, word = text.rpartition(" ")
    return context, " " + word


def _blimp(records: Sequence[Mapping[str, str]], score: Score, delimiter: str) -> dict[str, Any]:
    pairs = [("", delimiter + record[side]) for side in ("sentence_good", "sentence_bad") for record in records]
    good, bad = score(pairs).loglikelihood.reshape(2, -1)
    correct = np.where(good == bad, 0.5, good > bad)  # a tie is a coin's throw
    fields: dict[str, list[int]] = {}
    paradigms: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        fields.setdefault(record["field"], []).append(i)
        paradigms.setdefault(record["UID"], []).append(i)
    field_of = {record["UID"]: record["field"] for record in records}
    return {
        **_accuracy(correct),
        "pairs": len(records),
        "fields": {k: {**_accuracy(correct[rows]), "pairs": len(rows)} for k, rows in sorted(fields.items())},
        "paradigms": {
            k: {"field": field_of[k], **_accuracy(correct[rows]), "pairs": len(rows)}
            for k, rows in sorted(paradigms.items())
        },
    }


def _lambada(records: Sequence[Mapping[str, str]], score: Score) -> dict[str, Any]:
    scores = score([last_word(record["text"]) for record in records])
    mean, error = _mean_and_error(-scores.loglikelihood)
    perplexity = math.exp(min(mean, 700.0))
    return {
        **_accuracy(scores.greedy.astype(float)),
        "perplexity": perplexity,
        "perplexity_stderr": None if error is None else perplexity * error,
        "passages": len(records),
    }


def _accuracy(correct: NDArray[np.float64]) -> dict[str, float | None]:
    mean, error = _mean_and_error(correct)
    return {"accuracy": 100 * mean, "accuracy_stderr": None if error is None else 100 * error}


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean, and its standard error from the sample's variance; `None` for one value."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error
