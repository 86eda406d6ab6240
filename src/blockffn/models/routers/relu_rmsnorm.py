"""BlockFFN's router: `RMSNorm(ReLU(W x))` (arXiv 2507.08771, eq. 3).

ReLU decides which experts are active, so every token picks its own number of experts and the choice is differentiable.
The norm learns the magnitude, so that penalties on the pattern do not shrink what the experts contribute.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.models.normalization import RMSNorm
from blockffn.models.routers.projection import RouterProjection
from blockffn.models.routers.relu import shares_of
from blockffn.routing import Routing


class ReLURMSNormRouter(nn.Module):
    """Maps tokens `[..., D]` to a `Routing` of `[..., E]` in float32, whatever the dtype of the tokens.

    Args:
        eps: epsilon of the norm. initial_scale: start of its learned factors.
        dtype, initializer_range: of the projection, see `RouterProjection`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        eps: float = 1e-5,
        initial_scale: float = 1.0,
        dtype: str = "model",
        initializer_range: float | None = None,
    ) -> None:
        super().__init__()
        self.proj = RouterProjection(hidden_size, num_experts, dtype=dtype, initializer_range=initializer_range)
        self.norm = RMSNorm(num_experts, eps=eps, initial=initial_scale)

    def forward(self, x: Tensor) -> Routing:
        logits = self.proj(x)
        activated = F.relu(logits)
        return Routing(logits=logits, shares=shares_of(activated), weights=self.norm(activated))
