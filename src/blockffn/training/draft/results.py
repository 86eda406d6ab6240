"""What a draft's training yields: acceptance on held-out text, the draft's folder, and its card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockffn.checkpoints.draft import CARD, load_draft, save_draft
from blockffn.data.batch import Batch
from blockffn.data.loader import iterate_split
from blockffn.evaluation.draft_acceptance import decoding_report
from blockffn.evaluation.draft_trees import prefixes_of
from blockffn.training.draft.objective import DraftObjective
from blockffn.training.draft.settings import DraftTrainSettings


def rates(accepted: Sequence[float], tried: Sequence[float]) -> dict[str, Any]:
    """Acceptance by depth, and the length of a chain of that depth: the target's token and those accepted before."""
    by_depth = [a / t if t else 0.0 for a, t in zip(accepted, tried)]
    length, reached = 1.0, 1.0
    for rate in by_depth:
        reached *= rate
        length += reached
    return {"acceptance_length": length, "acceptance_by_depth": by_depth}


def heldout_acceptance(objective: DraftObjective, settings: DraftTrainSettings) -> dict[str, Any]:
    """`rates` on rows of the first folder's validation split: what the target would accept if the text were its own."""
    counts: list[Tensor] = []
    with torch.compiler.set_stance("force_eager"):
        for batch in _heldout_rows(settings):
            counts.append(torch.stack(objective.acceptance(batch, depth=settings.evaluate_depth)).double())
    accepted, tried = torch.stack(counts).sum(dim=0).tolist()
    return rates(accepted, tried)


def save_run(
    folder: Path, objective: DraftObjective, settings: DraftTrainSettings, *, progress: dict[str, float]
) -> None:
    """Write draft and card, then measure acceptance and add it to the card.

    The target decodes with the draft as it was written. Stopped while it measures, the draft is there and usable.
    """
    assert settings.target is not None
    target, draft = objective.target, objective.draft
    torn = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    name = Path(settings.target).resolve().name
    save_draft(torn, draft, dtype=getattr(torch, settings.stored_dtype), about={"target": name})
    card: dict[str, Any] = {
        "target": name,
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "bytes": (torn / "model.safetensors").stat().st_size,
        "draft_vocab_size": target.config.vocab_size if draft.token_ids is None else len(draft.token_ids),
        **progress,
        "heldout_text": None,
        "decoding": None,
    }
    _write_card(torn, card)
    shutil.rmtree(folder, ignore_errors=True)
    torn.rename(folder)
    stored = load_draft(folder, target.config, dtype=target.dtype).to(target.device)
    card["heldout_text"] = heldout_acceptance(objective, settings)
    card["decoding"] = decoding_report(target, stored, _prompts(settings), settings.acceptance)
    _write_card(folder, card)


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    torn = folder / (CARD + ".tmp")
    torn.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    torn.replace(folder / CARD)


def _prompts(settings: DraftTrainSettings) -> list[Tensor]:
    """Beginnings of held-out texts; none where all texts are shorter."""
    wanted = settings.acceptance
    found: list[Tensor] = []
    for batch in _heldout_rows(settings):
        found += prefixes_of(batch.document_ids, batch.input_ids, length=wanted.prompt_tokens)
    return found[: wanted.prompts]


def _heldout_rows(settings: DraftTrainSettings) -> Iterator[Batch]:
    return iterate_split(
        next(iter(settings.data.folders)),
        "valid",
        sequence_length=settings.data.sequence_length,
        batch_size=min(settings.batch_size, settings.evaluate_rows),
        align=settings.data.align,
        max_rows=settings.evaluate_rows,
    )
