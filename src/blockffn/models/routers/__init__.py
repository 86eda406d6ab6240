"""One file per routing method. A router maps `x [..., D]` to a `Routing`; `make_router` is the only dispatch."""

from __future__ import annotations

from typing import Any

from torch import nn

from blockffn.configuration import BlockFFNConfig
from blockffn.models.routers.relu import ReLURouter
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.models.routers.sparsemixer import SparseMixerRouter
from blockffn.models.routers.topk import TopKRouter


def make_router(config: BlockFFNConfig) -> nn.Module:
    """The router that `config.router_type` names, over the experts that are not shared."""
    sizes = (config.hidden_size, config.num_experts - config.num_shared_experts)
    num_chosen = config.num_experts_per_tok - config.num_shared_experts
    projection: dict[str, Any] = {"dtype": config.router_dtype, "initializer_range": config.router_initializer_range}
    match config.router_type:
        case "relu_rmsnorm":
            scale = config.router_scale_initializer
            eps = config.rms_norm_eps if config.router_norm_eps is None else config.router_norm_eps
            return ReLURMSNormRouter(*sizes, eps=eps, initial_scale=scale, **projection)
        case "relu":
            return ReLURouter(*sizes, **projection)
        case "relu_scaled":
            return ReLURouter(*sizes, initial_scale=config.router_scale_initializer, **projection)
        case "topk":
            return TopKRouter(*sizes, num_chosen, **projection)
        case "sparsemixer":
            return SparseMixerRouter(*sizes, num_chosen, jitter_noise=config.router_jitter_noise, **projection)
    raise ValueError(f"unknown router_type {config.router_type!r}")
