"""`RouterProjection`: the linear map at the head of every router, in the precision that the configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RouterProjection(nn.Linear):
    """Tokens `[..., D]` to float32 logits `[..., E]`, without bias.

    Args:
        dtype: `model` multiplies in the dtype of tokens and weight (bfloat16 under autocast) and rounds the logits to
            it. `float32` multiplies in float32 whatever they are: logits near 0, where ReLU and a sharp sigmoid decide,
            are then not rounded to 8 bits.
        initializer_range: standard deviation of the initial weights; `None`: as the model's other matrices.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, dtype: str = "model", initializer_range: float | None = None
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=False)
        if dtype not in ("model", "float32"):
            raise ValueError(f"the router's dtype must be model or float32, got {dtype!r}")
        self.router_dtype = dtype
        if initializer_range is not None:
            self.initializer_std = initializer_range

    def forward(self, x: Tensor) -> Tensor:
        if self.router_dtype == "model":
            return super().forward(x).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())
