"""The operations of a decode step in torch: their definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops.decode.inputs import Router, StepInputs
from blockffn.ops.sparse_ffn import sparse_ffn


def add_norm(
    x: Tensor, norm: Tensor, *, eps: float, branch: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`x + scale * branch` and its RMS norm, both `[T, D]`."""
    if branch is not None:
        x = x + scale * branch
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return x, norm.to(x.dtype) * normed.to(x.dtype)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The normed residual sum times `weight [O, D]`, `[T, O]`, and the sum itself, `[T, D]`.

    With `up [O, D]` the product is the gated unit `silu(weight h) * (up h)`.
    """
    x, normed = add_norm(x, norm, eps=eps, branch=branch, scale=scale)
    out = F.linear(normed, weight)
    return (out if up is None else F.silu(out) * F.linear(normed, up)), x


def norm_route(
    x: Tensor,
    router: Router,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    inputs: StepInputs,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """BlockFFN's routing weights of the normed residual sum into `out [T, E]`, 0 for padding; the sum and its norm."""
    x, normed = add_norm(x, norm, eps=eps, branch=branch, scale=scale)
    weight = router.weight
    logits = F.linear(normed.float(), weight.float()) if router.float32 else F.linear(normed, weight).float()
    weights = add_norm(F.relu(logits), router.norm.float(), eps=router.eps)[1]
    inactive = (weights.abs() <= router.threshold) | padding(inputs).unsqueeze(-1)
    out.copy_(torch.where(inactive, 0, weights))
    return x, normed


def norm_route_experts(
    x: Tensor,
    router: Router,
    *,
    norm: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: float = 1.0,
    inputs: StepInputs,
    out: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`norm_route`, then the experts that are not gated: the residual sum and the experts' output, both `[T, D]`.

    Args:
        up_proj, down_proj: `[E, F, D]`. backend: of `sparse_ffn`.
    """
    x, normed = norm_route(x, router, norm=norm, eps=eps, branch=branch, scale=scale, inputs=inputs, out=out)
    return x, sparse_ffn(normed, up_proj, down_proj, out, backend=backend)


def padding(inputs: StepInputs) -> Tensor:
    """Which tokens are padding, `[T]` bool."""
    return torch.arange(inputs.num_tokens, device=inputs.data.device) >= inputs.count


def linear(x: Tensor, weight: Tensor, *, float_output: bool = False) -> Tensor:
    """`[T, D]` times `weight [O, D]`: `[T, O]`, in float32 if asked for."""
    out = F.linear(x, weight)
    return out.float() if float_output else out


def grouped_attention(
    qkv: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs, *, heads: int, scaling: float
) -> Tensor:
    """Grouped-query attention of a step; its rotated keys and its values go to the cache.

    Args:
        qkv: `[T, (H + 2 H') * W]`, queries, keys and values before rotation.
        cache: `[S, 2 H' * W]`, keys, then values.
        cos, sin: `[S', W]` by position.

    Returns:
        `[T, H * W]`.
    """
    T, width = len(qkv), cos.shape[-1]
    query, key, value = qkv.view(T, -1, width).split([heads, *[cache.shape[-1] // (2 * width)] * 2], dim=1)
    query, key = (_rotate(part, cos, sin, inputs) for part in (query, key))
    _write(cache, torch.cat((key.flatten(1), value.flatten(1)), dim=-1), inputs)
    keys, values = (part.unflatten(-1, (-1, width)).transpose(0, 1) for part in cache.chunk(2, dim=-1))
    groups = heads // len(keys)
    keys, values = (part.repeat_interleave(groups, dim=0) for part in (keys, values))
    out = _attend(query.transpose(0, 1), keys, values, inputs, scaling)
    return out.transpose(0, 1).flatten(1)


def latent_attention(
    q_latent: Tensor,
    q: Tensor,
    latents: Tensor,
    cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    inputs: StepInputs,
    *,
    norm: Tensor,
    eps: float,
    scaling: float,
) -> Tensor:
    """Latent attention with absorbed projections; normed latents and rotated keys of the step go to the cache.

    Args:
        q_latent: `[H, T, R]`, queries carried to the latents.
        q: `[T, H, N + P]`, whose last P numbers are the queries to rotate.
        latents: `[T, R + P]`, latents before their norm and keys before rotation.
        cache: `[S, R + P]`. norm: `[R]`, of the latents.

    Returns:
        `[T, H, R]`, mean latents.
    """
    rank, rope = q_latent.shape[-1], cos.shape[-1]
    latent, k_rope = latents.split([rank, rope], dim=-1)
    latent = add_norm(latent, norm, eps=eps)[1]
    k_rope = _rotate(k_rope.unsqueeze(1), cos, sin, inputs).squeeze(1)
    _write(cache, torch.cat((latent, k_rope), dim=-1), inputs)
    q_rope = _rotate(q[..., -rope:], cos, sin, inputs).transpose(0, 1)
    query = torch.cat((q_latent, q_rope), dim=-1)
    keys = cache.expand(len(query), -1, -1)
    return _attend(query, keys, keys[..., :rank], inputs, scaling).transpose(0, 1)


def count_active(weights_LTE: Tensor) -> Tensor:
    """`[L, 1 + T]` int64: experts that the tokens activate together, then those of each token."""
    is_active = weights_LTE != 0
    return torch.cat((is_active.any(dim=1).sum(dim=-1, keepdim=True), is_active.sum(dim=-1)), dim=-1)


def advance(logits: Tensor, inputs: StepInputs, chosen: Tensor) -> None:
    """Make the inputs of a step of one token those of the next: its token is the first of the largest logits `[1, V]`.

    Args:
        chosen: `[2]` int64; number `length % 2` receives the token, which the next step leaves alone.
    """
    token = logits.argmax(dim=-1)
    chosen[inputs.length % 2] = token
    inputs.tokens.copy_(token)
    inputs.length += 1
    inputs.positions += 1


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs) -> Tensor:
    """Heads `[T, H, W]` by the tokens' positions."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table[inputs.positions].unsqueeze(1) for table in (cos, sin))
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _write(cache: Tensor, rows: Tensor, inputs: StepInputs) -> None:
    real = int(inputs.count)
    begin = int(inputs.length)
    cache[begin : begin + real] = rows[:real].to(cache.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, scaling: float) -> Tensor:
    """`[H, T, K]`, `[H, S, K]` and `[H, S, W]` to `[H, T, W]`; padding sees committed rows only, and if none, row 0."""
    columns = torch.arange(keys.shape[1], device=keys.device)
    own = columns - inputs.length
    bits = inputs.visible.unsqueeze(1) >> own.clamp(0, 63) & 1
    sees = (columns < inputs.length) | ((own >= 0) & (own < inputs.count) & (bits == 1))
    sees |= padding(inputs).unsqueeze(1) & (columns == 0)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=sees, scale=scaling)
