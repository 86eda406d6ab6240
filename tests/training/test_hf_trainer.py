"""The `transformers.Trainer` subclass against the loss that the training loop defines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from blockffn.objectives import objective_counts
from blockffn.training.config import ObjectiveSettings
from blockffn.training.hf_trainer import BlockFFNTrainer
from blockffn.training.step import TrainingModel
from tests.models.conftest import tiny_model

OBJECTIVES = ObjectiveSettings(
    chunk_length=8,
    terms={
        "activation_locality": {"kind": "constant", "value": 0.3},
        "chunk_sparsification": {"kind": "constant", "value": 0.7},
    },
)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(count):
        documents = torch.tensor([0] * 10 + [1] * 4 + [-1] * 2)
        ids = torch.randint(3, 61, (16,))
        labels = torch.where(documents >= 0, ids, -100)
        labels[[0, 10]] = -100
        made.append({"input_ids": ids, "labels": labels, "document_ids": documents})
    return made


def trainer(folder: Path, data: list[dict[str, torch.Tensor]], **arguments: object) -> BlockFFNTrainer:
    options = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
               "remove_unused_columns": False, "disable_tqdm": True, "max_grad_norm": 1e9}  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**options, **arguments})
    return BlockFFNTrainer(model=tiny_model(), args=args, train_dataset=data, objectives=OBJECTIVES)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_its_loss_is_that_of_the_loop_for_any_accumulation(tmp_path: Path, accumulation: int) -> None:
    data = rows(4)
    instance = trainer(
        tmp_path, data, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    counts = {k: v.float() for k, v in objective_counts(batch["document_ids"], chunk_length=8).items()}
    counts["num_targets"] = (batch["labels"][:, 1:] >= 0).sum().float()
    positions = torch.tensor([[*range(10), *range(4), 0, 1]]).expand(4, -1)
    with torch.no_grad():
        out = TrainingModel(instance.model.cpu(), OBJECTIVES)(
            batch["input_ids"], batch["labels"], batch["document_ids"], positions, counts
        )
    expected = out.language_model + 0.3 * out.terms["activation_locality"] + 0.7 * out.terms["chunk_sparsification"]
    instance.train()
    logged = next(entry for entry in instance.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert logged["chunk_sparsification"] == pytest.approx(out.terms["chunk_sparsification"].item(), rel=1e-3)


def test_padded_rows_with_an_attention_mask_count_only_their_tokens(tmp_path: Path) -> None:
    ids = torch.randint(3, 61, (2, 16))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    instance = trainer(tmp_path, rows(1))
    padded = instance.compute_loss(instance.model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    cut = instance.compute_loss(instance.model, {"input_ids": ids[:, :8], "labels": labels[:, :8]})
    assert padded.item() == pytest.approx(cut.item(), rel=1e-5)
