from __future__ import annotations

from typing import Any

import pytest

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import preset_config

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 6, "moe_intermediate_size": 8,
        "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
ATTENTION = {
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "mla": {"attention_type": "mla", "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 10,
            "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}  # fmt: skip


def tiny_model(attention: str = "gqa", method: str = "blockffn", **overrides: Any) -> BlockFFNForCausalLM:
    return BlockFFNForCausalLM(preset_config("nano", method, **{**TINY, **ATTENTION[attention], **overrides})).eval()


@pytest.fixture(params=sorted(ATTENTION))
def model(request: pytest.FixtureRequest) -> BlockFFNForCausalLM:
    return tiny_model(request.param)
