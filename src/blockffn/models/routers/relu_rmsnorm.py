"""BlockFFN's router: `RMSNorm(ReLU(W x))` (arXiv 2507.08771, eq. 3).

ReLU decides which experts are active, so every token picks its own number of experts and the choice is differentiable.
The norm learns the magnitude, so that penalties on the pattern do not shrink what the experts contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.models.normalization import RMSNorm
from blockffn.routing import Routing


class ReLURMSNormRouter(nn.Module):
    """Maps tokens `[..., D]` to a `Routing` of `[..., E]` in float32, whatever the dtype of the tokens.

    Args:
        use_norm: `False` multiplies experts by the bare ReLU output, the paper's ablation without the norm.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, eps: float = 1e-5, use_norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, num_experts, bias=False)
        self.norm = RMSNorm(num_experts, eps=eps) if use_norm else None

    def forward(self, x: Tensor) -> Routing:
        logits = self.proj(x).float()
        activated = F.relu(logits)
        # bf16 is too coarse for shares near 1, and the norm's variance needs float32 anyway.
        total = activated.sum(dim=-1, keepdim=True)
        shares = activated / total.clamp_min(torch.finfo(torch.float32).tiny)
        weights = activated if self.norm is None else self.norm(activated)
        return Routing(logits=logits, shares=shares, weights=weights)
