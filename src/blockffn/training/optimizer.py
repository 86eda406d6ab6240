"""AdamW with the paper's parameter groups (muP-like: matrices learn at a rate divided by the width multiplier)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.training.config import OptimizerSettings

ROUTER, MATRICES, UNSCALED = "router", "matrices", "unscaled"


def parameter_group(name: str) -> str:
    """The group of a parameter: `router` (its projection), `unscaled` (embeddings, head, layer norms) or `matrices`.

    The router's norm learns with the matrices, as in the published recipe.
    """
    if ".router.proj" in name:
        return ROUTER
    if "embed_tokens" in name or "lm_head" in name:
        return UNSCALED
    return UNSCALED if "norm" in name and ".router." not in name else MATRICES


def make_optimizer(model: BlockFFNForCausalLM | DraftModel, settings: OptimizerSettings) -> Optimizer:
    """AdamW over three groups, each with `peak_lr` and `name`; weight decay on all parameters, as published."""
    groups: dict[str, list[nn.Parameter]] = {ROUTER: [], MATRICES: [], UNSCALED: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter_group(name)].append(parameter)
    matrix_lr = settings.learning_rate / model.config.width_multiplier
    router_lr = matrix_lr if settings.router_learning_rate is None else settings.router_learning_rate
    peak = {ROUTER: router_lr, MATRICES: matrix_lr, UNSCALED: settings.learning_rate}
    return AdamW(
        [{"params": p, "lr": peak[n], "peak_lr": peak[n], "name": n} for n, p in groups.items() if p],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(optimizer: Optimizer, limit: float) -> torch.Tensor:
    """Clip the router's gradient and all others', each to norm `limit`; returns the norm of all before that."""
    router = [p for g in optimizer.param_groups if g["name"] == ROUTER for p in g["params"]]
    others = [p for g in optimizer.param_groups if g["name"] != ROUTER for p in g["params"]]
    norms = [clip_grad_norm_(parameters, limit, foreach=None) for parameters in (router, others) if parameters]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return get_total_norm(norms)
