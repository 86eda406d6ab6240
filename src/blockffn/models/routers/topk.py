"""The common top-k router: softmax over the experts, the k largest, renormalised to sum 1.

DeepSeek's (arXiv 2401.06066) is the same beside shared experts, which `blockffn.models.routers.shared` adds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockffn.models.routers.projection import RouterProjection
from blockffn.routing import Routing


class TopKRouter(nn.Module):
    """Maps tokens `[..., D]` to a `Routing` of `[..., E]` in float32 with k active experts a token.

    The shares are the probabilities over all experts, which load balancing wants. Gradient reaches the projection
    through the weights of the chosen experts and through the shares.

    Args:
        num_experts_per_tok: k.
        dtype, initializer_range: of the projection, see `RouterProjection`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        dtype: str = "model",
        initializer_range: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok must lie in 1…{num_experts}, got {num_experts_per_tok}")
        self.num_experts_per_tok = num_experts_per_tok
        self.proj = RouterProjection(hidden_size, num_experts, dtype=dtype, initializer_range=initializer_range)

    def forward(self, x: Tensor) -> Routing:
        logits = self.proj(x)
        probabilities = logits.softmax(dim=-1)
        chosen, experts = probabilities.topk(self.num_experts_per_tok, dim=-1)
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, experts, chosen)
        return Routing(logits=logits, shares=probabilities, weights=weights)
