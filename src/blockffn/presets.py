"""Sizes and methods: the only place with published numbers.

A model is a row of `SIZES` with a row of `METHODS` on top; `preset_config("0.1b", "dense")` joins them. It is trained
by the size's row of `RECIPES` with the method's penalties, `objective_terms_of("0.1b", "dense")`.
"""

from __future__ import annotations

import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from blockffn.configuration import BlockFFNConfig

_PAPER_MLA = {"attention_type": "mla", "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
              "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 122753}  # fmt: skip


def _row(
    layers: int, hidden: int, heads: int, experts: int, top_k: int, width: int, dense_width: int, **other: Any
) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_experts": experts,
            "num_experts_per_tok": top_k, "moe_intermediate_size": width, "intermediate_size": dense_width,
            **other}  # fmt: skip


# Where a run of a few hundred steps starts best, by docs/log.md: attention as strong as the FFN (the published 0.02
# makes it ten times weaker), and routing weights that are small, as softmax shares are.
_SHORT_RUN_START = {"kv_b_initializer_range": 0.1, "router_scale_initializer": 0.3}

# What BlockFFN's router takes on top. An epsilon that the norm's argument hardly exceeds at first: in so short a run
# the published one costs 15 % of perplexity (docs/log.md).
_ROUTER_START: dict[str, dict[str, Any]] = {
    "mini": {"router_norm_eps": 1.0, "router_scale_initializer": 1.0, "router_initializer_range": 0.01},
}

# The dense width gives a gated FFN of the same number of parameters as router and experts together. Experts per token
# are those of the published baselines; they put a top-k router's sparsity where BlockFFN ends up, near 80 %.
SIZES: dict[str, dict[str, Any]] = {
    "nano": _row(4, 128, 4, 32, 6, 16, 352, attention_type="gqa", num_key_value_heads=2, head_dim=32, vocab_size=2048,
                 max_position_embeddings=1024, tie_word_embeddings=False),
    "mini": _row(8, 512, 4, 48, 10, 64, 2064, attention_type="mla", q_lora_rank=256, kv_lora_rank=128,
                 qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, vocab_size=16384,
                 max_position_embeddings=2048, **_SHORT_RUN_START),
    "0.1b": _row(16, 768, 6, 48, 10, 64, 2064, **_PAPER_MLA),
    "0.5b": _row(27, 1280, 10, 40, 6, 128, 3440, **_PAPER_MLA),
    "0.8b": _row(32, 1536, 12, 48, 8, 128, 4128, **_PAPER_MLA),
    "1.2b": _row(35, 1792, 14, 56, 10, 128, 4816, **_PAPER_MLA),
    # Heads, KV heads, tied embeddings and vocabulary of the 3B are reconstructed from its file size; its config is
    # not public. No baseline of its size is published; 26 of 128 experts are 80 %.
    "3b": _row(36, 2048, 16, 128, 26, 128, 10965, attention_type="gqa", num_key_value_heads=4, head_dim=128,
               vocab_size=73448, tie_word_embeddings=True),
}  # fmt: skip

# The published baselines draw their routers with a standard deviation of 0.01.
_BASELINE = {"ffn_type": "moe", "router_initializer_range": 0.01}

METHODS: dict[str, dict[str, Any]] = {
    "blockffn": {"ffn_type": "moe", "router_type": "relu_rmsnorm"},
    "dense": {"ffn_type": "dense"},
    "topk": {**_BASELINE, "router_type": "topk"},
    "deepseek": {**_BASELINE, "router_type": "topk", "num_shared_experts": 2},
    "grin": {**_BASELINE, "router_type": "sparsemixer", "router_jitter_noise": 0.1},
    "remoe": {**_BASELINE, "router_type": "relu"},
    # As the published training code has it, but for what all methods share here: attention, scales (DECO has no muP),
    # optimiser. Its shared expert is gated; here it is one more of the non-gated experts, so that parameters match.
    "deco": {"ffn_type": "moe", "router_type": "relu_scaled", "router_dtype": "float32", "num_shared_experts": 1,
             "router_scale_initializer": 0.1, "first_k_dense_replace": 1, "expert_activation": "norm_silu"},
}  # fmt: skip


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
        "steps": 900, "batch_size": 24, "precision": "bfloat16", "data": {"sequence_length": 2048, "align": 64},
        "optimizer": {"router_learning_rate": 0.001},
        "schedule": {"warmup_steps": 60, "decay_fraction": 0.3}, "checkpoint_every": 300,
        "objectives": {"chunk_length": 64, "terms": {
            "activation_locality": {"kind": "set_point", "initial": 1e-4, "target": 72.5, "observes": "cls8",
                                    "interval": 10, "response_steps": 60, "warmup_steps": 100},
            "chunk_sparsification": {"kind": "set_point", "initial": 0.003, "target": 80.5, "observes": "tls",
                                     "interval": 10, "response_steps": 60, "warmup_steps": 50},
            "dead_experts": {"kind": "constant", "value": 0.01},
        }},
    },
    "0.1b": _recipe(10_000, 384, 12, 100, 2e-3, 5e-2),
    "0.5b": _recipe(20_000, 768, 12, 200, 2e-3, 5e-2),
    "0.8b": _recipe(30_000, 576, 12, 50, 1e-3, 5e-2),
    "1.2b": _recipe(40_000, 768, 12, 400, 2e-3, 5e-2),
    "3b": _recipe(25_000, 768, 12, 250, 2e-3, 1e-1),
}  # fmt: skip


def objective_terms_of(size: str, method: str) -> dict[str, Any]:
    """What a method penalises beside the language-model loss: objective to coefficient, as `ObjectiveSettings.terms`.

    BlockFFN's are in the size's recipe. The controllers of ReMoE and DECO aim at the sparsity of the size's top-k and
    at 80 %.

    Raises:
        ValueError: unknown size or method; the message names the nearest valid one.
    """
    size_row, recipe = _lookup("size", size, SIZES), RECIPES[size]
    _lookup("method", method, METHODS)
    match method:
        case "blockffn":
            return dict(recipe["objectives"]["terms"])
        case "topk" | "deepseek" | "grin":
            return {"load_balancing": {"kind": "constant", "value": 1e-4}}
        case "remoe":
            target = 100 * (1 - size_row["num_experts_per_tok"] / size_row["num_experts"])
            return {"balanced_l1": {"kind": "multiplicative", "initial": 1e-8, "target": target, "factor": 1.05}}
        case "deco":
            # Published: 1.001 to 1.002 a step for 15,000 to 23,000 steps. A run of another length has the same range.
            factor = 1.0015 ** (20_000 / recipe["steps"])
            return {"router_entropy": {"kind": "multiplicative", "initial": 1e-8, "target": 80.0, "factor": factor}}
    return {}


def preset_config(size: str, method: str = "blockffn", **overrides: Any) -> BlockFFNConfig:
    """The configuration of a named size and method, with keyword overrides on top.

    Raises:
        ValueError: unknown size, method or field; the message names the nearest valid one.
    """
    size_row, method_row = _lookup("size", size, SIZES), _lookup("method", method, METHODS)
    start = _ROUTER_START.get(size, {}) if method == "blockffn" else {}
    valid = set(BlockFFNConfig.__dataclass_fields__)
    for key in overrides:
        if key not in valid:
            raise ValueError(f"unknown model field {key!r}{did_you_mean(key, valid)}")
    try:
        return BlockFFNConfig(**{**size_row, **method_row, **start, **overrides})
    except (StrictDataclassError, TypeError) as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"wrong model settings: {reason}") from error


def did_you_mean(word: str, valid: Any) -> str:
    """`; did you mean 'x'?` for the nearest valid word, or the list of all when none is near."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(sorted(valid))}"


def _lookup(kind: str, name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, table)}")
    return table[name]
