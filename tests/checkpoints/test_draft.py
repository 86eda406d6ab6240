"""The EAGLE draft computes what its tensors define."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

import blockffn
from blockffn.checkpoints.draft import load_draft, read_calibration, save_draft
from blockffn.checkpoints.files import CheckpointError
from tests.checkpoints import published, straight_line

IDS = torch.arange(11) * 7 % published.VOCAB


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    target = published.write_bin(tmp_path / "target", published.weights("3b-sft"), published.config("3b-sft"))
    return target, published.write_bin(tmp_path / "draft", published.draft_weights(), published.DRAFT)


@torch.no_grad()
def test_the_draft_equals_its_parts_written_out(folders: tuple[Path, Path]) -> None:
    target = blockffn.load(folders[0])
    draft = load_draft(folders[1], target.config)
    state, settings = published.weights("3b-sft"), published.config("3b-sft")
    hidden = straight_line.hidden_states(state, settings, IDS)
    embeddings = state["model.embed_tokens.weight"][IDS] * 12
    weights = published.draft_weights()
    expected = straight_line.draft(weights, published.DRAFT, embeddings[1:], hidden[:-1], eps=1e-5)
    from_target = target.model(IDS[None]).last_hidden_state
    embedded = target.model.embed_tokens(IDS[None]) * target.config.scale_emb
    found = draft(embedded[:, 1:], from_target[:, :-1])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    head = target.lm_head.weight
    torch.testing.assert_close(draft.logits(found, head)[0], expected / (64 / 16) @ head.T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_frequency_file_restricts_and_maps_the_proposals(folders: tuple[Path, Path]) -> None:
    target = blockffn.load(folders[0])
    (folders[1] / "freq_5.pkl").write_bytes(pickle.dumps([50, 3, 17, 4, 9]))
    draft = load_draft(folders[1], target.config)
    x = torch.randn(1, 2, 64)
    full = load_draft(folders[1], target.config, vocabulary=published.VOCAB)
    logits = draft.logits(x, target.lm_head.weight)
    torch.testing.assert_close(logits, full.logits(x, target.lm_head.weight)[..., [50, 3, 17, 4, 9]])
    assert draft.proposed_ids(torch.tensor([0, 2])).tolist() == [50, 17]


@torch.no_grad()
@pytest.mark.parametrize("as_published", [False, True], ids=["ours", "published"])
def test_a_draft_is_written_and_read_again(folders: tuple[Path, Path], tmp_path: Path, as_published: bool) -> None:
    target = blockffn.load(folders[0])
    (folders[1] / "freq_5.pkl").write_bytes(pickle.dumps([50, 3, 17, 4, 9]))
    draft = load_draft(folders[1], target.config, vocabulary=5)
    for out in ("first", "second"):
        (tmp_path / out).mkdir()
        save_draft(tmp_path / out, draft, dtype=torch.float32, published=as_published)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["config.json", "freq_5.pkl" if as_published else "freq_5.pt", "model.safetensors"]
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in files)
    again = load_draft(tmp_path / "first", target.config)
    assert again.token_ids is not None
    assert again.token_ids.tolist() == [50, 3, 17, 4, 9]
    x = torch.randn(2, 1, 7, 64)
    assert torch.equal(again(*x), draft(*x))


def test_without_a_frequency_file_all_tokens_are_proposed(folders: tuple[Path, Path]) -> None:
    target = blockffn.load(folders[0])
    assert load_draft(folders[1], target.config).token_ids is None
    assert load_draft(folders[1], target.config, vocabulary=published.VOCAB).token_ids is None
    with pytest.raises(CheckpointError, match=r"freq_16\.pt is missing"):
        load_draft(folders[1], target.config, vocabulary=16)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('executed', 'w')",)


@pytest.mark.parametrize("ids", [[1, 1, 2], [1, 2, 999], ["a", "b", "c"], Payload()])
def test_a_wrong_or_hostile_frequency_file_is_refused(
    folders: tuple[Path, Path], ids: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[1])
    target = blockffn.load(folders[0])
    (folders[1] / "freq_3.pkl").write_bytes(pickle.dumps(ids))
    with pytest.raises(CheckpointError, match="freq_3"):
        load_draft(folders[1], target.config, vocabulary=3)
    assert not (folders[1] / "executed").exists()


def test_a_draft_of_another_target_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = published.write_bin(tmp_path / "other", published.weights("small"), published.config("small"))
    with pytest.raises(CheckpointError, match="another target"):
        load_draft(folders[1], blockffn.load(other).config)
    with pytest.raises(CheckpointError, match="holds no draft"):
        load_draft(other, blockffn.load(other).config)


def test_a_draft_opened_as_a_model_is_told_where_it_belongs(folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=f"EAGLE draft; .* generate MODEL --speculative {folders[1]}"):
        blockffn.load(folders[1])


def test_the_calibration_of_a_draft_is_read_from_its_card_where_it_has_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_calibration(tmp_path) is None
    card = tmp_path / "draft.json"
    for content in ({}, {"decoding": None}, {"decoding": {"calibration": None}}):
        card.write_text(json.dumps(content))
        assert read_calibration(tmp_path) is None
    rows = {"first": [[0.25, 0.8, 40]], "later": []}
    card.write_text(json.dumps({"decoding": {"calibration": rows}}))
    assert read_calibration(tmp_path) == rows


@pytest.mark.parametrize("decoding", [
    [1], *({"calibration": calibration} for calibration in (
        [], {"first": []}, {"first": [[0.5, 2, 1]], "later": []}, {"first": 3, "later": []},
        {"first": [[0.5, 0.5]], "later": []}, {"first": [], "later": [[0.5, 0.5, math.inf]]},
        {"first": [[math.nan, 0.5, 1]], "later": []},
    )),
])  # fmt: skip
def test_a_calibration_that_makes_no_sense_is_refused(tmp_path: Path, decoding: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "draft.json").write_text(json.dumps({"decoding": decoding}))
    with pytest.raises(CheckpointError, match="rows of a probability") as refused:
        read_calibration(tmp_path)
    assert f"got {decoding['calibration'] if isinstance(decoding, dict) else decoding}" in str(refused.value)
