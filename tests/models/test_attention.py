"""MLA and GQA against straight-line computations that share no code with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.models.conftest import tiny_model


def rope(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate `x [T, R]` at positions 0…T-1, pairing element i with i + R/2."""
    T, R = x.shape
    out = x.clone()
    for t in range(T):
        for i in range(R // 2):
            angle = t * theta ** (-2 * i / R)
            a, b = x[t, i], x[t, i + R // 2]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def causal_softmax(scores: Tensor) -> Tensor:
    T = scores.shape[0]
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


@torch.no_grad()
def test_latent_attention_equals_its_definition() -> None:
    model = tiny_model("mla")
    layer, config = model.model.layers[0].self_attn, model.config
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(7, config.hidden_size)
    q = rms(x @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight, 1e-6) @ layer.q_b_proj.weight.T
    down = x @ layer.kv_a_proj_with_mqa.weight.T
    latent, shared_key = down[:, :10], rope(down[:, 10:])
    kv = rms(latent, layer.kv_a_layernorm.weight, 1e-6) @ layer.kv_b_proj.weight.T
    heads = []
    for h in range(2):
        q_h, kv_h = q[:, h * 10 : h * 10 + 10], kv[:, h * 11 : h * 11 + 11]
        query = torch.cat([q_h[:, :6], rope(q_h[:, 6:])], dim=-1)
        key = torch.cat([kv_h[:, :6], shared_key], dim=-1)
        heads.append(causal_softmax(query @ key.T / math.sqrt(10)) @ kv_h[:, 6:])
    expected = torch.cat(heads, dim=-1) @ layer.o_proj.weight.T
    cos_sin = model.model.rotary_emb(x, torch.arange(7)[None])
    actual, _ = layer(x[None], cos_sin)
    torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_grouped_query_attention_equals_its_definition() -> None:
    model = tiny_model("gqa")
    layer = model.model.layers[0].self_attn
    x = torch.randn(7, 32)
    q, k, v = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = []
    for h in range(4):
        group = h // 2
        query, key = rope(q[:, h * 8 : h * 8 + 8]), rope(k[:, group * 8 : group * 8 + 8])
        heads.append(causal_softmax(query @ key.T / math.sqrt(8)) @ v[:, group * 8 : group * 8 + 8])
    expected = torch.cat(heads, dim=-1) @ layer.o_proj.weight.T
    actual, _ = layer(x[None], model.model.rotary_emb(x, torch.arange(7)[None]))
    torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(model: torch.nn.Module) -> None:
    ids = torch.randint(0, 61, (2, 9))
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
