from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from blockffn.data.tokenizer import train_tokenizer
from blockffn.inference.engine import Engine
from blockffn.inference.model_target import ModelTarget
from tests.models.conftest import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["naïve café — ☕ numbers 1 2 3 and words, many words"] * 20, vocab_size=300)


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(tiny_model(vocab_size=300), tokenizer)


def test_a_stream_is_the_completion_in_pieces(engine: Engine) -> None:
    stream = engine.stream("words ☕", max_new_tokens=20, seed=4)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text
    assert stream.completion.text == engine.generate("words ☕", max_new_tokens=20, seed=4).text
    assert len(pieces) > 3


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    free = engine.generate("many", max_new_tokens=20, temperature=1.5, seed=1)
    stop = free.text[4:7]
    stream = engine.stream("many", max_new_tokens=20, temperature=1.5, seed=1, stop=stop)
    shown = ""
    for piece in stream:
        shown += piece
        assert stop not in shown
    assert shown == stream.completion.text == free.text[: free.text.index(stop)]
    assert stream.completion.finish_reason == "stop"
    assert len(stream.completion.token_ids) < 20


def test_a_batch_of_texts_is_each_text_alone(engine: Engine) -> None:
    prompts = ["many words", "1", "naïve café and"]
    batch = engine.generate_batch(prompts, max_new_tokens=8, temperature=0.0)
    for prompt, completion in zip(prompts, batch, strict=True):
        assert completion.text == engine.generate(prompt, max_new_tokens=8, temperature=0.0).text
        assert completion.prompt == prompt


def test_an_engine_is_loaded_from_a_folder(tmp_path: Path, engine: Engine) -> None:
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    loaded = Engine.load(tmp_path, device="cpu", dtype=torch.bfloat16, capacity=32)
    assert loaded.model.dtype == torch.bfloat16
    completion = loaded.generate("many", max_new_tokens=4)
    assert completion.statistics.weight_bytes_per_token is not None
    with pytest.raises(ValueError, match=r"exceed the cache's capacity of 32; ask for at most \d+ new tokens, shorten"):
        loaded.generate("many", max_new_tokens=32)


def test_a_request_is_refused_before_the_stream_begins(engine: Engine) -> None:
    with pytest.raises(ValueError, match="exceed"):
        engine.stream("many", max_new_tokens=64)
    with pytest.raises(ValueError, match="unknown setting 'temprature'; choose from"):
        engine.stream("many", temprature=1)


def test_a_request_ends_the_stream_before_it(engine: Engine) -> None:
    stream = engine.stream("many", max_new_tokens=40, seed=2)
    first = next(iter(stream))
    assert first
    text = engine.generate("words ☕", max_new_tokens=20, seed=4).text
    assert list(stream) == []
    with pytest.raises(ValueError, match="next request ended it"):
        _ = stream.completion
    assert text == engine.generate("words ☕", max_new_tokens=20, seed=4).text


def test_bytes_per_token_are_those_of_the_weights_that_the_target_reads(engine: Engine) -> None:
    class PackedTarget(ModelTarget):
        bits_per_weight = 8.0

    asked = {"max_new_tokens": 8, "temperature": 0.0}
    own = Engine(engine.model, engine.tokenizer, target=PackedTarget(engine.model)).generate("many", **asked)
    whole = Engine(engine.model, engine.tokenizer, target=ModelTarget(engine.model)).generate("many", **asked)
    assert own.token_ids == whole.token_ids
    assert own.statistics.weight_bytes_per_token == pytest.approx(whole.statistics.weight_bytes_per_token / 4)


def test_a_prompt_that_is_no_text_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not UTF-8 text behind 'many caf'"):
        engine.stream("many caf\udce9 words", max_new_tokens=4)
