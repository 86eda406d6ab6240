"""Rotary position embedding (rotate-half), computed in float32; scaled variants come from Hugging Face's table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from blockffn.configuration import BlockFFNConfig


class RotaryEmbedding(nn.Module):
    """Positions `[B, T]` to `(cos, sin)`, each `[B, T, rotary dim]` in the dtype of `x`."""

    inv_freq: Tensor

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.initial_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self):  # type: ignore[no-untyped-def]  # read by Hugging Face's dynamic_rope_update
        return ROPE_INIT_FUNCTIONS[self.rope_type]

    @staticmethod
    def initial_frequencies(config: BlockFFNConfig) -> tuple[Tensor, float]:
        assert config.rope_parameters is not None
        assert config.head_dim is not None
        if config.rope_parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    # Hugging Face rebuilds the buffers of modules with this method after loading on the meta device.
    @staticmethod
    def compute_default_rope_parameters(config: BlockFFNConfig, **_: object) -> tuple[Tensor, float]:
        return RotaryEmbedding.initial_frequencies(config)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `x [B, H, T, R]` by `cos`, `sin` of `[B, T, R]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
