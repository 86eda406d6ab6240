"""What a draft's card says of decoding with it."""

from __future__ import annotations

import pytest
import torch

from blockffn.evaluation.draft_acceptance import decoding_report
from blockffn.models.draft import DraftModel
from blockffn.training.draft.settings import AcceptanceSettings
from tests.models.conftest import tiny_model

SETTINGS = AcceptanceSettings(prompts=3, prompt_tokens=4, new_tokens=24, chain=3, top_k=6, depth=3, nodes=20)


def test_the_calibration_counts_what_chains_and_trees_of_the_draft_offered() -> None:
    torch.manual_seed(0)
    model = tiny_model("gqa")
    draft = DraftModel(model.config).eval()
    report = decoding_report(model, draft, list(torch.randint(0, 61, (3, 4))), SETTINGS)
    ways = [report[name] for name in ("chain", "tree")]
    accepted = sum((way["acceptance_length"] - 1) * way["verifications"] for way in ways)
    first, later = report["calibration"]["first"], report["calibration"]["later"]
    assert accepted > 0
    assert report["ngram"]["acceptance_length"] > 1  # and yet its tokens are not among them
    assert sum(rate * offered for _, rate, offered in (*first, *later)) == pytest.approx(accepted, abs=0.1)
    # A verification offers one first child of the root, and of each accepted node above the last level; the last one of
    # a text may be of no drafts.
    verifications = sum(way["verifications"] for way in ways)
    assert verifications - 2 * 3 <= sum(offered for *_, offered in first) <= verifications + accepted
    for rows in (first, later):
        assert rows == sorted(rows)
        assert all(0 < probability < 1 for probability, *_ in rows)


def test_without_texts_nothing_is_measured() -> None:
    model = tiny_model("gqa")
    report = decoding_report(model, DraftModel(model.config).eval(), [], SETTINGS)
    assert report == {"chain": None, "tree": None, "ngram": None, "calibration": None}
