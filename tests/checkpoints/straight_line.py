"""Logits of a published checkpoint, computed straight from its tensors: no module of the package is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Heads `[H, T, R]`, rotated half against half."""
    size = x.shape[-1]
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[H, T, K]`, `[H, T, K]`, `[H, T, V]` to `[T, H * V]`, causal."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def attention(w: dict[str, Tensor], x: Tensor, c: dict[str, Any]) -> Tensor:
    heads = c["num_attention_heads"]

    def split(y: Tensor, number: int) -> Tensor:
        return y.view(len(y), number, -1).transpose(0, 1)

    if "q_proj.weight" in w:
        kv = c["num_key_value_heads"]
        q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
        k, v = (split(t, kv).repeat_interleave(heads // kv, 0) for t in (k, v))
        return attend(rope(split(q, heads)), rope(k), v) @ w["o_proj.weight"].T
    q = split(rms(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], 1e-6) @ w["q_b_proj.weight"].T, heads)
    latent = x @ w["kv_a_proj_with_mqa.weight"].T
    rank, nope = c["kv_lora_rank"], c["qk_nope_head_dim"]
    kv = split(rms(latent[:, :rank], w["kv_a_layernorm.weight"], 1e-6) @ w["kv_b_proj.weight"].T, heads)
    shared = rope(latent[:, rank:][None]).expand(heads, -1, -1)
    q = torch.cat([q[..., :nope], rope(q[..., nope:])], -1)
    return attend(q, torch.cat([kv[..., :nope], shared], -1), kv[..., nope:]) @ w["o_proj.weight"].T


def sparse_ffn(w: dict[str, Tensor], x: Tensor, c: dict[str, Any]) -> Tensor:
    score = rms((x @ w["router_proj.weight"].T).relu(), w["router_norm.weight"], c["rms_norm_eps"])
    hidden = F.silu(x @ w["up_proj"].T).view(len(x), c["num_experts"], -1) * score[..., None]
    return hidden.flatten(1) @ w["down_proj"].T


def hidden_states(state: dict[str, Tensor], c: dict[str, Any], ids: Tensor) -> Tensor:
    """`[T]` to `[T, D]`, after the final norm."""
    scale, eps = c["scale_depth"] / c["num_hidden_layers"] ** 0.5, c["rms_norm_eps"]
    x = state["model.embed_tokens.weight"][ids] * c["scale_emb"]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        part = {q: {k.removeprefix(p + q): v for k, v in state.items() if k.startswith(p + q)}
                for q in ("self_attn.", "mlp.")}  # fmt: skip
        x = x + scale * attention(part["self_attn."], rms(x, state[p + "input_layernorm.weight"], eps), c)
        x = x + scale * sparse_ffn(part["mlp."], rms(x, state[p + "post_attention_layernorm.weight"], eps), c)
    return rms(x, state["model.norm.weight"], eps)


def logits(state: dict[str, Tensor], c: dict[str, Any], ids: Tensor) -> Tensor:
    """Of a state dict in the two-dimensional published layout, for `[T]` token ids."""
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return hidden_states(state, c, ids) / (c["hidden_size"] / c["dim_model_base"]) @ head.T


def draft(state: dict[str, Tensor], c: dict[str, Any], embeddings: Tensor, hidden: Tensor, eps: float) -> Tensor:
    """One pass of the draft over `[T, D]` embeddings of the next tokens and hidden states of the current ones."""
    both = [rms(embeddings, state["input_norm1.weight"], eps), rms(hidden, state["input_norm2.weight"], eps)]
    x = torch.cat(both, -1) @ state["fc.weight"].T + state["fc.bias"]
    w = {k.removeprefix("layers.0."): v for k, v in state.items() if k.startswith("layers.0.")}
    x = x + attention({k.removeprefix("self_attn."): v for k, v in w.items() if k.startswith("self_attn.")}, x, c)
    y = rms(x, w["post_attention_layernorm.weight"], eps)
    gated = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return x + gated @ w["mlp.down_proj.weight"].T
