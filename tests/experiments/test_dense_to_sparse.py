"""The recovery experiment: its stages, what is skipped, and a rehearsal of all of it on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from blockffn.data.prepare import prepare
from blockffn.data.tokenizer import load_tokenizer
from blockffn.experiments.dense_to_sparse import Recovery, main, stages
from blockffn.settings import parse_overrides
from blockffn.training.config import train_settings


def recovery(tmp_path: Path, **changes: object) -> Recovery:
    fields = {
        "model": tmp_path / "model.gguf",
        "text": (tmp_path / "text.jsonl",),
        "valid": (),
        "work": tmp_path / "work",
    }
    return Recovery(**{**fields, **changes})  # type: ignore[arg-type]


def test_later_stages_read_what_earlier_ones_make(tmp_path: Path) -> None:
    made = {str(tmp_path / "model.gguf"), str(tmp_path / "text.jsonl")}
    for stage in stages(recovery(tmp_path, eval_data=tmp_path)):
        outputs = [word for option, word in zip(stage.command, stage.command[1:]) if option in ("--out", "--json")]
        inputs = {word.partition("=")[0] for word in stage.command if str(tmp_path) in word} - {*outputs, str(tmp_path)}
        assert inputs <= made, stage.name
        made |= {*outputs, str(stage.makes)}


def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    by_name = {stage.name: stage.command for stage in stages(recovery(tmp_path))}
    assert "--start-from" in by_name["train"]
    state = tmp_path / "work" / "run" / "checkpoints" / "step-00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    by_name = {stage.name: stage.command for stage in stages(recovery(tmp_path))}
    assert "--resume" in by_name["train"]
    assert "--start-from" not in by_name["train"]


def test_without_a_share_of_its_own_text_none_is_written(tmp_path: Path) -> None:
    found = {stage.name: stage.command for stage in stages(recovery(tmp_path, own_share=0.0))}
    assert not {"write", "own text"} & set(found)
    assert f"{tmp_path / 'work' / 'text'}=1" in found["train"]
    assert not any(str(tmp_path / "work" / "own") in word for word in found["train"])


def way(name: str, *rates: float) -> dict[str, object]:
    return {"way": name, "rates": [{"task": "qa", "tokens_per_second": rate} for rate in rates]}


def finished(work: Path) -> None:
    """What the stages of a recovery leave behind, as far as its record and its list of stages look."""
    against = {"model": f"{work}/dense", "divergence": 0.5}
    for file, content in (
        ("receipt.json", {"source": f"{work}/dense", "stages": [{"name": "loaded", "loss": 2.5}]}),
        ("dense-evaluation.json", {"perplexity": 12.25, "cost": {}}),
        ("recovered-evaluation.json", {"perplexity": 13.5, "cost": {}, "against": against}),
        ("decode.json", {"results": [way("dense, plain", 10.0, 30.0, 11.0), way("sparse, plain", 12.0, 9.0, 40.0)]}),
        ("run/train.json", {"step": 4, "tokens": 64, "seconds": 1.5}),
        ("dense/config.json", {}), ("sparse/config.json", {}), ("own.jsonl", {}),
    ):  # fmt: skip
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_text(json.dumps(content))
    for folder in ("text", "own", "run/model"):
        (work / folder).mkdir()


@pytest.mark.parametrize("work", [".", "a", "résumé", "runs/x"])
def test_a_record_names_its_folder_work_and_is_otherwise_untouched(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished(Path(work))
    given = ["--model", "m.gguf", "--text", "t", "--work", work, "--records", "records", "--device", "cpu"]
    assert main("", given) == 0
    record = json.loads((tmp_path / "records" / "dense-to-sparse" / "smollm2-135m.json").read_text())
    assert record["models"]["dense"]["perplexity"] == 12.25
    assert [record["models"][name]["decode_tokens_per_second"] for name in ("dense", "recovered")] == [11.0, 12.0]
    assert record["receipt"]["stages"] == [{"name": "loaded", "loss": 2.5}]
    if work != ".":
        assert record["receipt"]["source"] == record["models"]["recovered"]["against"]["model"] == "WORK/dense"


def test_a_record_says_every_setting_that_was_changed(tmp_path: Path) -> None:
    finished(tmp_path / "work")
    given = ["--model", "m.gguf", "--text", "t", "--work", str(tmp_path / "work"), "--records", str(tmp_path)]
    assert main("", [*given, "--sparsity", "72", "--steps", "9", "--device", "cpu", "max_seconds=167"]) == 0
    record = json.loads((tmp_path / "dense-to-sparse" / "smollm2-135m.json").read_text())
    assert record["settings"] == "gated --sparsity 72 --steps 9 max_seconds=167"


def test_training_steers_with_the_objectives_of_the_recipe_alone(tmp_path: Path) -> None:
    command = next(stage.command for stage in stages(recovery(tmp_path)) if stage.name == "train")
    changes = parse_overrides([word for word in command if "=" in word and word.startswith("objectives.")])
    terms = train_settings("mini", "blockffn", changes).objectives.terms
    assert set(terms) == {"router_entropy", "activation_locality", "dead_experts"}


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_outside_0_to_1_is_refused(share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("", ["--model", "m", "--text", "t", "--work", str(tmp_path), "--list", f"--own-share={share}"])
    assert "--own-share must lie between 0 and 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_model_goes_all_the_way(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randrange(60, 120))) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([tmp_path / "text.jsonl"], tmp_path / "tokens", vocab_size=300, valid_fraction=0.1)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    llama.save_pretrained(tmp_path / "llama")
    load_tokenizer(tmp_path / "tokens").save_pretrained(tmp_path / "llama")
    command = [
        "--model", str(tmp_path / "llama"), "--text", str(tmp_path / "text.jsonl"), "--work", str(tmp_path / "work"),
        "--records", str(tmp_path / "records"), "--name", "tiny", "--device", "cpu", "--num-experts", "6",
        "--documents", "4", "--new-tokens", "40", "--steps", "4", "--batch-size", "4", "--micro-batch-size", "4",
        "--sequence-length", "128", "--own-share", "0.2", "precision=float32", "compile=false", "log_every=1",
    ]  # fmt: skip
    assert main("", command) == 0
    record = json.loads((tmp_path / "records" / "dense-to-sparse" / "tiny.json").read_text())
    assert [stage["name"] for stage in record["receipt"]["stages"]] == ["loaded", "regrouped", "routed"]
    assert record["models"]["recovered"]["against"]["divergence"] > 0
    assert record["models"]["recovered"]["tls"] > 0
    assert "tls" not in record["models"]["dense"]
    assert record["training"]["step"] == 4
    assert str(tmp_path / "work") not in json.dumps(record)
    assert main("", command) == 0  # nothing is left to do
