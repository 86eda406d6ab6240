"""Sizes and methods: the only place with published numbers.

A model is a row of `SIZES` with a row of `METHODS` on top; `preset_config("0.1b", "dense")` joins them.
"""

from __future__ import annotations

import difflib
from typing import Any

from blockffn.configuration import BlockFFNConfig

_PAPER_MLA = {"attention_type": "mla", "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
              "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 122753}  # fmt: skip


def _row(
    layers: int, hidden: int, heads: int, experts: int, width: int, dense_width: int, **other: Any
) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_experts": experts,
            "moe_intermediate_size": width, "intermediate_size": dense_width, **other}  # fmt: skip


# The dense width gives a gated FFN of the same number of parameters as router and experts together.
SIZES: dict[str, dict[str, Any]] = {
    "nano": _row(4, 128, 4, 32, 16, 352, attention_type="gqa", num_key_value_heads=2, head_dim=32, vocab_size=2048,
                 max_position_embeddings=1024, tie_word_embeddings=False),
    "mini": _row(8, 512, 4, 48, 64, 2064, attention_type="mla", q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
                 qk_rope_head_dim=32, v_head_dim=64, vocab_size=16384, max_position_embeddings=2048),
    "0.1b": _row(16, 768, 6, 48, 64, 2064, **_PAPER_MLA),
    "0.5b": _row(27, 1280, 10, 40, 128, 3440, **_PAPER_MLA),
    "0.8b": _row(32, 1536, 12, 48, 128, 4128, **_PAPER_MLA),
    "1.2b": _row(35, 1792, 14, 56, 128, 4816, **_PAPER_MLA),
    # Heads, KV heads, tied embeddings and vocabulary of the 3B are reconstructed from its file size; its config is
    # not public.
    "3b": _row(36, 2048, 16, 128, 128, 10965, attention_type="gqa", num_key_value_heads=4, head_dim=128,
               vocab_size=73448, tie_word_embeddings=True),
}  # fmt: skip

METHODS: dict[str, dict[str, Any]] = {
    "blockffn": {"ffn_type": "moe", "router_type": "relu_rmsnorm"},
    "dense": {"ffn_type": "dense"},
}


def _recipe(steps: int, rows: int, micro: int, warmup: int, locality: float, chunk: float) -> dict[str, Any]:
    return {
        "steps": steps, "batch_size": rows, "micro_batch_size": micro, "precision": "bfloat16",
        "gradient_checkpointing": True, "data": {"sequence_length": 4096, "align": 64},
        "schedule": {"warmup_steps": warmup, "decay_fraction": 0.0},
        "objectives": {"chunk_length": 64, "terms": {
            "activation_locality": {"kind": "constant", "value": locality},
            "chunk_sparsification": {"kind": "adaptive", "initial": chunk, "rule": "reference"},
        }},
    }  # fmt: skip


# How each size is trained. The paper's sizes follow its table 8 (tokens a step = rows x 4096; no decay in
# pre-training).
RECIPES: dict[str, dict[str, Any]] = {
    "nano": {
        "steps": 900, "batch_size": 8, "data": {"sequence_length": 256, "align": 64},
        "optimizer": {"learning_rate": 0.005, "router_learning_rate": 0.003},
        "schedule": {"warmup_steps": 40, "decay_fraction": 0.3}, "log_every": 10, "checkpoint_every": 300,
        "objectives": {"chunk_length": 64, "terms": {
            "activation_locality": {"kind": "constant", "value": 3e-4, "warmup_steps": 300},
            "chunk_sparsification": {"kind": "set_point", "initial": 0.2, "target": 80.0, "observes": "tls",
                                     "interval": 20, "response_steps": 60, "warmup_steps": 100},
        }},
    },
    "mini": {
        "steps": 2000, "batch_size": 64, "precision": "bfloat16", "data": {"sequence_length": 2048, "align": 64},
        "schedule": {"warmup_steps": 100, "decay_fraction": 0.2},
        "objectives": {"chunk_length": 64, "terms": {
            "activation_locality": {"kind": "constant", "value": 2e-3},
            "chunk_sparsification": {"kind": "adaptive", "initial": 5e-2, "rule": "reference"},
        }},
    },
    "0.1b": _recipe(10_000, 384, 12, 100, 2e-3, 5e-2),
    "0.5b": _recipe(20_000, 768, 12, 200, 2e-3, 5e-2),
    "0.8b": _recipe(30_000, 576, 12, 50, 1e-3, 5e-2),
    "1.2b": _recipe(40_000, 768, 12, 400, 2e-3, 5e-2),
    "3b": _recipe(25_000, 768, 12, 250, 2e-3, 1e-1),
}  # fmt: skip


def preset_config(size: str, method: str = "blockffn", **overrides: Any) -> BlockFFNConfig:
    """The configuration of a named size and method, with keyword overrides on top.

    Raises:
        ValueError: unknown size, method or field; the message names the nearest valid one.
    """
    size_row, method_row = _lookup("size", size, SIZES), _lookup("method", method, METHODS)
    valid = set(BlockFFNConfig.__dataclass_fields__)
    for key in overrides:
        if key not in valid:
            raise ValueError(f"unknown model field {key!r}{did_you_mean(key, valid)}")
    return BlockFFNConfig(**{**size_row, **method_row, **overrides})


def did_you_mean(word: str, valid: Any) -> str:
    """`; did you mean 'x'?` for the nearest valid word, or the list of all when none is near."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(sorted(valid))}"


def _lookup(kind: str, name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, table)}")
    return table[name]
