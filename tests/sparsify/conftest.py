"""Tiny random Llamas, a tokenizer and text for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blockffn.data.prepare import prepare
from blockffn.data.tokenizer import load_tokenizer

MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def make_llama() -> MakeLlama:
    """A Llama whose weights are large enough for its logits to depend on every one of them."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(1)
        fields = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                  "initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of short documents over a small vocabulary."""
    folder = tmp_path_factory.mktemp("sparsify")
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randrange(30, 60))) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare([folder / "text.jsonl"], folder / "data", vocab_size=300, valid_fraction=0.2)
    return folder / "data"


@pytest.fixture
def llama_folder(make_llama: MakeLlama, text: Path, tmp_path: Path) -> Path:
    """A Llama as its folder on disk, with the tokenizer of `text`."""
    make_llama(vocab_size=300).save_pretrained(tmp_path / "llama")
    load_tokenizer(text).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"
