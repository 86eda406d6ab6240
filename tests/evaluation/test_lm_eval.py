"""Our zero-shot numbers are lm-evaluation-harness's, and its own command line runs our tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from blockffn.checkpoints.convert import convert
from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.lm_eval import arguments, main
from blockffn.evaluation.run import load_any
from blockffn.evaluation.tasks import FOLDER, records
from blockffn.evaluation.zero_shot import zero_shot
from tests.checkpoints import published, straight_line
from tests.models.conftest import tiny_model

WORDS = [
    "the",
    "cat",
    "dogs",
    "walks",
    "walk",
    "old",
    "and",
    "slept",
    "while",
    "nobody",
    "was",
    "looking",
    "at",
    "them",
]


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * (i + 3) + i * i) % len(WORDS)] for i in range(length))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its tokenizer, 50 minimal pairs in four fields, 50 passages and 3 books."""
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300).save_pretrained(tmp_path / "model")
    fields = ("morphology", "semantics", "syntax", "syntax/semantics")
    pairs = [{"sentence_good": sentence(i, 4 + i % 5), "sentence_bad": sentence(i + 7, 4 + i % 5),
              "UID": f"paradigm_{i % 8}", "field": fields[i % 4]} for i in range(50)]  # fmt: skip
    # Some passages exceed the context of 64 tokens; some have a line break or two spaces before the last word.
    passages = [{"text": sentence(i, 5 + i) + (" \n", "  ", " ")[i % 3] + WORDS[i % 9]} for i in range(50)]
    books = [{"text": sentence(i, 150)} for i in range(3)]
    for name, rows in (("blimp", pairs), ("lambada", passages), ("books", books)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.slow
def test_our_scores_are_those_of_the_harness(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'blockffn[eval]'")
    command = [sys.executable, "-m", "blockffn.evaluation.lm_eval", "--model", "hf", "--device", "cpu",
               "--model_args", f"pretrained={folder / 'model'},dtype=float32", "--batch_size", "7",
               "--tasks", "blockffn_blimp,blockffn_lambada,blockffn_books",
               "--output_path", str(folder / "out")]  # fmt: skip
    environment = {**os.environ, "BLOCKFFN_EVAL_DATA": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]

    model, tokenizer = load_any(folder / "model", device="cpu")
    files = {name: folder / f"{name}.jsonl" for name in ("blimp", "lambada")}
    ours = zero_shot(model, tokenizer, files, batch_tokens=200)
    assert 10 < ours["blimp"]["accuracy"] < 90
    assert ours["blimp"]["accuracy"] / 100 == pytest.approx(theirs["blockffn_blimp"]["acc,none"])
    for field, row in ours["blimp"]["fields"].items():
        assert row["accuracy"] / 100 == pytest.approx(theirs[f"blockffn_blimp_{field}"]["acc,none"])
        assert row["accuracy_stderr"] / 100 == pytest.approx(theirs[f"blockffn_blimp_{field}"]["acc_stderr,none"])
    assert ours["lambada"]["accuracy"] / 100 == pytest.approx(theirs["blockffn_lambada"]["acc,none"])
    assert ours["lambada"]["perplexity"] == pytest.approx(theirs["blockffn_lambada"]["perplexity,none"], rel=1e-4)
    assert theirs["blockffn_books"]["bits_per_byte,none"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "3b-sft"])
def test_the_harness_scores_an_imported_model_as_its_published_tensors_say(
    tmp_path: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'blockffn[eval]'")
    weights, config = published.weights(name), published.config(name)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    tokenizer.save_pretrained(published.write_bin(tmp_path / "published", weights, config))
    convert(tmp_path / "published", tmp_path / "imported")

    monkeypatch.setenv("BLOCKFFN_EVAL_DATA", str(folder))
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'imported'},dtype=float32", "--device",
        "cpu", "--batch_size", "16", "--tasks", "blockffn_blimp", "--output_path", str(tmp_path / "out"),
    ])  # fmt: skip
    main()
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["blockffn_blimp"]

    def likelihood(text: str) -> float:
        ids = _behind_the_first_token(tokenizer, " " + text)
        predictions = straight_line.logits(weights, config, ids).log_softmax(-1)
        return float(predictions[:-1].gather(-1, ids[1:, None]).sum())

    pairs = [json.loads(line) for line in (folder / "blimp.jsonl").read_text().splitlines()]
    better = [likelihood(pair["sentence_good"]) > likelihood(pair["sentence_bad"]) for pair in pairs]
    assert 0 < sum(better) < len(better)
    assert found["acc,none"] == pytest.approx(sum(better) / len(better))


def _behind_the_first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return torch.tensor([first, *tokenizer.encode(text, add_special_tokens=False)])


def test_our_tasks_folder_is_added_unless_another_is_named() -> None:
    assert arguments(["--tasks", "x"]) == ["--tasks", "x", "--include_path", str(FOLDER)]
    assert arguments(["--tasks", "x", "--include_path=mine"]) == ["--tasks", "x", "--include_path=mine"]
    assert arguments([]) == []


class _Tagged(yaml.SafeLoader):
    """Reads `!function name` as the name."""


_Tagged.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_every_task_file_is_in_the_package_and_names_our_loader() -> None:
    tasks = {p.name: yaml.load(p.read_text(), _Tagged) for p in FOLDER.glob("*yaml")}
    assert {t["task"] for t in tasks.values() if isinstance(t.get("task"), str)} >= {
        "blockffn_lambada",
        "blockffn_books",
    }
    assert set(tasks["blimp.yaml"]["task"]) == {t["task"] for name, t in tasks.items() if name.startswith("blimp_")
                                                and "task" in t}  # fmt: skip
    for name in ("blimp_template_yaml", "lambada.yaml", "books.yaml"):
        assert tasks[name]["custom_dataset"] == "blockffn.evaluation.tasks.records.load"


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A stand-in for the package `datasets`, which lists what is asked of the hub."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, name: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((repository, name, split))
        return [{"text": f"{name}", "field": "syntax"}]

    module = SimpleNamespace(
        load_dataset=load_dataset,
        get_dataset_config_names=lambda repository: ["a", "b"],
        Dataset=SimpleNamespace(from_list=list),
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv(records.ENVIRONMENT, raising=False)
    return asked


def test_without_a_place_the_hub_is_asked_for_all_configurations(fake_datasets: list[tuple[str, str, str]]) -> None:
    rows = records.load(task="blimp", hub="owner/blimp:*:train", version=1.0)["test"]
    assert fake_datasets == [("owner/blimp", "a", "train"), ("owner/blimp", "b", "train")]
    assert [row["text"] for row in rows] == ["a", "b"]


def test_a_local_folder_or_file_is_read_and_a_field_selected(folder: Path, fake_datasets: list[object],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    assert len(records.load(task="lambada", hub="x", data=str(folder / "lambada.jsonl"))["test"]) == 50
    monkeypatch.setenv(records.ENVIRONMENT, str(folder))
    assert len(records.load(task="blimp", hub="x", field="syntax_semantics")["test"]) == 12
    with pytest.raises(ValueError, match=r"holds none of other\.jsonl"):
        records.load(task="other", hub="x")
    assert not fake_datasets
