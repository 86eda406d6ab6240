"""Our drafts inside Hugging Face's `generate`: its text is the one without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockffn.inference.assistant import Assistant
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.growth import BestNodes, DrawnNodes
from blockffn.models.cache_name import CACHE_NAME
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from tests.inference.speculative.stub_targets import OracleDrafter
from tests.models.conftest import ATTENTION, tiny_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 3, 1]])
MASK = torch.ones_like(PROMPT)


def generate(model: Any, **settings: Any) -> list[int]:
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return model.generate(PROMPT, attention_mask=MASK, **settings)[0].tolist()


@pytest.fixture(scope="module", params=sorted(ATTENTION))
def model(request: pytest.FixtureRequest) -> BlockFFNForCausalLM:
    torch.manual_seed(4)
    return tiny_model(request.param, initializer_range=0.5)


def drafts(model: BlockFFNForCausalLM) -> dict[str, Any]:
    plain = generate(model)
    torch.manual_seed(5)
    eagle = DraftModel(tiny_model("gqa").config).eval()
    for parameter in eagle.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tree = BestNodes(top_k=3, depth=3, size=9)
    return {
        "n-gram": "ngram",
        "eagle": eagle,
        "tree of a model": ModelDrafter(ModelTarget(model), vocab_size=61, growth=tree),
        "right": OracleDrafter(plain, 61, wrong_every=0),
        "sometimes": OracleDrafter(plain, 61, wrong_every=3),
        "never": OracleDrafter(plain, 61, wrong_every=1),
    }


@pytest.mark.parametrize("name", ["n-gram", "eagle", "tree of a model", "right", "sometimes", "never"])
def test_greedy_text_is_the_plain_one(name: str, model: BlockFFNForCausalLM) -> None:
    assistant = Assistant(model, drafts(model)[name], length=4)
    for settings in ({}, {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"repetition_penalty": 1.3}):
        assert generate(model, assistant_model=assistant, **settings) == generate(model, **settings)
    generate(model, assistant_model=assistant)
    expected = {"right": 19 / 4, "never": 1.0}
    assert assistant.statistics.acceptance_length is not None
    if name in expected:
        assert assistant.statistics.acceptance_length == pytest.approx(expected[name])


def test_an_end_token_ends_the_text_inside_a_draft(model: BlockFFNForCausalLM) -> None:
    plain = generate(model)
    for token in dict.fromkeys(plain[PROMPT.shape[1] :]):
        assistant = Assistant(model, OracleDrafter(plain, 61, wrong_every=0))
        assert generate(model, assistant_model=assistant, eos_token_id=token) == generate(model, eos_token_id=token)


def test_sampled_text_has_the_models_distribution(model: BlockFFNForCausalLM) -> None:
    """The second token of many samples against the exact distribution, chi-square."""
    torch.manual_seed(6)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 4, "temperature": 0.7, "max_new_tokens": 3}
    plain = generate(model)
    assistant = Assistant(model, OracleDrafter(plain, 61, wrong_every=0), length=2)
    first = plain[PROMPT.shape[1]]
    logits = model(torch.tensor([plain[: PROMPT.shape[1] + 1]])).logits[0, -1] / 0.7
    top = logits.topk(4)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(dim=-1).tolist()))
    counts = dict.fromkeys(expected, 0)
    for _ in range(150):
        text = generate(model, assistant_model=assistant, **settings)
        if text[PROMPT.shape[1]] == first:
            counts[text[PROMPT.shape[1] + 1]] += 1
    total = sum(counts.values())
    assert total > 40
    chi_square = sum((counts[t] - total * p) ** 2 / (total * p) for t, p in expected.items())
    assert chi_square < 21  # 3 degrees of freedom: one false alarm in 10 000


def test_mistakes_are_named(model: BlockFFNForCausalLM) -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Assistant(model, "ngram", length=0)
    with pytest.raises(ValueError, match="drawn at random"):
        Assistant(model, ModelDrafter(ModelTarget(model), vocab_size=61, growth=DrawnNodes()))
    cache = model(PROMPT[:, :4], use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="begins with an empty cache; leave out this one of 4 tokens"):
        generate(model, assistant_model=Assistant(model, "ngram"), **{CACHE_NAME: cache})
