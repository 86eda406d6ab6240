"""ReLU routers without a norm: ReMoE's (arXiv 2412.14711) and, with a learned factor per expert, DECO's (2605.10933).

As in BlockFFN, ReLU decides which experts are active, and how many. Without the norm, a penalty on how many there are
also pulls on how much they contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.models.routers.projection import RouterProjection
from blockffn.routing import Routing


class ReLURouter(nn.Module):
    """Maps tokens `[..., D]` to a `Routing` of `[..., E]` in float32.

    Args:
        initial_scale: `None` multiplies experts by the bare ReLU output. A number multiplies that by a learned factor
            per expert, which starts there; the shares do not see the factor.
        dtype, initializer_range: of the projection, see `RouterProjection`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        initial_scale: float | None = None,
        dtype: str = "model",
        initializer_range: float | None = None,
    ) -> None:
        super().__init__()
        self.proj = RouterProjection(hidden_size, num_experts, dtype=dtype, initializer_range=initializer_range)
        self.scale = None if initial_scale is None else ExpertScale(num_experts, initial_scale)

    def forward(self, x: Tensor) -> Routing:
        logits = self.proj(x)
        activated = F.relu(logits)
        weights = activated if self.scale is None else self.scale(activated)
        return Routing(logits=logits, shares=shares_of(activated), weights=weights)


class ExpertScale(nn.Module):
    """A learned factor per expert, `initial` at the start."""

    def __init__(self, num_experts: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((num_experts,), initial))

    def forward(self, activated: Tensor) -> Tensor:
        return activated * self.weight.to(activated.dtype)


def shares_of(activated: Tensor) -> Tensor:
    """Each token's activations `[..., E]` over their sum, in float32; all 0 if none is active.

    bfloat16 is too coarse for shares near 1.
    """
    total = activated.sum(dim=-1, keepdim=True)
    return activated / total.clamp_min(torch.finfo(torch.float32).tiny)
