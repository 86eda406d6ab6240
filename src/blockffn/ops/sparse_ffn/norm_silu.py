"""Experts with DECO's activation NormSiLU (arXiv 2605.10933, as its published training code has it).

With `u = W_up x` over all experts, `NormSiLU(u) = SiLU(RMSNorm(u - mean(u)))`: the mean is that of all `E · F` units
of the token, the norm is within each expert, with one learned scale of `[F]` for all of them. The mean is linear in
`x`, so an engine that reads active experts only can take it from one precomputed vector; no such kernel exists here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def norm_silu_ffn(
    x_TD: Tensor,
    up_proj_EFD: Tensor,
    down_proj_EFD: Tensor,
    weights_TE: Tensor,
    *,
    norm: Callable[[Tensor], Tensor],
    backend: str = "auto",
) -> Tensor:
    """`sum_e weights[:, e] * down_e(NormSiLU(up(x))_e)` as `[T, D]`, all experts computed; differentiable.

    Args:
        norm: the RMS norm over the last dimension, F. Other tensors as in `blockffn.ops.sparse_ffn`.

    Raises:
        ValueError: a backend other than `auto` and `dense`.
    """
    if backend not in ("auto", "dense"):
        raise ValueError(
            f"backend {backend!r} cannot compute NormSiLU experts: it has no mean over all experts; use 'dense'"
        )
    num_experts, width, hidden_size = up_proj_EFD.shape
    up = F.linear(x_TD, up_proj_EFD.reshape(-1, hidden_size))
    centred = up - up.mean(dim=-1, keepdim=True)
    hidden = F.silu(norm(centred.view(-1, num_experts, width)))
    weighted = hidden * weights_TE.unsqueeze(-1)
    return weighted.view(-1, num_experts * width) @ down_proj_EFD.reshape(-1, hidden_size)
