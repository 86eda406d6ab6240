"""The draft model of the published 3B: one Llama layer that guesses the next token from what the target knows.

Its input at position t is the target's embedding of token t + 1 (as the target scales it) and the target's hidden state
of token t after the final norm. Each goes through a norm of its own; a linear map with one bias joins them. The layer
has no input norm and adds its branches unscaled; there is no final norm. Logits are the target's head on the output,
divided as the target divides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockffn.configuration import BlockFFNConfig
from blockffn.models.attention import GroupedQueryAttention
from blockffn.models.experts import GatedFFN
from blockffn.models.normalization import RMSNorm
from blockffn.models.rotary import RotaryEmbedding


class DraftLayer(nn.Module):
    """A Llama layer; the first of a draft has no input norm."""

    def __init__(self, config: BlockFFNConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if layer_idx else nn.Identity()
        self.self_attn = GroupedQueryAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedFFN(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attention_mask=mask, cache=cache)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftModel(nn.Module):
    """EAGLE draft of a BlockFFN target.

    Args:
        config: sizes of the draft's layers; norm epsilon and rotary frequencies are the target's.
        token_ids: `[V']` ids of the tokens that the draft may propose, most frequent first; `None`: all.
    """

    token_ids: Tensor | None

    def __init__(self, config: BlockFFNConfig, *, token_ids: Tensor | None = None) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.input_norm1 = RMSNorm(d, eps=config.rms_norm_eps)
        self.input_norm2 = RMSNorm(d, eps=config.rms_norm_eps)
        self.fc = nn.Linear(2 * d, d)
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = RotaryEmbedding(config)
        self.register_buffer("token_ids", token_ids, persistent=False)

    def forward(
        self, embeddings: Tensor, hidden_states: Tensor, *, position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """One causal pass.

        Args:
            embeddings: `[B, T, D]`, the target's embeddings of tokens 1 … T, multiplied by its `scale_emb`.
            hidden_states: `[B, T, D]`, the target's states of tokens 0 … T - 1 after its final norm, or the draft's own
                output where the draft runs ahead.
            position_ids: `[B, T]`; default 0 … T - 1.
            attention_mask: additive `[B, 1, T, S + T]` behind `S` cached tokens, such as a draft tree's; default:
                causal. With a cache it must be given, and so must position_ids.
            cache: anything with `update(key, value, layer_idx)` that returns all keys and values so far.

        Returns:
            `[B, T, D]`: position t describes token t + 2. For logits: `logits(output, target's head)`.
        """
        B, T, _ = embeddings.shape
        x = self.fc(torch.cat((self.input_norm1(embeddings), self.input_norm2(hidden_states)), dim=-1))
        if position_ids is None:
            position_ids = torch.arange(T, device=x.device).expand(B, T)
        if attention_mask is None:
            attention_mask = torch.full((T, T), -torch.inf, dtype=x.dtype, device=x.device).triu(1)[None, None]
        cos_sin = self.rotary_emb(x, position_ids=position_ids)
        for layer in self.layers:
            x = layer(x, cos_sin, attention_mask, cache)
        return x

    def logits(self, output: Tensor, head_weight: Tensor) -> Tensor:
        """`[..., V']` logits of the tokens in `token_ids` (all, if `None`) with the target's head `[V, D]`."""
        rows = head_weight if self.token_ids is None else head_weight[self.token_ids]
        return (output / self.config.width_multiplier) @ rows.T

    def proposed_ids(self, indices: Tensor) -> Tensor:
        """Token ids of indices into `logits`."""
        return indices if self.token_ids is None else self.token_ids[indices]
