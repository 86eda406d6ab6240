"""Attention: multi-head latent (MLA) and grouped-query (GQA), behind one call.

Both hand queries, keys and values to Hugging Face's attention functions, so that every implementation it knows (eager,
sdpa, flex, flash) works here. Biases are absent, as in the published models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blockffn.configuration import BlockFFNConfig
from blockffn.models.normalization import RMSNorm
from blockffn.models.rotary import rotate


def make_attention(config: BlockFFNConfig, layer_idx: int) -> Attention:
    return (LatentAttention if config.attention_type == "mla" else GroupedQueryAttention)(config, layer_idx)


class Attention(nn.Module):
    """What both kinds share: rotate, cache, attend, project. A subclass says how queries, keys and values arise."""

    o_proj: nn.Linear

    def __init__(self, config: BlockFFNConfig, layer_idx: int, *, scaling: float, num_key_value_groups: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        # Names that Hugging Face's attention functions read from the module.
        self.scaling, self.num_key_value_groups = scaling, num_key_value_groups
        self.is_causal, self.attention_dropout = True, config.attention_dropout

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, T, D]` to rotated queries `[B, H, T, K]`, keys `[B, H', T, K]` and values `[B, H', T, W]`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        attend_over: Callable[[Attention, Tensor, Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of tokens `[B, T, D]` and, if the implementation gives them, its probabilities.

        `attend_over(self, x, cos, sin)` stands in for caching and attending where another plan computes the same: it
        returns the heads' outputs `[B, T, H * W]`.
        """
        if attend_over is not None:
            return self.o_proj(attend_over(self, x, *position_embeddings)), None
        query, key, value = self.queries_keys_values(x, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, attention = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), attention

    def _heads(self, x: Tensor, size: int) -> Tensor:
        """`[B, T, H * size]` to `[B, H, T, size]`."""
        return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


class GroupedQueryAttention(Attention):
    """Queries in `num_attention_heads` heads that share `num_key_value_heads` keys and values."""

    def __init__(self, config: BlockFFNConfig, layer_idx: int) -> None:
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self_groups = config.num_attention_heads // config.num_key_value_heads
        super().__init__(config, layer_idx, scaling=config.head_dim**-0.5, num_key_value_groups=self_groups)
        self.head_dim = config.head_dim
        d, h, h_kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, h * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, h_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, h_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(h * self.head_dim, d, bias=False)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self._heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class LatentAttention(Attention):
    """MLA: queries, and keys with values, go through narrow latents; one rotary key is shared by all heads.

    The norms of the latents have their own epsilon (`lora_norm_eps`); the shared rotary key is not normalised.
    """

    def __init__(self, config: BlockFFNConfig, layer_idx: int) -> None:
        self_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        super().__init__(config, layer_idx, scaling=self_dim**-0.5, num_key_value_groups=1)
        self.qk_head_dim = self_dim
        d, h = config.hidden_size, config.num_attention_heads
        self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.lora_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, h * self_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.lora_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, h * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.kv_b_proj.initializer_std = config.kv_b_initializer_range  # type: ignore[assignment]
        self.o_proj = nn.Linear(h * config.v_head_dim, d, bias=False)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the queries without position, `[B, H, T, nope]`, and the rotated one, `[B, H, T, rope]`."""
        query = self._heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))), self.qk_head_dim)
        q_nope, q_rope = query.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, cos, sin)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """All that keys and values are made of: the normalised latent `[B, T, R]`, the rotated key `[B, T, rope]`."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), rotate(k_rope.unsqueeze(1), cos, sin).squeeze(1)

    def keys_values(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, H, T, nope + rope]` and values `[B, H, T, W]` of what `latents` returns."""
        nope, width = self.config.qk_nope_head_dim, self.config.v_head_dim
        k_nope, value = self._heads(self.kv_b_proj(latent), nope + width).split([nope, width], dim=-1)
        return torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.queries(x, cos, sin), dim=-1), *self.keys_values(*self.latents(x, cos, sin))


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out. Mask is additive `[B, 1, T, T']`. Returns `[B, T, H, W]` and the probabilities."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities
