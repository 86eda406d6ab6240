"""Prompts are read as they are, and what cannot be read is said."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.decoding.prompts import (
    TASKS,
    Prompt,
    encode_prompts,
    own_prompts,
    read_prompts,
    text_pieces,
)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_conversations_of_all_topics_are_one_kind(tmp_path: Path) -> None:
    records = [{"category": category, "turns": [f"{category} {i}", "again"], "question_id": i}
               for i, category in enumerate(["rag", "writing", "coding", "translation", "rag", "rag"])]  # fmt: skip
    prompts = read_prompts(write(tmp_path / "q.jsonl", records))
    assert [(prompt.task, prompt.text) for prompt in prompts] == [
        ("mt_bench", "writing 1"), ("mt_bench", "coding 2"), ("translation", "translation 3"),
        ("rag", "rag 0"), ("rag", "rag 4"), ("rag", "rag 5"),
    ]  # fmt: skip


def test_so_many_of_a_kind_are_evenly_spaced(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [{"category": "qa", "turns": [str(i)]} for i in range(10)])
    assert [prompt.text for prompt in read_prompts(file, per_task=3)] == ["0", "3", "6"]
    assert len(read_prompts(file, per_task=100)) == 10


@pytest.mark.parametrize("record", [{"turns": ["a"]}, {"category": "qa"}, {"category": "qa", "turns": []},
                                    {"category": "qa", "turns": [3]}])  # fmt: skip
def test_a_line_without_kind_or_text_is_named(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q.jsonl:1: .*category"):
        read_prompts(write(tmp_path / "q.jsonl", [record]))


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [{"category": "qa", "turns": ["a"]}])
    with pytest.raises(ValueError, match="kind 'rag'; it has qa"):
        read_prompts(file, tasks=["rag"])


def test_the_package_has_prompts_of_every_kind() -> None:
    prompts = own_prompts()
    assert {prompt.task for prompt in prompts} == set(TASKS)
    assert len(own_prompts(per_task=1)) == len(TASKS)


def test_pieces_of_a_text_are_spread_over_it_and_begin_at_words(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(5000))
    file = tmp_path / "book.txt"
    file.write_text(words)
    pieces = text_pieces(file, count=3, characters=600)
    assert [piece.text.split()[0][:4] for piece in pieces] == ["word"] * 3
    assert pieces[0].text == words[:600]
    assert words.index(pieces[2].text) > len(words) // 2
    records = tmp_path / "books.jsonl.xz"
    records.write_bytes(lzma.compress(json.dumps({"text": words}).encode()))
    assert text_pieces(records, count=3, characters=600) == pieces
    with pytest.raises(ValueError, match="needs 99999"):
        text_pieces(file, count=1, characters=99999)


def test_a_long_prompt_loses_its_beginning_but_not_its_first_token() -> None:
    tokenizer = train_tokenizer(["a b c d e f g h"], vocab_size=270)
    long = encode_prompts(tokenizer, [Prompt("qa", "a b c d e f g h")], max_tokens=5)[0].ids
    whole = tokenizer("a b c d e f g h", add_special_tokens=False)["input_ids"]
    assert long == (tokenizer.bos_token_id, *whole[-4:])
    shortest = encode_prompts(tokenizer, [Prompt("qa", "a b c d e f g h")], max_tokens=1)[0].ids
    assert shortest == (tokenizer.bos_token_id,)
