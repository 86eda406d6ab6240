"""One file per routing method. A router maps `x [..., D]` to a `Routing`; `make_router` is the only dispatch."""

from __future__ import annotations

from torch import nn

from blockffn.configuration import BlockFFNConfig
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter


def make_router(config: BlockFFNConfig) -> nn.Module:
    """The router that `config.router_type` names."""
    match config.router_type:
        case "relu_rmsnorm" | "relu":
            return ReLURMSNormRouter(
                config.hidden_size,
                config.num_experts,
                eps=config.rms_norm_eps,
                use_norm=config.router_type == "relu_rmsnorm",
            )
    raise ValueError(f"unknown router_type {config.router_type!r}")
