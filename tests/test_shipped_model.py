"""The model in `models/` is what its card says: it loads by both loaders, is small, sparse, and knows English prose."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockffn.checkpoints.load import load

FOLDER = Path(__file__).parent.parent / "models" / "mini-books"
MEGABYTE = 1_000_000
PASSAGE = (
    "It was late in the evening when the old man came home. The rain had not ceased all day, and the road was so heavy "
    "that his horse could hardly drag the cart. His daughter stood at the door with a candle in her hand. “You are "
    "wet, father,” she said; “come in, and sit down by the fire.” He did not answer her, but he took off his coat and "
    "sat down."
)


def test_files_are_small_enough_to_ship() -> None:
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert max(sizes) <= 16 * MEGABYTE
    assert sum(sizes) <= 40 * MEGABYTE


@pytest.mark.slow
def test_it_is_sparse_and_predicts_prose() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PASSAGE, add_special_tokens=False).input_ids]])
    model = load(FOLDER).eval()
    with torch.inference_mode():
        output = model(input_ids=ids, labels=ids, output_routing=True)
    assert 10 < math.exp(output.loss) < 120  # a model that learned nothing is at the vocabulary's 16384
    idle = [(routing.weights == 0).float().mean().item() for routing in output.routings]
    assert 0.72 < sum(idle) / len(idle) < 0.9


@pytest.mark.slow
def test_transformers_loads_the_same_weights() -> None:
    ids = torch.arange(40, 60)[None]
    ours, theirs = load(FOLDER).eval(), AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(input_ids=ids).logits.float(), ours(input_ids=ids).logits.float())
