from __future__ import annotations

from pathlib import Path

import pytest

from blockffn.data import corpus as corpus_module
from blockffn.data.corpus import Corpus
from tests.data.conftest import sentences, write_json_lines


def split_texts(corpus: Corpus) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "valid": []}
    for split, document in corpus.documents(corpus.survey(sample_bytes=0).cut):
        found[split].append(document.text)
    return found


def test_whole_documents_are_held_out_and_none_is_lost(tmp_path: Path) -> None:
    texts = sentences(300, seed=1)
    found = split_texts(Corpus((str(write_json_lines(tmp_path / "a.jsonl", texts)),), valid_fraction=0.1))
    assert sorted(found["train"] + found["valid"]) == sorted(texts)
    assert not set(found["train"]) & set(found["valid"])
    share = sum(map(len, found["valid"])) / sum(map(len, texts))
    assert 0.05 < share < 0.2


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    texts = sentences(200, seed=2)
    found = split_texts(Corpus((str(write_json_lines(tmp_path / "a.jsonl", texts * 3)),), valid_fraction=0.1))
    assert len(found["valid"]) % 3 == 0
    assert not set(found["train"]) & set(found["valid"])


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line number {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    found = split_texts(Corpus((str(tmp_path / "book.txt"),), valid_fraction=0.05))
    (head,), (tail,) = found["train"], found["valid"]
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.05 <= len(tail) / len(text) < 0.06


def test_a_document_without_line_ends_is_cut_at_a_space_or_else_anywhere(tmp_path: Path) -> None:
    for name, text, end in (("words", "word " * 400, " "), ("letters", "x" * 2000, "x")):
        (tmp_path / f"{name}.txt").write_text(text)
        found = split_texts(Corpus((str(tmp_path / f"{name}.txt"),), valid_fraction=0.05))
        assert found["train"][0] + found["valid"][0] == text
        assert found["train"][0].endswith(end)
        assert 90 <= len(found["valid"][0]) <= 110


def test_one_huge_document_does_not_decide_the_split(tmp_path: Path) -> None:
    texts = ["tiny\n"] * 3 + ["".join(f"huge {i}\n" for i in range(20_000))]
    found = split_texts(Corpus((str(write_json_lines(tmp_path / "a.jsonl", texts)),), valid_fraction=0.01))
    share = sum(map(len, found["valid"])) / sum(map(len, texts))
    assert 0.005 < share < 0.02


def test_held_out_sources_are_held_out_as_a_whole(tmp_path: Path) -> None:
    train = write_json_lines(tmp_path / "train.jsonl", sentences(20, seed=3))
    valid = write_json_lines(tmp_path / "valid.jsonl", sentences(5, seed=4))
    found = split_texts(Corpus((str(train),), (str(valid),)))
    assert found == {"train": sentences(20, seed=3), "valid": sentences(5, seed=4)}


def test_a_share_of_zero_holds_out_nothing(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", sentences(50, seed=3))
    assert split_texts(Corpus((str(path),), valid_fraction=0)) == {"train": sentences(50, seed=3), "valid": []}


@pytest.mark.parametrize("valid_fraction", [0.0, 0.01])
def test_the_held_out_part_of_a_built_in_corpus_is_never_trained_on(valid_fraction: float) -> None:
    held_out = {d.text for d in corpus_module.read_documents("synthetic", split="valid")}
    found = split_texts(Corpus(("synthetic",), valid_fraction=valid_fraction))
    assert len(found["train"]) == 2000
    assert not held_out & set(found["train"])
    assert set(found["valid"]) == (held_out if valid_fraction else set())


def test_each_source_is_held_out_by_its_own_share(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line number {i}\n" for i in range(1000)))
    many = write_json_lines(tmp_path / "many.jsonl", sentences(300, seed=1))
    corpus = Corpus((str(tmp_path / "book.txt"), str(many)), valid_fraction=0.1)
    survey = corpus.survey(sample_bytes=0)
    assert survey.cut == {str(tmp_path / "book.txt")}
    sources = {document.source for split, document in corpus.documents(survey.cut) if split == "valid"}
    assert sources == {"book", "many"}


def test_the_sample_is_training_text_within_its_budget_whatever_the_order(tmp_path: Path) -> None:
    texts = list(dict.fromkeys(sentences(300, seed=1)))
    samples = []
    for name, ordered in (("a", texts), ("b", texts[::-1])):
        corpus = Corpus((str(write_json_lines(tmp_path / f"{name}.jsonl", ordered)),), valid_fraction=0.1)
        sample = corpus.survey(sample_bytes=20_000).sample
        train = {document.text for split, document in corpus.documents() if split == "train"}
        assert set(sample) <= train
        assert 15_000 < sum(len(text.encode()) for text in sample) <= 20_000
        samples.append(sample)
    assert samples[0] == samples[1]


def test_the_sample_of_a_cut_document_has_nothing_of_its_held_out_end(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    (sample,) = Corpus((str(tmp_path / "book.txt"),), valid_fraction=0.1).survey(sample_bytes=1 << 20).sample
    assert "line 500\n" in sample
    assert "line 990\n" not in sample


def test_a_text_too_small_to_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word")
    with pytest.raises(ValueError, match=r"corpus of 4 bytes is too small to hold out 1\.00% of it"):
        Corpus((str(tmp_path / "a.txt"),)).survey(sample_bytes=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ()}, "no sources are given"),
        ({"sources": ("a",), "valid_fraction": 1.0}, "valid_fraction is 1.0"),
        ({"sources": ("a", "b"), "valid_sources": ("b",)}, "'b' is a source and a held-out source at once"),
    ],
)
def test_a_corpus_that_makes_no_sense_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corpus(**arguments)
