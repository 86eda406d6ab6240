"""Held-out loss, perplexity and bits per byte, with the sparsity of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.data.batch import Batch
from blockffn.metrics.cost import cost_summary
from blockffn.metrics.sparsity import SparsityMeter, SparsityReport
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.routing import Routing
from blockffn.training.language_model_loss import MAX_LOGIT_BYTES

Scores = tuple[Tensor, tuple[Routing, ...]]
WINDOWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Losses in nats a token; `bits_per_byte` needs the byte lengths of tokens.

    `sources` maps the name of a text source to its own tokens, loss and (for sparse models) sparsity. `cost` is what a
    token costs at the measured sparsity (`blockffn.metrics.cost`).
    """

    heldout_loss: float
    tokens: int
    bits_per_byte: float | None = None
    sparsity: SparsityReport | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.heldout_loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `evaluation.json` holds it."""
        values: dict[str, Any] = {
            "heldout_loss": self.heldout_loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }
        sources = {name: dict(row) for name, row in self.sources.items()}
        if self.sparsity is not None:
            report = self.sparsity.to_dict()
            for name, row in report.pop("sources", {}).items():
                sources.setdefault(name, {}).update({k: v for k, v in row.items() if k != "tokens"})
            values |= {k: v for k, v in report.items() if k != "tokens"}
        return values | {"sources": sources, "cost": self.cost}


@torch.no_grad()
def evaluate(
    model: BlockFFNForCausalLM,
    batches: Iterable[Batch],
    *,
    precision: str = "float32",
    token_bytes: np.ndarray | None = None,
    source_names: Sequence[str] = (),
    reference_counting: bool = False,
    score: Callable[[Batch], Scores] | None = None,
) -> Evaluation:
    """Score packed batches with the model as it is; its training mode is restored afterwards.

    Args:
        precision: `float32` (the weights' own dtype) or `bfloat16` (autocast).
        token_bytes: int `[V]`, bytes of text behind each token id; gives bits per byte.
        source_names: names behind `Batch.source_ids`; gives a row per source.
        reference_counting: count sparsity as the paper's code does instead of honestly (see `SparsityMeter`).
        score: computes the losses of a batch; default `token_losses` of the model. A sharded model brings its own.

    Raises:
        ValueError: there is no token to predict.
    """
    config, device = model.config, next(model.parameters()).device
    meter = None
    if config.ffn_type != "dense":
        meter = SparsityMeter(
            config.num_moe_layers,
            config.num_experts,
            windows=WINDOWS,
            reference_counting=reference_counting,
            num_sources=len(source_names),
            device=device,
        )
    lengths = None if token_bytes is None else torch.as_tensor(token_bytes, device=device)
    totals = torch.zeros(max(len(source_names), 1), 3, dtype=torch.float64, device=device)  # loss, tokens, bytes
    with _evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            losses, routings = token_losses(model, batch, precision=precision) if score is None else score(batch)
            _add_losses(totals, losses, batch, lengths)
            if meter is not None:
                meter.update(routings, batch.document_ids, batch.source_ids if source_names else None)
    loss, tokens, num_bytes = totals.sum(dim=0).tolist()
    if not tokens:
        raise ValueError("there is no token to predict in the held-out text; is the validation split empty?")
    sources = {
        name: {"tokens": int(row[1]), "loss": row[0] / row[1]}
        for name, row in zip(source_names, totals.tolist())
        if row[1]
    }
    sparsity = meter.compute(source_names or None) if meter is not None else None
    return Evaluation(
        heldout_loss=loss / tokens,
        tokens=int(tokens),
        bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None,
        sparsity=sparsity,
        sources=sources,
        cost=cost_summary(config, tls_percent=sparsity.tls if sparsity is not None else None),
    )


def token_losses(model: BlockFFNForCausalLM, batch: Batch, *, precision: str = "float32") -> Scores:
    """Cross entropy of each next token, float32 `[B * (T - 1)]` (0 where there is none), and the layers' routings.

    The logits of a few rows at a time are held, not those of the batch.
    """
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        out = model.model(
            batch.input_ids,
            document_ids=batch.document_ids,
            position_ids=batch.position_ids,
            output_routing=True,
            use_cache=False,
        )
        hidden = model.head_input(out.last_hidden_state)[:, :-1].flatten(0, 1)
        targets = batch.labels[:, 1:].flatten()
        rows = max(1, MAX_LOGIT_BYTES // (4 * model.config.vocab_size))
        losses = [
            F.cross_entropy(model.lm_head(h).float(), t, ignore_index=-100, reduction="none")
            for h, t in zip(hidden.split(rows), targets.split(rows))
        ]
    return torch.cat(losses), out.routings or ()


def _add_losses(totals: Tensor, losses: Tensor, batch: Batch, lengths: Tensor | None) -> None:
    """Add each source's summed loss, number of targets and bytes of text to `totals [S, 3]`."""
    targets = batch.labels[:, 1:].reshape(-1)
    counted = targets != -100
    num_bytes = torch.zeros_like(losses) if lengths is None else lengths[targets.clamp_min(0)] * counted
    rows = torch.stack([losses, counted.to(losses.dtype), num_bytes.to(losses.dtype)], dim=-1).double()
    source = batch.source_ids[:, 1:].reshape(-1).long() if len(totals) > 1 else torch.zeros_like(targets)
    totals.index_add_(0, source.clamp_min(0), rows * counted[:, None])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without compiling again layers that were compiled for training."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
