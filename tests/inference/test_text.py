from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from blockffn.data.tokenizer import train_tokenizer
from blockffn.inference.text import Detokenizer, StopStrings

TEXT = "naïve ☕ — 🙂🙂 words"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["plain words without such characters"] * 20, vocab_size=300)


def test_characters_appear_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    text = Detokenizer(tokenizer)
    pieces = [text.add(token) for token in ids]
    assert "".join(pieces) + text.finish() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🙂" in pieces


def test_bytes_that_make_no_character_are_shown_in_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    text = Detokenizer(tokenizer)
    assert [text.add(token) for token in ids] == ["a", "", "", ""]
    assert text.finish() == tokenizer.decode(ids)[1:] != ""


def test_special_tokens_have_no_text_and_a_prompt_is_not_repeated(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("plain words", add_special_tokens=False)["input_ids"]
    text = Detokenizer(tokenizer, [tokenizer.bos_token_id, *ids])
    assert "".join(text.add(token) for token in [*ids, tokenizer.eos_token_id]) == "plain words"


@pytest.mark.parametrize(("text", "stops", "shown", "found"), [
    ("one two three", ["two"], "one ", "two"),
    ("one two three", ["three", "two t"], "one ", "two t"),
    ("aab", ["ab"], "a", "ab"),
    ("abab abc", ["abc"], "abab ", "abc"),
    ("unfinished sto", ["stop"], "unfinished sto", None),
    ("nothing", [], "nothing", None),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_no_part_of_a_stop_string_is_shown(
    text: str, stops: list[str], shown: str, found: str | None, size: int
) -> None:
    watch = StopStrings(stops)
    passed = ""
    for begin in range(0, len(text), size):
        passed += watch.add(text[begin : begin + size])
        assert shown.startswith(passed)
    assert passed + watch.finish() == shown
    assert watch.found == found


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
