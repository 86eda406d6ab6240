"""Zero-shot scores against plain loops over sentences."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.continuations import (
    Continuation,
    batches_by_length,
    encode_continuations,
    score_continuations,
)
from blockffn.evaluation.zero_shot import find_tasks, last_word, read_task, zero_shot
from tests.models.conftest import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat, and the dogs walk"] * 20, vocab_size=300)


def loop_scores(model: torch.nn.Module, one: Continuation) -> tuple[float, bool]:
    with torch.no_grad():
        log_p = model(torch.tensor([one.ids])).logits[0].log_softmax(dim=-1)
    places = range(len(one.ids) - one.scored, len(one.ids))
    total = sum(log_p[t - 1, one.ids[t]].item() for t in places)
    return total, all(log_p[t - 1].argmax() == one.ids[t] for t in places)


@pytest.mark.parametrize("kind", ["blockffn", "llama"])
def test_batched_scores_are_those_of_each_continuation_alone(kind: str) -> None:
    tiny_llama = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = tiny_model() if kind == "blockffn" else LlamaForCausalLM(tiny_llama).eval()
    lengths = [3, 17, 9, 2, 30, 9]
    ones = [Continuation(tuple(torch.randint(61, (n,)).tolist()), max(1, n // 2)) for n in lengths]
    ids = ones[0].ids[:2]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    ones.append(Continuation((*ids, likeliest), 1))  # one that is greedy
    scores = score_continuations(model, ones, batch_tokens=40)
    expected = [loop_scores(model, one) for one in ones]
    np.testing.assert_allclose(scores.loglikelihood, [total for total, _ in expected], rtol=1e-5)
    assert scores.greedy.tolist() == [greedy for _, greedy in expected]
    assert scores.greedy[-1]


def test_what_is_too_long_loses_its_left_end() -> None:
    model = tiny_model()  # reads 64 tokens
    long = tuple(torch.randint(61, (90,)).tolist())
    scores = score_continuations(model, [Continuation(long, 4)])
    assert scores.loglikelihood[0] == pytest.approx(loop_scores(model, Continuation(long[-65:], 4))[0], rel=1e-5)


def test_batches_keep_to_the_budget_and_hold_every_item_once() -> None:
    lengths = [5, 1, 9, 9, 2, 30, 4]
    batches = batches_by_length(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [5]  # longer than the budget, alone
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches[1:])


def test_bos_precedes_a_text_and_spaces_go_with_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    alone, behind, moved = encode_continuations(tokenizer, [("", " the cat"), ("the", " cat"), ("the ", "cat")])
    assert alone == Continuation((tokenizer.bos_token_id, *ids(" the cat")), len(ids(" the cat")))
    assert behind == Continuation((tokenizer.bos_token_id, *ids("the cat")), len(ids(" cat")))
    assert moved == behind


def test_the_last_word_is_what_follows_the_last_space() -> None:
    assert last_word("a b\n\nc") == ("a", " b\n\nc")
    assert last_word("one") == ("", " one")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = [{"sentence_good": f"the cat {w}", "sentence_bad": f"cat the {w}", "UID": uid, "field": field}
             for w, uid, field in (("sat", "a", "syntax"), ("walk", "a", "syntax"),
                                   ("mat", "b", "syntax/semantics"))]  # fmt: skip
    (tmp_path / "blimp.jsonl.xz").write_bytes(lzma.compress("\n".join(map(json.dumps, pairs)).encode()))
    (tmp_path / "lambada.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ("the cat sat", "and the dogs walk"))
    )
    return tmp_path


def test_accuracy_error_and_perplexity_are_those_of_the_pairs(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=300)
    result = zero_shot(model, tokenizer, find_tasks(folder))
    pairs = read_task("blimp", folder / "blimp.jsonl.xz")
    right = []
    for pair in pairs:
        good, bad = (
            loop_scores(model, encode_continuations(tokenizer, [("", " " + pair[f"sentence_{side}"])])[0])[0]
            for side in ("good", "bad")
        )
        right.append(float(good > bad))
    blimp = result["blimp"]
    assert blimp["accuracy"] == pytest.approx(100 * sum(right) / 3)
    assert blimp["accuracy_stderr"] == pytest.approx(100 * np.std(right, ddof=1) / math.sqrt(3))
    assert blimp["paradigms"]["a"]["accuracy"] == pytest.approx(50 * sum(right[:2]))
    assert blimp["paradigms"]["b"] == {
        "field": "syntax_semantics", "accuracy": 100 * right[2], "accuracy_stderr": None, "pairs": 1
    }  # fmt: skip
    assert set(blimp["fields"]) == {"syntax", "syntax_semantics"}
    totals = [
        loop_scores(model, encode_continuations(tokenizer, [last_word(t)])[0])[0]
        for t in ("the cat sat", "and the dogs walk")
    ]
    assert result["lambada"]["perplexity"] == pytest.approx(math.exp(-sum(totals) / 2), rel=1e-5)


def test_a_tie_is_half_right(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    same = {"sentence_good": "the cat", "sentence_bad": "the cat", "UID": "a", "field": "syntax"}
    (tmp_path / "blimp.jsonl").write_text(json.dumps(same))
    result = zero_shot(tiny_model(vocab_size=300), tokenizer, find_tasks(tmp_path))
    assert result["blimp"]["accuracy"] == 50


def test_the_limit_is_by_paradigm(folder: Path) -> None:
    assert [pair["UID"] for pair in read_task("blimp", folder / "blimp.jsonl.xz", limit=1)] == ["a", "b"]


def test_mistakes_name_the_place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="holds no task"):
        find_tasks(tmp_path)
    (tmp_path / "lambada.jsonl").write_text('{"words": "a b"}')
    with pytest.raises(ValueError, match=r"lambada\.jsonl:1: task lambada needs text in field 'text'"):
        read_task("lambada", tmp_path / "lambada.jsonl")
    with pytest.raises(ValueError, match="unknown task 'glue'"):
        zero_shot(tiny_model(), tokenizer, {"glue": tmp_path})
