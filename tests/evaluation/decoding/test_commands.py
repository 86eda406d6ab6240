"""The two commands on a tiny model: what they print is what they write, and mistakes are one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig
from typer.testing import CliRunner

from blockffn.checkpoints.load import load
from blockffn.cli import app
from blockffn.configuration import BlockFFNConfig
from blockffn.data.tokenizer import train_tokenizer
from blockffn.evaluation.decoding.modes import choose_draft
from blockffn.evaluation.decoding.peers import HuggingFaceGenerate
from blockffn.evaluation.decoding.ways import greedy
from blockffn.inference.backends import make_target
from blockffn.inference.decode import generate
from blockffn.inference.native_model import why_not_native
from blockffn.models.causal_lm import BlockFFNForCausalLM

SIZES = {
    "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 16,
    "intermediate_size": 96, "num_attention_heads": 2, "attention_type": "gqa", "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["some words of a text, and some more words"] * 3, vocab_size=300)
    for name in ("moe", "dense"):
        torch.manual_seed(0)
        BlockFFNForCausalLM(BlockFFNConfig(**SIZES, ffn_type=name)).save_pretrained(root / name)  # type: ignore[arg-type]
        tokenizer.save_pretrained(root / name)
    return root


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_bench_decode_times_every_mode_and_writes_it(models: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    printed = run(
        "bench", "decode", models / "moe", "--dense", models / "dense", "--draft", "oracle:0.7", "--per-task", "1",
        "--tasks", "qa,rag", "-n", "10", "--rounds", "1", "--tree", "4", "--peers", "huggingface", "--json", out,
        "--plot", picture,
    )  # fmt: skip
    report = json.loads(out.read_text())
    ways = [result["way"] for result in report["results"]]
    assert ways == [
        "dense, plain", "dense, fixed tree 4", "dense, tree by cost", "sparse, plain", "sparse, fixed tree 4",
        "sparse, tree by cost", "dense, Hugging Face generate()",
    ]  # fmt: skip
    assert all(way in printed for way in ways)
    assert "Acceptance is simulated" in printed
    assert [check["faults"] for check in report["checks"]] == [[]] * 4
    assert report["prompts"] == {"qa": 1, "rag": 1}
    assert report["models"]["sparse"]["simulated_acceptance"] is True
    assert report["machine"]["date"]
    for result in report["results"]:
        assert [rate["task"] for rate in result["rates"]] == ["qa", "rag", "all"]
        assert all(rate["tokens_per_second"] > 0 for rate in result["rates"])
    assert report["results"][0]["rates"][-1]["ratio"] == 1
    assert report["results"][1]["rates"][-1]["acceptance_length"] > 1.3
    unions = [[rate["union_experts"] for rate in result["rates"]] for result in report["results"]]
    assert [set(of_way) == {None} for of_way in unions] == [True] * 3 + [False] * 3 + [True]
    assert all(plain < tree for plain, tree in zip(unions[3], unions[4]))
    assert "% of the experts that a step reads" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_draft_only_plain_decoding_is_timed_and_it_is_said(models: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("some words of a text. " * 200)
    printed = run("bench", "decode", models / "moe", "--text", book, "--text-only", "-n", "6", "--rounds", "1")
    assert "no draft for the sparse model" in printed
    assert "sparse, plain" in printed
    assert "tree" not in printed


@pytest.fixture
def with_draft(models: Path, tmp_path: Path) -> Path:
    """A model with a smaller one, which is itself here, in its folder `draft`."""
    folder = tmp_path / "model"
    shutil.copytree(models / "moe", folder)
    shutil.copytree(models / "moe", folder / "draft")
    return folder


def test_the_draft_beside_the_model_is_the_default(with_draft: Path) -> None:
    short = ("--tasks", "qa", "--per-task", "1", "-n", "6", "--rounds", "1")
    printed = run("bench", "decode", with_draft, *short)
    assert f"drafts: {with_draft / 'draft'}" in printed
    assert "sparse, tree by cost" in printed
    assert "of the rounds" not in printed
    assert "tree by cost" not in run("bench", "decode", with_draft, *short, "--draft", "none")


def test_every_command_finds_the_same_draft(with_draft: Path, models: Path) -> None:
    beside = str(with_draft / "draft")
    for name, expected in ((None, beside), ("auto", beside), ("none", None), ("ngram", "ngram"), (beside, beside)):
        assert choose_draft(with_draft, name) == expected
    assert choose_draft(models / "moe", None) is None
    assert choose_draft(models / "moe", "auto") == "ngram"
    assert choose_draft(models / "moe", "oracle:0.5") == "oracle:0.5"
    with pytest.raises(ValueError, match="oracle:2"):
        choose_draft(models / "moe", "oracle:2")
    with pytest.raises(ValueError, match="/nope is no draft"):
        choose_draft(with_draft, "/nope")


def test_the_peer_is_greedy_whatever_the_models_generation_config_says(models: Path) -> None:
    model = load(models / "moe")
    prompt, new = [5, 6, 7, 5, 6, 7, 5, 6], 12
    expected = HuggingFaceGenerate("plain", model).run(prompt, new).token_ids
    own = GenerationConfig(do_sample=True, temperature=5.0, num_beams=3, repetition_penalty=9.0, bos_token_id=0,
                           no_repeat_ngram_size=1, suppress_tokens=expected[:1])  # fmt: skip
    model.generation_config = own
    assert HuggingFaceGenerate("asked for more", model).run(prompt, new).token_ids == expected
    assert model.generation_config is own
    assert expected == generate(make_target(model, backend="model"), prompt, greedy(new)).token_ids


@pytest.mark.parametrize("command", [("bench", "decode", "--draft"), ("advise",)])
def test_a_wrong_draft_is_named_before_anything_is_said(models: Path, command: tuple[str, ...]) -> None:
    *verb, option = command if len(command) > 1 else (*command, "")
    result = CliRunner().invoke(app, [*verb, str(models / "moe"), *([option] if option else []), "/nope"])
    assert "/nope is no draft" in str(result.exception)
    assert result.output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "oracle:2"], "between 0 and 1"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["-n", "1"], "max_new_tokens must be at least 2"),
        (["--max-prompt-tokens", "0"], "max_prompt_tokens must be at least 1"),
        (["--peers", "huggingface,huggingface"], "peer 'huggingface' is named twice"),
        (["--tasks", "cooking"], "no prompts of the kind 'cooking'"),
        (["--peers", "vllm"], "unknown peer 'vllm'"),
        (["--peers", "llama.cpp:Q4_0/Q3"], "not written in 'Q3'"),
        (["-n", "500"], "at most 448"),
        (["--text-only"], "needs a --text"),
        (["--plot", "x.txt"], "must end in .png or .svg"),
    ],
)
def test_mistakes_are_named(models: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("bench", "decode", models / "moe", *arguments)


def test_an_unknown_peer_is_refused_before_any_text_is_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockffn.evaluation.decoding.bench.load", lambda *_, **__: pytest.fail("a model was loaded"))
    for peers in ("vllm", "huggingface,huggingface"):
        with pytest.raises(ValueError, match="peer"):
            run("bench", "decode", models / "moe", "--peers", peers)


def test_a_twin_with_another_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    BlockFFNForCausalLM(BlockFFNConfig(**SIZES, ffn_type="dense")).save_pretrained(tmp_path / "other")  # type: ignore[arg-type]
    train_tokenizer(["another text"], vocab_size=280).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        run("bench", "decode", models / "moe", "--dense", tmp_path / "other")


def test_advise_measures_and_says_what_to_use(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "advice.json"
    printed = run("advise", models / "moe", "oracle:0.8", "-n", "8", "--json", out)
    advice = json.loads(out.read_text())
    assert [draft["name"] for draft in advice["drafts"]] == ["ngram", "oracle:0.8"]
    assert set(advice["acceptance"]["oracle:0.8"]) >= {"qa", "rag", "mt_bench", "all"}
    assert advice["acceptance"]["oracle:0.8"]["all"]["tokens_per_step"] > 1.5
    best = advice["options"][0]
    assert best["measured"] > 0
    assert best["tokens_per_second"] > 0
    assert advice["bandwidth"] > 1e8
    assert "use: blockffn generate" in printed
    assert "tokens a step" in printed


def test_weights_that_keep_their_format_are_measured_once_and_counted_as_they_are(models: Path, tmp_path: Path) -> None:
    run("convert", models / "moe", "--quantize", "int4", "--lm-head", "int4", "--out", tmp_path / "packed")
    out = tmp_path / "advice.json"
    run("advise", models / "moe", "-n", "4", "--device", "cpu", "--json", out)
    plain = json.loads(out.read_text())["targets"]
    printed = run("advise", tmp_path / "packed", "-n", "4", "--device", "cpu", "--json", out)
    packed = json.loads(out.read_text())["targets"]
    assert [target["precision"] for target in plain] == ["auto", "int8", "int4"]
    assert [target["precision"] for target in packed] == ["auto"]
    note = "int8 and int4 not measured: the weights are stored packed and stay as they are"
    assert note in printed.replace("\n", " ")
    assert 5 < plain[0]["bytes_per_token"] / packed[0]["bytes_per_token"] < 8  # float32; int4 with scales
    assert plain[0]["bytes_per_token"] > plain[1]["bytes_per_token"] > plain[2]["bytes_per_token"]


def test_one_new_token_is_too_few_to_advise_on(models: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 new tokens, got 1"):
        run("advise", models / "moe", "-n", "1")


def test_advise_fits_80_columns(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr("blockffn.cli.advise.table_console", lambda: shown)
    monkeypatch.setattr("blockffn.evaluation.decoding.consult.read_bandwidth", lambda device: 1.0)
    run("advise", models / "moe", "oracle:0.8", "-n", "8")
    lines = [line for line in shown.file.getvalue().splitlines() if not line.startswith("use: ")]  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert "Above 100 %: weights stay in the processor's caches" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_advise_reckons_packed_weights_as_they_lie_in_memory(models: Path, tmp_path: Path) -> None:
    if why_not_native(load(models / "moe")) is not None:
        pytest.skip("no native kernels here")
    plain, packed = tmp_path / "plain.json", tmp_path / "packed.json"
    run("convert", models / "moe", "--quantize", "int8", "--group-size", "32", "--out", tmp_path / "int8")
    run("advise", models / "moe", "-n", "8", "--json", plain)
    printed = run("advise", tmp_path / "int8", "-n", "8", "--json", packed)
    [stored] = json.loads(packed.read_text())["targets"]
    reckoned = {target["precision"]: target["bytes_per_token"] for target in json.loads(plain.read_text())["targets"]}
    assert 0.8 < stored["bytes_per_token"] / reckoned["int8"] < 1.3
    assert stored["bytes_per_token"] < 0.5 * reckoned["auto"]
    assert "int8 and int4 not measured: the weights are stored packed" in printed


def test_a_machine_that_others_use_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockffn.evaluation.machine import busy

    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (0.3, 9.0, 9.0))
    assert busy(torch.device("cpu")) == []
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "other programs used 3.0 of 4 cores" in busy(torch.device("cpu"))[0]
    assert busy(torch.device("cuda")) == []
