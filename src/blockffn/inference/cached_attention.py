"""How the engine attends: over the preallocated cache, with any visibility, and for MLA without expanding the cache.

With few tokens, MLA's projection of the latents to keys and values is absorbed: queries are carried into the space of
the latents, attend there, and the mean latents are carried to values. With many tokens expanding the cache once is
less work. Both are the model's own `queries_keys_values` in another order of multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.inference.kv_cache import KVCache
from blockffn.models.attention import Attention, LatentAttention


class CachedAttention:
    """Attention of one step: what `Attention.forward` takes as `attend_over`.

    Args:
        cache: receives keys and values of the step's tokens.
        rows: `[B, T]` int64, where they go.
        visible: `[B, T, S]` bool, the rows among the first S that each token sees.
        expansions: `expansion_weight` of each layer with latent attention.
    """

    def __init__(self, cache: KVCache, rows: Tensor, visible: Tensor, expansions: list[Tensor]) -> None:
        self.cache, self.rows, self.expansions = cache, rows, expansions
        self._visible = visible.unsqueeze(1)
        self._bias: dict[int, Tensor] = {}

    def __call__(self, module: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens `[B, T, D]` to the heads' outputs `[B, T, H * W]`."""
        if isinstance(module, LatentAttention):
            out = self._latent(module, x, cos, sin)
        else:
            out = self._grouped(module, x, cos, sin)
        return out.transpose(1, 2).flatten(2)

    def _grouped(self, module: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = module.queries_keys_values(x, cos, sin)
        heads = key.shape[1]
        self.cache.write(module.layer_idx, self.rows, key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2))
        stored = self.cache.read(module.layer_idx, self._visible.shape[-1]).split(self.cache.widths, dim=-1)
        keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in stored)
        return self._attend(module, query, keys, values)

    def _latent(self, module: LatentAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q_nope, q_rope = module.queries(x, cos, sin)
        self.cache.write(module.layer_idx, self.rows, *module.latents(x, cos, sin))
        stored = self.cache.read(module.layer_idx, self._visible.shape[-1])
        latents, k_rope = stored.split(self.cache.widths, dim=-1)
        config = module.config
        head_width = config.qk_nope_head_dim + config.v_head_dim
        if not absorbing_pays(x.shape[1], config.kv_lora_rank, head_width):
            return self._attend(module, torch.cat((q_nope, q_rope), dim=-1), *module.keys_values(latents, k_rope))
        expansion = self.expansions[module.layer_idx].to(x.dtype)
        to_keys, to_values = expansion.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        query = torch.cat((q_nope @ to_keys, q_rope), dim=-1)
        mean = self._attend(module, query, stored.unsqueeze(1), latents.unsqueeze(1))
        return mean @ to_values.transpose(1, 2)

    def _attend(self, module: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention `[B, H, T, W]`; queries that share a key head are rows of one product."""
        batch, heads, tokens = query.shape[:3]
        groups = heads // keys.shape[1]
        query = query.reshape(batch, keys.shape[1], groups * tokens, -1)
        bias = self._bias_for(groups, query.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=module.scaling)
        return out.reshape(batch, heads, tokens, -1)

    def _bias_for(self, groups: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores `[B, 1, groups * T, S]`: the same in all layers."""
        if groups not in self._bias:
            bias = torch.zeros(self._visible.shape, dtype=dtype, device=self._visible.device)
            self._bias[groups] = bias.masked_fill_(~self._visible, float("-inf")).repeat(1, 1, groups, 1)
        return self._bias[groups]


def absorbing_pays(tokens: int, rank: int, head_width: int) -> bool:
    """Whether attending among latents is less work than expanding the cache to keys and values.

    Besides the rotary part, a cached row and head takes `2 rank` products a token absorbed and `head_width` expanded;
    expanding it takes `rank * head_width` once.
    """
    return tokens * (2 * rank - head_width) <= rank * head_width


def expansion_weight(module: LatentAttention) -> Tensor:
    """`kv_b_proj` as `[H, nope + W, R]`: the parameter itself where it is a plain one, else what the module does to
    the unit vectors (packed or adapted weights)."""
    projection, rank = module.kv_b_proj, module.config.kv_lora_rank
    if type(projection) is nn.Linear and type(projection.weight) is nn.Parameter:
        weight: Tensor = projection.weight
    else:
        norm = module.kv_a_layernorm.weight
        weight = projection(torch.eye(rank, dtype=norm.dtype, device=norm.device)).T.contiguous()
    return weight.view(module.num_heads, -1, rank)
