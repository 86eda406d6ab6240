"""All experts as two matrix products: what training uses, since nearly every expert is active in a large batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def sparse_ffn_dense(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """Compute every expert for every token; differentiable in all arguments."""
    num_experts, width, hidden_size = up_proj_EFD.shape
    up = F.linear(x_TD, up_proj_EFD.reshape(-1, hidden_size))
    if gate_proj_EFD is None:
        hidden = F.silu(up)
    else:
        hidden = F.silu(F.linear(x_TD, gate_proj_EFD.reshape(-1, hidden_size))) * up
    weighted = hidden.view(-1, num_experts, width) * weights_TE.unsqueeze(-1)
    return weighted.view(-1, num_experts * width) @ down_proj_EFD.reshape(-1, hidden_size)
