"""How far a model has moved from another: relative difference of logits, divergence, perplexity of both, sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blockffn.models.causal_lm import BlockFFNForCausalLM


@dataclass(frozen=True)
class Stage:
    """A line of the receipt.

    Attributes:
        name: of the stage.
        difference: norm of the logits' difference over the norm of the original's logits.
        divergence: mean over tokens of `KL(original ‖ model)`, in nats.
        perplexity: of the model on the passages.
        tls: token-level sparsity in percent; `None` for a model without experts.
    """

    name: str
    difference: float
    divergence: float
    perplexity: float
    tls: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compare(name: str, original: BlockFFNForCausalLM, model: BlockFFNForCausalLM, passages: Sequence[Tensor]) -> Stage:
    """Run both models on the passages (token ids `[1, T]`), each on its own device, and compare their logits."""
    squares = torch.zeros(2, dtype=torch.float64)
    divergence = loss = active = routed = 0.0
    predicted = 0
    for passage in passages:
        wanted = original(passage.to(original.device), use_cache=False).logits[0].float()
        out = model(passage.to(model.device), use_cache=False, output_routing=True)
        found = out.logits[0].float().to(wanted.device)
        squares += torch.stack([(found - wanted).square().sum(), wanted.square().sum()]).double().cpu()
        log_wanted, log_found = wanted.log_softmax(-1), found.log_softmax(-1)
        divergence += float((log_wanted.exp() * (log_wanted - log_found)).sum())
        loss -= float(log_found[:-1].gather(-1, passage[0, 1:, None].to(wanted.device)).sum())
        predicted += len(wanted) - 1
        for routing in out.routings or ():
            active += float((routing.weights != 0).sum())
            routed += routing.weights.numel()
    tokens = predicted + len(passages)
    return Stage(
        name,
        difference=float((squares[0] / squares[1]).sqrt()),
        divergence=divergence / tokens,
        perplexity=math.exp(min(loss / predicted, 700.0)),
        tls=100 * (1 - active / routed) if routed else None,
    )
