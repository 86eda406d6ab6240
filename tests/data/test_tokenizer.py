from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockffn.data.tokenizer import (
    MAX_TOKEN_BYTES,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from tests.data.conftest import sentences

SAMPLE = [*sentences(100, seed=0), "def f(x):\n        return x\n" * 20, "-" * 500]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SAMPLE, vocab_size=320)


def test_special_tokens_have_the_first_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]
    assert tokenizer("the")["input_ids"][0] == 1


def test_the_vocabulary_has_the_size_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert vocabulary_size(tokenizer) == len(tokenizer) == 320


TOKENIZER = train_tokenizer(SAMPLE, vocab_size=320)
LENGTHS = token_byte_lengths(TOKENIZER)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_exactly_and_its_bytes_are_counted(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert LENGTHS[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["a <eos> b", "<bos><pad>", "line\r\n\ttab  \n\n", "\x00\x7f", "don 't , stop ."])
def test_awkward_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_have_no_bytes() -> None:
    assert LENGTHS.dtype == np.int32
    assert LENGTHS[:3].tolist() == [0, 0, 0]
    assert LENGTHS[3:].min() == 1


def test_no_token_is_longer_than_the_limit() -> None:
    assert LENGTHS.max() <= MAX_TOKEN_BYTES


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer_hash(train_tokenizer(SAMPLE, vocab_size=320)) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(SAMPLE, vocab_size=300)) != tokenizer_hash(tokenizer)


@pytest.mark.parametrize("where", [".", "tokenizer", "model"])
def test_a_saved_tokenizer_is_found_and_is_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, where: str
) -> None:
    tokenizer.save_pretrained(tmp_path / where)
    loaded = load_tokenizer(tmp_path)
    text = "the <eos> façade\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 258.*at least 259"):
        train_tokenizer(["a"], vocab_size=258)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "missing")


def test_a_tokenizer_without_document_ends_is_an_error(tmp_path: Path) -> None:
    bare = Tokenizer(models.BPE())
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        load_tokenizer(tmp_path)


def test_bytes_of_a_sentencepiece_tokenizer_are_counted() -> None:
    vocab = ["<unk>", "</s>", "▁the", "▁", "ü", "<0x0A>", "cat", "t", "h", "e", "c", "a"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert token_byte_lengths(tokenizer).tolist() == [0, 0, 4, 1, 2, 1, 3, 1, 1, 1, 1, 1]


def test_added_tokens_count_their_own_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded.add_tokens([AddedToken("ünder", special=False), AddedToken("<|x|>", special=True)])
    assert token_byte_lengths(loaded)[320:].tolist() == [6, 0]


def test_bytes_of_a_wordpiece_tokenizer_are_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"cannot count bytes.*WordPiece"):
        token_byte_lengths(tokenizer)
