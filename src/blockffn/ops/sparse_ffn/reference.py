"""The definition of the sparse FFN, written to be read. Everything else must agree with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops.quantization import PackedExperts


def sparse_ffn_reference(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    gate_proj_EFD: Tensor | None = None,
) -> Tensor:
    """Sum over experts in float32; each expert sees only the tokens that activate it (paper eq. 1 and 2)."""
    x, weights = x_TD.float(), weights_TE.float()
    out = torch.zeros_like(x)
    for e in range(up_proj_EFD.shape[0]):
        tokens = weights[:, e].nonzero().squeeze(-1)
        up = x[tokens] @ up_proj_EFD[e].float().T
        hidden = F.silu(up) if gate_proj_EFD is None else F.silu(x[tokens] @ gate_proj_EFD[e].float().T) * up
        out = out.index_add(0, tokens, weights[tokens, e, None] * (hidden @ down_proj_EFD[e].float()))
    return out.to(x_TD.dtype)


def sparse_ffn_packed_reference(x_TD: Tensor, experts: PackedExperts, weights_TE: Tensor, threshold: float) -> Tensor:
    """Unpack the experts, then apply the definition."""
    up, down, gate = experts.unpack()
    weights_TE = torch.where(weights_TE.abs() <= threshold, 0, weights_TE)
    return sparse_ffn_reference(x_TD, up, down, weights_TE, gate_proj_EFD=gate)
