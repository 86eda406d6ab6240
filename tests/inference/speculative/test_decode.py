"""Speculative decoding equals the plain loop, whatever the drafter says, and ends where it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.inference.speculative.decode import Settings, plain_generate, speculative_generate
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget, DrawnNodes
from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.target import Step
from blockffn.models.causal_lm import BlockFFNForCausalLM
from tests.inference.speculative.stub_targets import BigramTarget, OracleDrafter, RecomputingTarget

PROMPT = torch.tensor([3, 1, 4, 1, 5])


def softmax(logits: Tensor, history: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def noisy_copy(target: BigramTarget, noise: float = 0.5) -> BigramTarget:
    generator = torch.Generator().manual_seed(9)
    return BigramTarget(target.logits + noise * torch.randn(target.logits.shape, generator=generator))


def drafters(target: BigramTarget, text: list[int]) -> dict[str, Drafter]:
    v = target.vocab_size
    return {
        "always right": OracleDrafter(text, v, wrong_every=0),
        "never right": OracleDrafter(text, v, wrong_every=1),
        "sometimes right": OracleDrafter(text, v, wrong_every=3),
        "n-gram": NgramDrafter(),
        "model": ModelDrafter(noisy_copy(target), vocab_size=v, growth=BestNodes(top_k=3, depth=3, size=8)),
        "drawing model": ModelDrafter(noisy_copy(target), vocab_size=v, growth=DrawnNodes(widths=(2, 2, 1))),
    }


NAMES = ["always right", "never right", "sometimes right", "n-gram", "model", "drawing model"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_the_plain_loops_with_any_drafter(name: str, bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=30)
    plain = plain_generate(bigram, PROMPT, settings)
    drafter = drafters(bigram, [*PROMPT.tolist(), *plain.tokens])[name]
    decoded = speculative_generate(bigram, drafter, PROMPT, settings)
    assert decoded.tokens == plain.tokens
    assert bigram.committed == [*PROMPT.tolist(), *plain.tokens[:-1]]
    assert decoded.reason == "length"


@pytest.mark.parametrize("name", NAMES[:-1])
def test_sampling_with_a_seed_is_the_plain_loops_too_where_trees_are_without_chance(
    name: str, bigram: BigramTarget
) -> None:
    settings = Settings(max_new_tokens=30, probabilities=softmax, seed=4)
    plain = plain_generate(bigram, PROMPT, settings)
    drafter = drafters(bigram, [*PROMPT.tolist(), *plain.tokens])[name]
    assert speculative_generate(bigram, drafter, PROMPT, settings).tokens == plain.tokens


def never_again(logits: Tensor, history: Tensor) -> Tensor:
    """Sampling among the tokens that have not occurred in the last eight."""
    return logits.index_fill(0, history[-8:], -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("name", ["always right", "sometimes right", "model"])
def test_probabilities_that_depend_on_the_text_see_the_path_as_text(name: str, bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=30, probabilities=never_again, check_lossless=True)
    plain = plain_generate(bigram, PROMPT, settings).tokens
    assert all(token not in plain[max(i - 8, 0) : i] for i, token in enumerate(plain))
    drafter = drafters(bigram, [*PROMPT.tolist(), *plain])[name]
    decoded = speculative_generate(bigram, drafter, PROMPT, settings)
    assert decoded.difference is None
    assert decoded.statistics.verifications < 29


@pytest.mark.parametrize("tree", [BestNodes(top_k=2, depth=3, size=6), BestNodes(top_k=1, depth=3, size=3)])
def test_a_real_model_over_a_tree_gives_its_own_greedy_text(tree: BestNodes, tiny: BlockFFNForCausalLM) -> None:
    target = RecomputingTarget(tiny)
    # Drafting for itself accepts everything, with the tree mask and the positions right.
    drafter = ModelDrafter(RecomputingTarget(tiny), vocab_size=target.vocab_size, growth=tree)
    decoded = speculative_generate(target, drafter, PROMPT, Settings(max_new_tokens=12, check_lossless=True))
    assert decoded.checked
    assert decoded.difference is None
    assert decoded.statistics.report()["acceptance_by_depth"] == [1.0, 1.0, 1.0]


def test_an_oracle_takes_one_call_for_six_tokens(bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=25)
    text = plain_generate(bigram, PROMPT, settings).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *text], bigram.vocab_size, wrong_every=0, length=5)
    report = speculative_generate(bigram, drafter, PROMPT, settings).statistics.report(num_experts=8)
    assert report["verifications"] == 4  # one token comes from the prompt, then six a call
    assert report["acceptance_length"] == 6
    assert report["acceptance_by_depth"] == [1.0] * 5
    assert report["largest_tree"] == report["tree_size"] == 5
    assert 0 < report["union_share"] <= 1
    assert all(seconds >= 0 for seconds in report["seconds"].values())


def test_a_drafter_that_is_never_right_costs_no_token(bigram: BigramTarget) -> None:
    text = plain_generate(bigram, PROMPT, Settings(max_new_tokens=10)).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *text], bigram.vocab_size, wrong_every=1)
    report = speculative_generate(bigram, drafter, PROMPT, Settings(max_new_tokens=10)).statistics.report()
    assert report["acceptance_length"] == 1
    assert report["acceptance_by_depth"] == [0.0]


def test_the_drafter_observes_exactly_what_is_committed(bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=17)
    text = plain_generate(bigram, PROMPT, settings).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *text], bigram.vocab_size, wrong_every=4)
    speculative_generate(bigram, drafter, PROMPT, settings)
    assert drafter.observed == bigram.committed


@pytest.mark.parametrize("limit", range(1, 9))
def test_exactly_as_many_tokens_as_asked(limit: int, bigram: BigramTarget) -> None:
    text = plain_generate(bigram, PROMPT, Settings(max_new_tokens=40)).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *text], bigram.vocab_size, wrong_every=0)
    assert speculative_generate(bigram, drafter, PROMPT, Settings(max_new_tokens=limit)).tokens == text[:limit]


@pytest.mark.parametrize("end", range(6))
def test_a_text_ends_with_an_end_token_inside_an_accepted_block(end: int) -> None:
    target = BigramTarget(torch.eye(12).roll(1, dims=1))  # counts upwards
    text = [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    drafter = OracleDrafter([*PROMPT.tolist(), *text], 12, wrong_every=0)
    decoded = speculative_generate(target, drafter, PROMPT, Settings(max_new_tokens=11, end_tokens=[text[end]]))
    assert decoded.tokens == text[: end + 1]
    assert decoded.reason == "end"
    assert target.committed == [*PROMPT.tolist(), *text[:end]]


def test_trees_shrink_where_the_cache_ends(bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=20)
    plain = plain_generate(bigram, PROMPT, settings)
    full = BigramTarget(bigram.logits, capacity=len(PROMPT) + 19)
    drafter = ModelDrafter(noisy_copy(bigram), vocab_size=12, growth=BestNodes(top_k=4, depth=4, size=12))
    decoded = speculative_generate(full, drafter, PROMPT, settings)  # the stub fails on a call too many
    assert decoded.tokens == plain.tokens
    assert decoded.statistics.largest_tree == 12


def test_a_draft_model_with_a_full_cache_falls_silent(bigram: BigramTarget) -> None:
    small = BigramTarget(bigram.logits, capacity=len(PROMPT) + 6)
    drafter = ModelDrafter(small, vocab_size=12, growth=BestNodes(top_k=2, depth=3, size=6))
    settings = Settings(max_new_tokens=30, check_lossless=True)
    assert speculative_generate(bigram, drafter, PROMPT, settings).difference is None


def test_what_does_not_fit_is_refused_before_any_work(bigram: BigramTarget) -> None:
    target = BigramTarget(bigram.logits, capacity=10)
    with pytest.raises(ValueError, match="ask for at most 6 new tokens"):
        speculative_generate(target, NgramDrafter(), PROMPT, Settings(max_new_tokens=7))
    assert target.calls == []
    assert len(speculative_generate(target, NgramDrafter(), PROMPT, Settings(max_new_tokens=6)).tokens) == 6


@pytest.mark.parametrize(("prompt", "settings", "message"), [
    (PROMPT[:0], {}, "prompt is empty"), (PROMPT, {"max_new_tokens": 0}, "at least 1"),
])  # fmt: skip
def test_mistakes_are_named(prompt: Tensor, settings: dict[str, Any], message: str, bigram: BigramTarget) -> None:
    with pytest.raises(ValueError, match=message):
        speculative_generate(bigram, NgramDrafter(), prompt, Settings(**settings))


def test_every_block_is_streamed_at_once(bigram: BigramTarget) -> None:
    text = plain_generate(bigram, PROMPT, Settings(max_new_tokens=14)).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *text], bigram.vocab_size, wrong_every=0)
    blocks: list[list[int]] = []
    speculative_generate(bigram, drafter, PROMPT, Settings(max_new_tokens=14), on_tokens=blocks.append)
    assert [len(block) for block in blocks] == [1, 6, 6, 1]
    assert [token for block in blocks for token in block] == text


class CarelessTarget(BigramTarget):
    """Rounds differently where it gets more than one token."""

    def compute(self, tokens: Tensor, parents: Tensor) -> Any:
        step = super().compute(tokens, parents)
        if len(tokens) > 1 and self.length > len(PROMPT) + 3:
            step.logits.sub_(2 * step.logits)
        return step


def test_a_target_that_is_not_lossless_is_caught_and_the_first_difference_named(bigram: BigramTarget) -> None:
    target = CarelessTarget(bigram.logits)
    plain = plain_generate(target, PROMPT, Settings(max_new_tokens=16)).tokens
    drafter = OracleDrafter([*PROMPT.tolist(), *plain], 12, wrong_every=2)
    decoded = speculative_generate(target, drafter, PROMPT, Settings(max_new_tokens=16, check_lossless=True))
    difference = decoded.difference
    assert difference is not None
    assert difference.position == next(i for i, (a, b) in enumerate(zip(decoded.tokens, plain)) if a != b)
    assert difference.plain == plain[difference.position]
    assert difference.margin is not None
    assert difference.margin > 0
    assert f"differ first at new token {difference.position}" in str(difference)


def test_drawn_trees_are_neither_compared_nor_cut(bigram: BigramTarget) -> None:
    drafter = drafters(bigram, [])["drawing model"]
    settings = Settings(max_new_tokens=4, probabilities=softmax, check_lossless=True)
    with pytest.raises(ValueError, match="draws at random"):
        speculative_generate(bigram, drafter, PROMPT, settings)
    with pytest.raises(ValueError, match="cannot be cut"):
        speculative_generate(bigram, drafter, PROMPT, Settings(), shaper=HalfShaper())


class PrefillingTarget(BigramTarget):
    """Runs a prompt by itself and gives the logits of its last token alone."""

    def prefill(self, tokens: Tensor) -> Step:
        step = self.extend(tokens)
        self.commit(torch.arange(len(tokens)))
        return Step(step.logits[-1:], step.hidden)


def test_a_target_may_run_the_prompt_in_its_own_way(bigram: BigramTarget) -> None:
    settings = Settings(max_new_tokens=9)
    target = PrefillingTarget(bigram.logits)
    tokens = speculative_generate(target, NgramDrafter(), PROMPT, settings).tokens
    assert tokens == plain_generate(bigram, PROMPT, settings).tokens


class HalfShaper:
    """Keeps half of every tree."""

    def __init__(self) -> None:
        self.observed = 0

    def budget(self, most: Budget) -> Budget:
        return most

    def shape(self, tree: DraftTree) -> DraftTree:
        return tree.best(len(tree) // 2)

    def observe(self, tree: DraftTree, verdict: Any, step: Any) -> None:
        assert len(step.logits) == len(tree) + 1
        self.observed += 1


def test_a_shaper_cuts_every_tree_and_sees_every_verdict(bigram: BigramTarget) -> None:
    drafter = ModelDrafter(noisy_copy(bigram), vocab_size=12, growth=BestNodes(top_k=4, depth=4, size=12))
    shaper = HalfShaper()
    settings = Settings(max_new_tokens=20, check_lossless=True)
    decoded = speculative_generate(bigram, drafter, PROMPT, settings, shaper=shaper)
    assert decoded.difference is None
    assert decoded.statistics.largest_tree == 6
    assert shaper.observed == decoded.statistics.verifications
