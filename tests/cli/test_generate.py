"""`blockffn generate` with drafts, as a user meets it; in this process, because a new one would import torch again."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockffn.cli import main
from blockffn.data.tokenizer import train_tokenizer
from blockffn.ops import native
from tests.checkpoints import published
from tests.models.conftest import tiny_model

PROMPT = ["-p", "one two three one two", "-n", "24", "--temperature", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    tiny_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer(["one two three four five six"] * 50, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def blockffn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockffn", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_drafts_change_nothing_but_the_steps(blockffn, folder: Path, tmp_path: Path) -> None:
    code, plain, _ = blockffn("generate", str(folder), *PROMPT)
    assert code == 0
    sample = tmp_path / "sample.json"
    options = ["--speculative", "--stats", "--check-lossless", "--json", str(sample)]
    code, text, notes = blockffn("generate", str(folder), *PROMPT, *options)
    assert code == 0
    assert text == plain
    assert f"drafts by n-grams of the text; {folder} has no folder draft" in notes
    assert "lossless: plain decoding gives the same 24 tokens" in notes
    assert re.search(r"drafts +\d\.\d\d tokens a step \(acceptance length\) in \d+ steps", notes)
    assert re.search(r"ms of model, \d+ ms of drafting, \d+ ms of sampling", notes)
    speculation = json.loads(sample.read_text())["statistics"]["speculation"]
    offered = [str(count) for count in speculation["offered_by_depth"][:10]]
    assert re.search(r"^of +" + r" +".join(offered) + "$", notes, flags=re.MULTILINE)


@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")
def test_a_screened_head_changes_no_text_and_says_what_it_read(blockffn, folder: Path) -> None:
    _, plain, _ = blockffn("generate", str(folder), *PROMPT, "--top-k", "5", "--stats")
    code, text, notes = blockffn("generate", str(folder), *PROMPT, "--top-k", "5", "--stats", "--screen-head", "int8")
    assert code == 0
    assert text == plain
    assert re.search(r"head +\d+\.\d % read beside its screen", notes)


@pytest.mark.parametrize(
    "settings",
    [
        ["--temperature", "0.8"],
        ["--temperature", "0.8", "--top-k", "65"],
        ["--temperature", "0", "--repetition-penalty", "1.2"],
    ],
)
def test_a_screen_that_would_never_be_read_is_refused(settings: list[str], blockffn, folder: Path) -> None:
    code, text, notes = blockffn("generate", str(folder), "--prompt", "one", "--screen-head", "int8", *settings)
    assert code != 0
    assert not text
    assert "--screen-head goes with --temperature 0 or --top-k up to 64" in notes


@pytest.mark.parametrize("value", ["ngram", "model"])
def test_what_drafts_can_be_named(value: str, blockffn, folder: Path) -> None:
    draft = str(folder) if value == "model" else value
    code, text, notes = blockffn("generate", str(folder), "--speculative", draft, "--tree", "4", *PROMPT)
    assert code == 0
    assert text.startswith("one two three one two")
    assert f"drafts by {'n-grams of the text' if value == 'ngram' else draft}\n" in notes
    assert "tokens a step" in notes


def test_a_value_may_follow_behind_an_equals_sign_or_at_the_end(blockffn, folder: Path) -> None:
    for options in (["--speculative=ngram", str(folder), *PROMPT], [str(folder), *PROMPT, "--speculative"]):
        code, _, notes = blockffn("generate", *options)
        assert code == 0
        assert "drafts by n-grams" in notes


@pytest.mark.parametrize(("options", "message"), [
    (["--speculative", "--tree", "many"], "tree must be 'auto' or a number of draft tokens from 1 to 63, got 'many'"),
    (["--speculative", "--tree", "0"], "tree must be 'auto' or a number of draft tokens from 1 to 63, got '0'"),
    (["--speculative", "--tree", "chain:17"], "got 'chain:17'; or 'chain:N' for 1 to 16 without branches"),
    (["--speculative", "nowhere"], "nowhere is no draft: give 'ngram', or the folder of a trained draft"),
    (["--check-lossless"], "--tree and --check-lossless go with --speculative"),
    (["--tree", "4"], "--tree and --check-lossless go with --speculative"),
    (["--backend", "fast"], "unknown backend 'fast'"),
])  # fmt: skip
def test_a_mistake_is_named(options: list[str], message: str, blockffn, folder: Path) -> None:
    code, _, notes = blockffn("generate", str(folder), *PROMPT, *options)
    assert code == 2
    assert message in notes
    assert "Traceback" not in notes


@pytest.mark.parametrize(("device", "message"), [
    ("gpu", "unknown device 'gpu'; choose cpu, cuda or cuda:N"),
    ("cuda:99", "device 'cuda:99' is not there: PyTorch sees"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_named(device: str, message: str, blockffn, folder: Path) -> None:
    code, _, errors = blockffn("generate", str(folder), "-p", "one", "--device", device)
    assert code == 2
    assert errors.startswith(f"error: {message}")


def test_a_weight_that_is_nan_is_named_before_anything_is_written(blockffn, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.router.proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    code, text, errors = blockffn("generate", str(tmp_path / "model"), *PROMPT)
    assert (code, text) == (2, "")
    assert f"model.safetensors: tensor '{name}' holds NaN" in errors


def test_what_was_probably_meant_is_named(blockffn, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "model")
    _, _, errors = blockffn("inspect", str(tmp_path))
    assert f"do you mean {tmp_path / 'run'}?" in errors
    _, _, errors = blockffn("generate", "Somebody/Model-3B")
    assert "download it first: hf download Somebody/Model-3B --local-dir Model-3B" in errors


@pytest.mark.parametrize("frequent", [None, 64])
def test_the_published_model_and_its_draft_are_used_as_downloaded(
    frequent: int | None, blockffn, folder: Path, tmp_path: Path
) -> None:
    target = published.write_bin(tmp_path / "3b", published.weights("3b-sft"), published.config("3b-sft"), shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, target / name)
    draft = published.write_bin(tmp_path / "eagle", published.draft_weights(), published.DRAFT)
    if frequent is not None:
        (draft / f"freq_{frequent}.pkl").write_bytes(pickle.dumps(list(range(frequent))))
    options = [f"--speculative={draft}", "--tree", "7", "--check-lossless"]
    code, _, notes = blockffn("generate", str(target), *PROMPT, *options)
    assert code == 0
    assert "lossless: plain decoding gives the same 24 tokens" in notes
    _, text, _ = blockffn("inspect", str(draft))
    assert ("proposes  all tokens" if frequent is None else "proposes  the 64 most frequent tokens") in text


@pytest.mark.parametrize("options", [[], ["--data", "text"], ["--data", "text", "data.align=8"]])
def test_rows_of_a_draft_fit_the_small_presets_whatever_is_said_about_the_data(blockffn, options: list[str]) -> None:
    code, settings, _ = blockffn("train-draft", "model", *options, "--show-settings")
    assert code == 0
    assert "  sequence_length: 1024\n" in settings


def test_tables_of_decoding_speed_are_as_wide_as_their_ways_and_numbers() -> None:
    """A column for each way, a row for each kind of text: three ways fit 80 columns."""
    from types import SimpleNamespace

    from rich.console import Console

    from blockffn.cli.bench import _rates

    tasks = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag", "all")
    same = {"tokens_per_second": 1234.5, "ratio": 1.0, "lowest_ratio": 1.0, "highest_ratio": 1.0}
    rates = [SimpleNamespace(task=task, **same) for task in tasks]
    ways = ("sparse, plain", "sparse, fixed tree 7", "sparse, tree by cost")
    results = [SimpleNamespace(way=way, rates=rates, overall=rates[-1]) for way in ways]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_rates(SimpleNamespace(results=results, about={"settings": {"rounds": 3}})))
    lines = console.export_text().splitlines()
    assert sum(line.count("1234.5") == len(ways) for line in lines) == len(tasks)
    assert any(all(way in line for way in ways) for line in lines)


def test_a_wrong_draft_is_the_only_thing_that_is_said(blockffn, folder: Path) -> None:
    code, text, notes = blockffn("generate", str(folder), "--speculative", "/nope", *PROMPT)
    assert (code, text) == (2, "")
    assert notes.startswith("error: /nope is no draft")
    assert notes.count("\n") == 1


def test_one_token_is_singular(blockffn, folder: Path) -> None:
    code, _, notes = blockffn("generate", str(folder), "-p", "one", "-n", "1", "--stats", "--device", "cpu")
    assert code == 0
    assert re.search(r"^new +1 token: ", notes, re.MULTILINE)
