"""The EAGLE-3 export: names and shapes as engines document them, and our draft's function in that layer's terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from blockffn.checkpoints.draft import draft_config
from blockffn.checkpoints.eagle3 import eagle3_config, eagle3_weights, write_eagle3
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from tests.models.conftest import tiny_model

IDS = torch.tensor([40, 3, 17, 60, 8])
SIZES = {"num_hidden_layers": 1, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 12}  # fmt: skip


def pair(token_ids: Tensor | None = None, **sizes: int) -> tuple[DraftModel, BlockFFNForCausalLM]:
    target = tiny_model("mla", max_position_embeddings=512)
    draft = DraftModel(draft_config({**SIZES, **sizes}, target.config), token_ids=token_ids).eval()
    for name, parameter in draft.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return draft, target


def eagle3_layer(config: dict[str, Any], w: dict[str, Tensor], tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """An EAGLE-3 layer as published, written out: tokens `[T]` and states `[T, D]` to what is fed back, and logits."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        name = f"midlayer.self_attn.{name}_proj"
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, width = len(tokens), config["head_dim"]
    embeddings = norm(w["embed_tokens.weight"][tokens], "midlayer.input_layernorm")
    hidden = norm(hidden, "midlayer.hidden_norm")
    residual = hidden  # norm_before_residual
    joined = torch.cat((embeddings, hidden), dim=-1)
    angles = torch.arange(T)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[:, None] for f in (torch.cos, torch.sin))
    query, key = (project(joined, name).view(T, -1, width) for name in "qk")
    query, key = (
        x * cos + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1) * sin for x in (query, key)
    )
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, project(joined, "v").view(T, -1, width)))
    scores = torch.einsum("ihd,jhd->hij", query, key) * width**-0.5
    shares = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(dim=-1)
    x = residual + project(torch.einsum("hij,jhd->ihd", shares, value).flatten(1), "o")
    inner = norm(x, "midlayer.post_attention_layernorm")
    gate, up, down = (w[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    x = x + (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
    return x, norm(x, "norm") @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("token_ids", [None, IDS], ids=["all tokens", "reduced"])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 4}, {"head_dim": 8}], ids=["groups", "heads", "narrow"])
def test_the_exported_layer_computes_what_the_draft_computes(sizes: dict[str, int], token_ids: Tensor | None) -> None:
    draft, target = pair(token_ids, **sizes)
    weights, config = eagle3_weights(draft, target), eagle3_config(draft, target, dtype=torch.float32)
    tokens = torch.arange(400) * 7 % 61
    hidden = torch.randn(400, 32)
    ours = draft((target.model.embed_tokens(tokens) * target.config.scale_emb)[None], hidden[None])[0]
    theirs, logits = eagle3_layer(config, weights, tokens, hidden)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    proposed = torch.arange(logits.shape[-1]) + weights["d2t"]
    ranked = draft.proposed_ids(draft.logits(ours, target.lm_head.weight).sort(dim=-1, descending=True).indices)
    agree = (proposed[logits.sort(dim=-1, descending=True).indices] == ranked)[:, :3].float().mean()
    assert agree > 0.99  # the norm before the head changes the temperature, not the order


@pytest.mark.parametrize("token_ids", [None, IDS], ids=["all tokens", "reduced"])
def test_names_shapes_and_configuration_are_those_of_an_eagle3_head(token_ids: Tensor | None, tmp_path: Path) -> None:
    draft, target = pair(token_ids)
    notes = write_eagle3(draft, target, tmp_path, dtype=torch.bfloat16)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    D, F_, V, heads, keys, width = 32, 40, 61, 4 + 2 * 3, 2 + 3, 12  # three heads of 12 carry 32 numbers
    own = V if token_ids is None else 5
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "embed_tokens.weight": (V, D), "fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (own, D),
        "d2t": (own,), "t2d": (V,), "midlayer.input_layernorm.weight": (D,), "midlayer.hidden_norm.weight": (D,),
        "midlayer.post_attention_layernorm.weight": (D,), "midlayer.mlp.gate_proj.weight": (F_, D),
        "midlayer.mlp.up_proj.weight": (F_, D), "midlayer.mlp.down_proj.weight": (D, F_),
        "midlayer.self_attn.q_proj.weight": (heads * width, 2 * D), "midlayer.self_attn.q_proj.bias": (heads * width,),
        "midlayer.self_attn.k_proj.weight": (keys * width, 2 * D), "midlayer.self_attn.k_proj.bias": (keys * width,),
        "midlayer.self_attn.v_proj.weight": (keys * width, 2 * D), "midlayer.self_attn.v_proj.bias": (keys * width,),
        "midlayer.self_attn.o_proj.weight": (D, heads * width), "midlayer.self_attn.o_proj.bias": (D,),
    }  # fmt: skip
    assert {weights[name].dtype for name in weights} == {torch.bfloat16, torch.int64, torch.bool}
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    sizes = {name: config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")}
    assert sizes == {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width, "hidden_size": D}
    assert (config["vocab_size"], config["draft_vocab_size"]) == (V, own)
    assert config["norm_before_residual"] is config["attention_bias"] is True
    assert config["export"] == notes
    ids = torch.arange(own) + weights["d2t"]
    assert weights["t2d"].nonzero().flatten().tolist() == ids.tolist()
    assert ids.tolist() == sorted(range(V) if token_ids is None else IDS.tolist())


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    draft, target = pair(num_hidden_layers=2)
    with pytest.raises(ValueError, match="one layer, the draft has 2"):
        write_eagle3(draft, target, tmp_path, dtype=torch.float32)
    draft, target = pair()
    draft.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="default rotary embedding only, the draft has 'linear'"):
        write_eagle3(draft, target, tmp_path, dtype=torch.float32)
