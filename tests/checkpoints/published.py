"""Folders that imitate the published repositories at small width, with their names, file formats and quirks.

`python -m tests.checkpoints.published OUT` writes all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]

# hidden size, experts, width, layers, heads: the published sizes, shrunk.
SIZES = {
    "small": (32, 6, 4, 2, 2),
    "medium": (40, 5, 8, 3, 2),
    "large": (48, 6, 8, 2, 3),
    "xlarge": (56, 7, 8, 3, 4),
    "3b-sft": (64, 16, 8, 2, 4),
}
Q_RANK, KV_RANK, NOPE, ROPE, VALUE, VOCAB = 24, 12, 8, 4, 8, 300


def config(name: str) -> dict[str, Any]:
    """A config.json with the fields of the published ones, left-overs included."""
    hidden, experts, width, layers, heads = SIZES[name]
    common = {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm",
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig",
                     "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "router_act": "relu",
        "norm_after_router": "rms", "norm_scale": 1.0, "expert_size": width, "num_experts": experts,
        "block_implementation": "torch", "ffn_type": "block_linear", "scale_emb": 12, "dim_model_base": 16,
        "scale_depth": 1.4, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if name == "3b-sft":
        return {**common, "num_key_value_heads": 2, "head_dim": hidden // heads, "intermediate_size": experts * width,
                "tie_word_embeddings": True}  # fmt: skip
    left_over = {"intermediate_size": 5760, "num_key_value_heads": 32, "ffn_gated": True} if name == "xlarge" else {}
    return {**common, "attention_type": "mla", "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK,
            "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "tie_word_embeddings": False,
            **left_over}  # fmt: skip


def weights(name: str, *, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights under the published names. Norm scales are not all 1, so that none can be forgotten."""
    hidden, experts, width, layers, heads = SIZES[name]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        a = p + "self_attn."
        if name == "3b-sft":
            shapes |= {a + "q_proj.weight": (hidden, hidden), a + "k_proj.weight": (hidden // 2, hidden),
                       a + "v_proj.weight": (hidden // 2, hidden), a + "o_proj.weight": (hidden, hidden)}  # fmt: skip
        else:
            shapes |= {
                a + "q_a_proj.weight": (Q_RANK, hidden), a + "q_a_layernorm.weight": (Q_RANK,),
                a + "q_b_proj.weight": (heads * (NOPE + ROPE), Q_RANK),
                a + "kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, hidden), a + "kv_a_layernorm.weight": (KV_RANK,),
                a + "kv_b_proj.weight": (heads * (NOPE + VALUE), KV_RANK),
                a + "o_proj.weight": (hidden, heads * VALUE),
            }  # fmt: skip
        m = p + "mlp."
        shapes |= {m + "router_proj.weight": (experts, hidden), m + "router_norm.weight": (experts,),
                   m + "up_proj": (experts * width, hidden), m + "down_proj": (hidden, experts * width)}  # fmt: skip
    shapes["model.norm.weight"] = (hidden,)
    if name != "3b-sft":
        shapes["lm_head.weight"] = (VOCAB, hidden)
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        made[key] = (noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * noise).to(dtype)
    return made


def in_three_dimensions(state: Weights, name: str) -> Weights:
    """The same weights in the layout of `ffn_type: block`: one matrix per expert."""
    hidden, experts, width, _, _ = SIZES[name]
    out = dict(state)
    for key in state:
        if key.endswith("mlp.up_proj"):
            out[key] = state[key].view(experts, width, hidden)
        elif key.endswith("mlp.down_proj"):
            out[key] = state[key].view(hidden, experts, width).transpose(0, 1).contiguous()
    return out


def as_training_checkpoint(state: Weights, *, router_transposed: bool = False) -> Weights:
    """The same weights under the names of the pre-training code."""
    renames = [
        ("model.embed_tokens", "input_embedding"), ("model.norm", "encoder.output_layernorm"),
        ("model.layers", "encoder.layers"), ("input_layernorm", "self_att.layernorm_before_attention"),
        ("post_attention_layernorm", "ffn.layernorm_before_ffn"), ("self_attn", "self_att.self_attention"),
        ("q_a_", "q_down_"), ("q_b_proj", "q_up_proj"), ("kv_a_proj_with_mqa", "kv_down_proj"),
        ("kv_a_layernorm", "kv_down_layernorm"), ("kv_b_proj", "kv_up_proj"),
        ("mlp.router_proj.weight", "ffn.ffn.moe_router.w_gate"), ("mlp.router_norm", "ffn.ffn.router_norm"),
        ("mlp.up_proj", "ffn.ffn.moe_experts.moe_w_in"), ("mlp.down_proj", "ffn.ffn.moe_experts.moe_w_out"),
    ]  # fmt: skip
    if "model.layers.0.self_attn.q_proj.weight" in state:
        renames += [(f".{x}_proj.", f".project_{x}.") for x in "qkv"] + [(".o_proj.", ".attention_out.")]
    out = {}
    for key, value in state.items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        out[key] = value.T.contiguous() if router_transposed and key.endswith("w_gate") else value
    return out


def write_bin(folder: Path, state: Weights, settings: dict[str, Any] | None, *, shards: int = 1) -> Path:
    """`pytorch_model.bin`, or shards with their index, beside config.json and a program that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    (folder / "modeling_minicpm.py").write_text("raise SystemExit('remote code was executed')\n")
    (folder / "configuration_minicpm.py").write_text("raise SystemExit('remote code was executed')\n")
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names, weight_map = sorted(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_safetensors(folder: Path, state: Weights, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


# The draft: hidden size and vocabulary of its target, one layer.
DRAFT = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB}  # fmt: skip


def draft_weights() -> Weights:
    """Weights of the draft, with the copy of the target's embeddings that its file carries and nobody reads."""
    d, f = DRAFT["hidden_size"], DRAFT["intermediate_size"]
    shapes = {
        "embed_tokens.weight": (VOCAB, d), "fc.weight": (d, 2 * d), "fc.bias": (d,), "input_norm1.weight": (d,),
        "input_norm2.weight": (d,), "layers.0.self_attn.q_proj.weight": (64, d),
        "layers.0.self_attn.k_proj.weight": (32, d), "layers.0.self_attn.v_proj.weight": (32, d),
        "layers.0.self_attn.o_proj.weight": (d, 64), "layers.0.mlp.gate_proj.weight": (f, d),
        "layers.0.mlp.up_proj.weight": (f, d), "layers.0.mlp.down_proj.weight": (d, f),
        "layers.0.post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    made = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        made[key] = noise * shape[-1] ** -0.5 if len(shape) > 1 or key == "fc.bias" else 1 + 0.2 * noise
    return made


def write_all(out: Path) -> None:
    for name in SIZES:
        write_bin(out / name, weights(name), config(name), shards=2 if name == "3b-sft" else 1)
    write_bin(out / "3b-sft-eagle", draft_weights(), DRAFT)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
