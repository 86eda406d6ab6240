"""Whatever a drafter proposes, and wherever a text ends: the tokens, and why they end, are those of the plain loop."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import UNSHAPED, Speculation, speculative_generate
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.shaping import CostAwareShaper, CostModel
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.target import Target
from tests.inference.speculative.stub_targets import BigramTarget
from tests.models.conftest import tiny_model

V = 12


class RandomTrees:
    """Trees of random shape. A node goes on as the text does, `right` of the time, or anyhow; siblings may be equal."""

    deterministic = True

    def __init__(self, text: list[int], *, right: float, seed: int) -> None:
        self.text, self.right, self.random = text, right, random.Random(seed)
        self.observed = 0

    def start(self, prompt: list[int]) -> None:
        self.observed = 0

    def observe(self, tokens: list[int], hidden: Tensor) -> None:
        assert tokens == self.text[self.observed : self.observed + len(tokens)]
        assert len(hidden) == len(tokens)
        self.observed += len(tokens)

    def propose(self, context: list[int], budget: Budget) -> DraftTree:
        assert self.observed == len(context) - 1
        rng, depths, parents, tokens = self.random, list[int](), list[int](), list[int]()
        for node in range(rng.randint(0, max(budget.nodes, 0)) if budget.depth > 0 else 0):
            above = [ROOT, *(n for n in range(node) if depths[n] < budget.depth)]
            # The newest more often than others, so that long paths occur.
            parent = above[-1] if rng.random() < 0.6 else rng.choice(above)
            depths.append(1 if parent == ROOT else depths[parent] + 1)
            place = len(context) + depths[-1] - 1
            known = place < len(self.text) and rng.random() < self.right
            parents.append(parent)
            tokens.append(self.text[place] if known else rng.randrange(V))
        return DraftTree(tokens, parents, [-rng.random() for _ in tokens])


def any_request(seed: int) -> dict[str, Any]:
    """A request, and drafts for it; small numbers and odd settings are as likely as others."""
    rng = random.Random(seed)
    return {
        "prompt": [rng.randrange(V) for _ in range(rng.randint(1, 9))],
        "settings": GenerationSettings(
            max_new_tokens=rng.choice([1, 2, 3, rng.randint(4, 40)]),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=rng.choice([0, 1, 4]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
            seed=rng.randrange(99),
            eos_token_ids=tuple(rng.choice([[], [], [rng.randrange(V)], [0, 1, 2]])),
        ),
        "stop_after": rng.choice([None, None, rng.randint(1, 20)]),
        "room": rng.choice([0, 1, rng.randint(2, 20)]),
        "most": Budget(nodes=rng.choice([0, 1, 4, 16, 16]), depth=rng.choice([0, 1, 2, 6, 6])),
        "right": rng.choice([0.0, 0.5, 0.9, 1.0]),
        "shaped": rng.random() < 0.3,
        "seed": rng.randrange(2**16),
    }


def check(make_target: Any, request: dict[str, Any]) -> None:
    prompt, asked = request["prompt"], request["settings"]
    target: Target = make_target(capacity=len(prompt) + asked.max_new_tokens - 1 + request["room"])

    def receiver() -> Any:
        received: list[int] = []

        def receive(token: int) -> bool:
            received.append(token)
            return len(received) == request["stop_after"]

        return receive

    whole = generate(target, prompt, replace(asked, eos_token_ids=())).token_ids
    plain = generate(target, prompt, asked, on_token=receiver())
    assert plain.token_ids == whole[: len(plain.token_ids)]
    drafter = RandomTrees(prompt + whole, right=request["right"], seed=request["seed"])
    shaper = CostAwareShaper(CostModel(2.0, 0.1, 0.2, 0.01), num_experts=12) if request["shaped"] else UNSHAPED
    speculation = Speculation(drafter, shaper, request["most"])
    for _ in range(2):  # nothing is left of a text that could change the next
        decoded = speculative_generate(target, speculation, prompt, asked, on_token=receiver())
        assert (decoded.token_ids, decoded.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert target.length == len(prompt) + len(plain.token_ids) - 1
        counts = decoded.statistics.speculation
        assert counts is not None
        assert counts.verifications == decoded.statistics.steps <= plain.statistics.steps
        assert counts.largest_tree <= request["most"].nodes
        assert len(counts.tried) <= request["most"].depth


@pytest.mark.parametrize("seed", range(200))
def test_tables_of_bigrams(seed: int) -> None:
    logits = 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    check(lambda capacity: BigramTarget(logits, capacity=capacity), any_request(seed))


@cache
def model(attention: str, method: str) -> Any:
    torch.manual_seed(7)
    return tiny_model(attention, method, vocab_size=V, initializer_range=0.5).double()


@pytest.mark.parametrize("method", ["blockffn", "dense", "topk"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("seed", range(10))
def test_models(seed: int, attention: str, method: str) -> None:
    chosen = model(attention, method)
    check(lambda capacity: ModelTarget(chosen, capacity=min(capacity, 64)), any_request(seed))
