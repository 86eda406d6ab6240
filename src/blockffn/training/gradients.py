"""Gradients of one optimisation step, exact for any split of its rows into micro-batches and over ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blockffn.data.batch import Batch, to_device
from blockffn.metrics.units import complete_windows
from blockffn.models.packed_attention import document_offsets
from blockffn.objectives import objective_counts
from blockffn.training.coefficients import Coefficient
from blockffn.training.config import TrainSettings
from blockffn.training.distributed import World, gradient_sync
from blockffn.training.statistics import CLS_WINDOW


def step_gradients(
    wrapped: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    coefficients: Mapping[str, Coefficient],
    step: int,
    world: World,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients of one step, summed over micro-batches; returns this rank's part of each logged number.

    Every part of the loss is divided by its count over the whole step and all ranks, so the result does not depend on
    how the rows are split. Data-parallel wrappers average gradients over ranks, hence the factor `world.size`.
    """
    counts = objective_counts(batch.document_ids, chunk_length=settings.objectives.chunk_length)
    counts["num_targets"] = (batch.labels[:, 1:] >= 0).sum()
    num_windows = complete_windows(batch.document_ids, CLS_WINDOW).sum()
    names = sorted(counts)
    local = to_device(torch.stack([counts[name].double() for name in names]), world.device)
    summed = world.sum(local.clone())
    counts = {name: summed[i].float() for i, name in enumerate(names)}

    rows = batch.input_ids.shape[0]
    micro = min(settings.micro_batch_size or rows, rows)
    starts = range(0, rows, micro)
    values: dict[str, Tensor] = {}
    loads: Tensor | None = None
    for start in starts:
        part = batch.rows(start, start + micro)
        offsets = to_device(document_offsets(part.document_ids), world.device)
        part = part.to(world.device)
        with gradient_sync(wrapped, enabled=start == starts[-1]):
            out = wrapped(part.input_ids, part.labels, part.document_ids, part.position_ids, counts, offsets)
            loss = out.language_model if out.distillation is None else out.distillation
            for name, term in out.terms.items():
                loss = loss + coefficients[name].value(step) * term
            (loss * world.size).backward()
        parts = {"language_model": out.language_model, **out.terms}
        if out.distillation is not None:
            parts["distillation"] = out.distillation
        if out.expert_tokens is not None:
            loads = out.expert_tokens if loads is None else loads + out.expert_tokens
            parts |= {"active": out.expert_tokens.sum(), "active_in_windows": out.active_in_windows.sum()}
        for name, value in parts.items():
            value = value.detach().double()
            values[name] = values[name] + value if name in values else value
    values["num_windows"] = to_device(num_windows.double(), world.device)
    values["num_tokens"] = local[names.index("num_tokens")]
    values["num_targets"] = counts["num_targets"] / world.size
    return values, loads
