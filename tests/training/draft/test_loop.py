"""A draft's run from settings to a folder: it learns, stops and resumes, and serves its target."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockffn.checkpoints.draft import CARD, load_draft
from blockffn.checkpoints.files import CheckpointError, read_frequencies
from blockffn.checkpoints.inspect import inspect
from blockffn.data.frequencies import count_frequencies, most_frequent
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.eagle import eagle_drafter
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.training.draft.loop import train_draft
from blockffn.training.draft.preparation import make_draft
from blockffn.training.draft.settings import DraftTrainSettings
from blockffn.training.results import read_metrics
from tests.inference.speculative.stub_targets import decode_losslessly
from tests.models.conftest import tiny_model
from tests.training.draft.conftest import settings_of

MakeSettings = Callable[..., DraftTrainSettings]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock."""
    return {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}


def card_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / CARD).read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, circle: Path, target_run: Path) -> Path:
    run = tmp_path_factory.mktemp("trained")
    train_draft(settings_of(circle, target_run, steps=60), run, progress=False)
    return run


def test_losses_fall_and_acceptance_rises(trained: Path) -> None:
    records = read_metrics(trained)
    first, last = records[0], records[-1]
    assert last["loss"] < first["loss"] / 2
    assert all(after < before for before, after in zip(first["token_loss"], last["token_loss"], strict=True))
    assert last["acceptance_length"] > 3.5 > 1.2 > first["acceptance_length"]


def test_a_trained_draft_is_accepted_more_than_a_fresh_one_and_than_ngrams(
    trained: Path, settings: MakeSettings, tmp_path: Path
) -> None:
    train_draft(settings(steps=1, optimizer={"learning_rate": 0.0}), tmp_path, progress=False)
    fresh, learnt = card_of(tmp_path), card_of(trained)
    assert learnt["heldout_text"]["acceptance_length"] > fresh["heldout_text"]["acceptance_length"] + 2
    for drafting in ("chain", "tree"):
        length = learnt["decoding"][drafting]["acceptance_length"]
        assert length > fresh["decoding"][drafting]["acceptance_length"] + 2
        assert length > learnt["decoding"]["ngram"]["acceptance_length"] + 2


def test_decoding_with_it_gives_what_plain_decoding_gives(trained: Path, target: BlockFFNForCausalLM) -> None:
    draft = load_draft(trained, target.config)
    for prompt in (torch.arange(3, 15), torch.arange(280, 290)):
        speculation = Speculation(eagle_drafter(draft, target))
        decode_losslessly(ModelTarget(target), speculation, prompt.tolist(), 40)


def test_the_folder_is_known_and_belongs_to_its_target(trained: Path, target: BlockFFNForCausalLM) -> None:
    found, card = inspect(trained, tls_percent=80), card_of(trained)
    assert (found["kind"], found["card"], found["parameters"]) == ("draft", card, card["parameters"])
    weights = load_file(trained / "model" / "model.safetensors")
    assert card["parameters"] == sum(weight.numel() for weight in weights.values())
    assert not any("embed" in name or "head" in name for name in weights)
    for other, message in (
        (tiny_model("gqa", vocab_size=target.config.vocab_size, hidden_size=24), "another target"),
        (tiny_model("gqa"), "vocab_size"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_draft(trained, other.config)


@pytest.mark.parametrize("changes", [{}, {"unroll": 1, "draft_vocab_size": 60}], ids=["unrolled", "reduced"])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(
    tmp_path: Path, settings: MakeSettings, changes: dict[str, Any]
) -> None:
    chosen = settings(steps=9, log_every=4, **changes)
    train_draft(chosen, tmp_path / "whole", progress=False)
    stopped = train_draft(
        chosen, tmp_path / "parts", progress=False,
        on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None,
    )  # fmt: skip
    assert stopped.interrupted
    assert not (tmp_path / "parts" / "model").exists()
    resumed = train_draft(chosen, tmp_path / "parts", progress=False, resume=True)
    assert (resumed.step, resumed.tokens) == (9, 9 * 8 * 64)
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [comparable(r) for r in parts] == [comparable(r) for r in whole]
    bytes_of = [(tmp_path / p / "model" / "model.safetensors").read_bytes() for p in ("whole", "parts")]
    assert bytes_of[0] == bytes_of[1]


def test_a_reduced_vocabulary_is_the_datas_most_frequent_tokens(
    tmp_path: Path, settings: MakeSettings, circle: Path, target: BlockFFNForCausalLM
) -> None:
    train_draft(settings(steps=4, draft_vocab_size=60), tmp_path, progress=False)
    ids = read_frequencies(tmp_path / "model" / "freq_60.pt")
    assert ids == most_frequent(count_frequencies(circle), 60, always=(target.config.eos_token_id,)).tolist()
    draft = load_draft(tmp_path, target.config)
    assert draft.token_ids is not None
    assert draft.token_ids.tolist() == ids
    assert load_draft(tmp_path, target.config, vocabulary=target.config.vocab_size).token_ids is None
    assert card_of(tmp_path)["draft_vocab_size"] == 60
    decode_losslessly(ModelTarget(target), Speculation(eagle_drafter(draft, target)), list(range(3, 15)), 20)


def test_bfloat16_stays_near_float32(tmp_path: Path, settings: MakeSettings) -> None:
    train_draft(settings(steps=3), tmp_path / "a", progress=False)
    train_draft(settings(steps=3, precision="bfloat16", stored_dtype="bfloat16"), tmp_path / "b", progress=False)
    a, b = read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b")
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], rel=0.03)
    assert card_of(tmp_path / "b")["bytes"] < 0.6 * card_of(tmp_path / "a")["bytes"]


def test_a_fresh_draft_passes_the_targets_state_on(settings: MakeSettings, target: BlockFFNForCausalLM) -> None:
    draft = make_draft(settings(), target)
    with torch.no_grad():
        draft.fc.weight[:, : target.config.hidden_size] = 0
        hidden = target.model(torch.arange(5, 25)[None]).last_hidden_state
        out = draft(torch.randn_like(hidden), hidden)
    assert torch.nn.functional.cosine_similarity(out, hidden, dim=-1).min() > 0.999
    assert 0.5 < (out.norm() / hidden.norm()).item() < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "no target"),
        ({"data": {"folders": {"": 1.0}}}, "manifest"),
        ({"data": {"sequence_length": 2048}}, "exceeds the context"),
        ({"acceptance": {"new_tokens": 1020}}, "exceed the context"),
        ({"draft_vocab_size": 10**6}, "exceeds the target's vocabulary"),
        ({"draft": {"num_attention_heads": 3}}, "must be a multiple of"),
        ({"draft": {"head_dim": 7}}, "head_dim"),
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"token_weight": 0, "feature_weight": 0}, "nothing to learn"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"draft": {"width": 7}}, "unknown setting 'draft.width'"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    tmp_path: Path, settings: MakeSettings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_draft(settings(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_target_with_another_tokenizer_is_refused(tmp_path: Path, settings: MakeSettings, target_run: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target_run / "model", other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="another tokenizer"):
        train_draft(settings(target=str(other)), tmp_path / "run", progress=False)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, settings: MakeSettings) -> None:
    train_draft(settings(steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="already holds a run"):
        train_draft(settings(steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        train_draft(settings(steps=1), tmp_path / "new", progress=False, resume=True)


@pytest.mark.slow
def test_compiled_it_computes_the_same(tmp_path: Path, settings: MakeSettings) -> None:
    train_draft(settings(steps=2), tmp_path / "eager", progress=False)
    train_draft(settings(steps=2, compile=True), tmp_path / "compiled", progress=False)
    eager, compiled = read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled")
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in eager], rel=1e-4)
    assert [r["acceptance_length"] for r in compiled] == pytest.approx(
        [r["acceptance_length"] for r in eager], abs=0.01
    )


@pytest.mark.gpu
def test_on_a_gpu_it_learns_in_bfloat16_and_decodes(tmp_path: Path, settings: MakeSettings) -> None:
    train_draft(settings(steps=60, draft_vocab_size=200), tmp_path, progress=False, device="cuda")
    records = read_metrics(tmp_path)
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert card_of(tmp_path)["decoding"]["tree"]["acceptance_length"] > 3


def test_a_draft_is_kept_when_its_measurement_is_stopped(
    settings: MakeSettings, tmp_path: Path, target: BlockFFNForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockffn.training.draft.results.decoding_report", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_draft(settings(steps=2), tmp_path, progress=False)
    assert load_draft(tmp_path / "model", target.config)
    assert card_of(tmp_path)["steps"] == 2
    assert card_of(tmp_path)["decoding"] is None
    inspect(tmp_path / "model", tls_percent=80.0)
