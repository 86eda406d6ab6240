"""Expert weights, and the gated dense FFN that serves as the control."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.models.normalization import RMSNorm
from blockffn.ops.sparse_ffn import sparse_ffn
from blockffn.ops.sparse_ffn.norm_silu import norm_silu_ffn


class RoutedExperts(nn.Module):
    """`num_experts` non-gated SiLU experts without bias (paper eq. 2), stored contiguous per expert.

    Parameters `up_proj [E, F, D]`, `down_proj [E, F, D]` (transposed, so that one active expert is one read) and, for
    gated experts, `gate_proj [E, F, D]`. With the activation `norm_silu`, `activation_norm.weight [F]`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        width: int,
        *,
        gated: bool = False,
        activation: str = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if activation not in ("silu", "norm_silu") or (gated and activation != "silu"):
            raise ValueError(f"experts have the activation silu or, if not gated, norm_silu; got {activation!r}")
        shape = (num_experts, width, hidden_size)
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape))
        self.gate_proj = nn.Parameter(torch.empty(shape)) if gated else None
        self.activation_norm = RMSNorm(width, eps=eps) if activation == "norm_silu" else None
        self.backend = "auto"

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[..., D]` and routing weights `[..., E]` to `[..., D]`."""
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TE = weights.reshape(-1, weights.shape[-1]).to(x.dtype)
        if self.activation_norm is not None:
            y_TD = norm_silu_ffn(
                x_TD, self.up_proj, self.down_proj, weights_TE, norm=self.activation_norm, backend=self.backend
            )
        else:
            y_TD = sparse_ffn(
                x_TD, self.up_proj, self.down_proj, weights_TE, gate_proj_EFD=self.gate_proj, backend=self.backend
            )
        return y_TD.view(x.shape)

    def extra_repr(self) -> str:
        experts, width, hidden = self.up_proj.shape
        return f"num_experts={experts}, width={width}, hidden_size={hidden}, gated={self.gate_proj is not None}"


class GatedFFN(nn.Module):
    """`down(silu(gate x) * up x)`: the feed-forward network of a dense Transformer."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
