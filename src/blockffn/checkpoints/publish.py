"""Writes a model in the layout of the SparseLLM/BlockFFN repositories, as safetensors.

The programs of those repositories are not written, so the folder is for engines and loaders that know the layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from blockffn.checkpoints.layouts import published_name, to_published
from blockffn.configuration import BlockFFNConfig
from blockffn.models.causal_lm import BlockFFNForCausalLM


def check_publishable(model: BlockFFNForCausalLM) -> None:
    """Raise `ValueError` when the published layout has no place for a part of `model`."""
    config = model.config
    known = {"ffn_type": "moe", "router_type": "relu_rmsnorm", "expert_gated": False, "lora_norm_eps": 1e-6,
             "expert_activation": "silu", "num_shared_experts": 0, "first_k_dense_replace": 0}  # fmt: skip
    if config.router_norm_eps is not None and config.router_norm_eps != config.rms_norm_eps:
        raise ValueError(
            f"the published layout has one epsilon for all norms ({config.rms_norm_eps}), the model has "
            f"router_norm_eps {config.router_norm_eps}"
        )
    for name, value in known.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"the published layout knows {name} {value!r} only, the model has {getattr(config, name)!r}"
            )
    foreign = [name for name, _ in model.named_parameters() if ".mlp." in name and published_name(name) == name]
    if foreign:
        raise ValueError(f"the published layout has no name for {foreign[0]!r}")


def write_published(model: BlockFFNForCausalLM, folder: Path, *, max_shard_size: str) -> None:
    """Write weights, index and configuration to the existing `folder`, one shard after the other."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    split = split_torch_state_dict_into_shards(
        parameters, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {published_name(n): to_published(parameters[n].detach(), n).contiguous() for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        weight_map = {published_name(name): file for name, file in split.tensor_to_filename.items()}
        index = {"metadata": split.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    text = json.dumps(published_config(model.config, dtype=str(model.dtype).removeprefix("torch.")), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def published_config(config: BlockFFNConfig, *, dtype: str) -> dict[str, Any]:
    """The fields of the published config.json files, and those that the published engine reads besides."""
    same = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "num_experts", "max_position_embeddings", "rms_norm_eps", "scale_emb", "scale_depth", "dim_model_base",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]  # fmt: skip
    if config.attention_type == "mla":
        same += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_type"]
    rope = dict(config.rope_parameters or {})
    fields = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        **{name: getattr(config, name) for name in same},
        "intermediate_size": config.num_experts * config.moe_intermediate_size,
        "expert_size": config.moe_intermediate_size,
        "ffn_type": "block_linear",
        "block_implementation": "torch",
        "router_act": "relu",
        "norm_after_router": "rms",
        "norm_scale": 1.0,
        "hidden_act": "silu",
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "torch_dtype": dtype,
    }
    return {name: value for name, value in fields.items() if value is not None}
