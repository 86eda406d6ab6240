"""Speculative decoding equals the plain loop, whatever the drafter says, and ends where it should."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, Request, generate
from blockffn.inference.sampling import probabilities
from blockffn.inference.speculative.decode import (
    UNSHAPED,
    Round,
    Routine,
    Shaper,
    Speculation,
    speculative_generate,
)
from blockffn.inference.speculative.decode import speculate as speculate_in_blocks
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget, DrawnNodes
from blockffn.inference.speculative.lossless import Difference, first_difference
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree
from blockffn.inference.target import Step, Target
from blockffn.models.causal_lm import BlockFFNForCausalLM
from tests.inference.speculative.stub_targets import BigramTarget, OracleDrafter, RecomputingTarget

PROMPT = [3, 1, 4, 1, 5]


def greedy(max_new_tokens: int, **settings: Any) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=max_new_tokens, temperature=0.0, **settings)


def speculate(
    target: Target, drafter: Drafter, settings: GenerationSettings, *, shaper: Shaper = UNSHAPED, **options: Any
) -> Generation:
    return speculative_generate(target, Speculation(drafter, shaper), PROMPT, settings, **options)


def counts(generation: Generation) -> SpeculationStatistics:
    assert generation.statistics.speculation is not None
    return generation.statistics.speculation


def difference(target: Target, drafter: Drafter, settings: GenerationSettings, **options: Any) -> Difference | None:
    return first_difference(target, PROMPT, settings, speculate(target, drafter, settings, **options))


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
    plain = generate(bigram, PROMPT, greedy(30))
    drafter = drafters(bigram, PROMPT + plain.token_ids)[name]
    decoded = speculate(bigram, drafter, greedy(30))
    assert decoded.token_ids == plain.token_ids
    assert bigram.committed == PROMPT + plain.token_ids[:-1]
    assert decoded.finish_reason == "length"


@pytest.mark.parametrize("name", NAMES[:-1])
def test_sampling_with_a_seed_is_the_plain_loops_too_where_trees_are_without_chance(
    name: str, bigram: BigramTarget
) -> None:
    settings = GenerationSettings(max_new_tokens=30, temperature=1.0, top_p=0.9, top_k=8, seed=4)
    plain = generate(bigram, PROMPT, settings).token_ids
    drafter = drafters(bigram, PROMPT + plain)[name]
    assert speculate(bigram, drafter, settings).token_ids == plain


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", NAMES[:-1])
def test_the_repetition_penalty_sees_the_path_as_text(name: str, temperature: float, bigram: BigramTarget) -> None:
    settings = GenerationSettings(max_new_tokens=30, temperature=temperature, repetition_penalty=1.7, seed=2)
    plain = generate(bigram, PROMPT, settings).token_ids
    assert plain != generate(bigram, PROMPT, replace(settings, repetition_penalty=1.0)).token_ids
    drafter = drafters(bigram, PROMPT + plain)[name]
    decoded = speculate(bigram, drafter, settings)
    assert decoded.token_ids == plain
    if name == "always right":
        assert counts(decoded).verifications == 5


def test_a_greedy_target_is_plain_with_drawn_trees_and_a_penalty(bigram: BigramTarget) -> None:
    settings = greedy(30, repetition_penalty=1.7)
    drafter = drafters(bigram, [])["drawing model"]
    assert speculate(bigram, drafter, settings).token_ids == generate(bigram, PROMPT, settings).token_ids


@pytest.mark.parametrize("tree", [BestNodes(top_k=2, depth=3, size=6), BestNodes(top_k=1, depth=3, size=3)])
def test_a_real_model_over_a_tree_gives_its_own_greedy_text(tree: BestNodes, tiny: BlockFFNForCausalLM) -> None:
    target = RecomputingTarget(tiny)
    # Drafting for itself accepts everything, with the tree mask and the positions right.
    drafter = ModelDrafter(RecomputingTarget(tiny), vocab_size=target.vocab_size, growth=tree)
    decoded = speculate(target, drafter, greedy(12))
    assert counts(decoded).acceptance_by_depth == [1.0, 1.0, 1.0]
    assert first_difference(target, PROMPT, greedy(12), decoded) is None


def test_an_oracle_takes_one_call_for_six_tokens(bigram: BigramTarget) -> None:
    text = generate(bigram, PROMPT, greedy(25)).token_ids
    drafter = OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=0, length=5)
    statistics = speculate(bigram, drafter, greedy(25)).statistics
    assert statistics.steps == 4  # one token comes from the prompt, then six a call
    assert statistics.speculation is not None
    report = statistics.speculation.to_dict()
    assert report["verifications"] == 4
    assert report["acceptance_length"] == 6
    assert report["acceptance_by_depth"] == [1.0] * 5
    assert report["offered_by_depth"] == [4] * 5
    assert report["largest_tree"] == report["tree_size"] == 5
    assert statistics.active_experts is not None
    assert statistics.union_experts is not None
    assert 0 < statistics.active_experts <= statistics.union_experts <= 8
    parts = (statistics.prefill_seconds, statistics.draft_seconds, statistics.decode_seconds)
    assert statistics.seconds == pytest.approx(sum(parts) + statistics.sampling_seconds)
    assert min(parts) > 0
    assert statistics.to_dict()["speculation"] == report


def test_a_drafter_that_is_never_right_costs_no_token(bigram: BigramTarget) -> None:
    text = generate(bigram, PROMPT, greedy(10)).token_ids
    drafter = OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=1)
    report = counts(speculate(bigram, drafter, greedy(10)))
    assert report.acceptance_length == 1
    assert report.acceptance_by_depth == [0.0]


def test_the_drafter_observes_exactly_what_is_committed(bigram: BigramTarget) -> None:
    text = generate(bigram, PROMPT, greedy(17)).token_ids
    drafter = OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=4)
    speculate(bigram, drafter, greedy(17))
    assert drafter.observed == bigram.committed


@pytest.mark.parametrize("limit", range(1, 9))
def test_exactly_as_many_tokens_as_asked(limit: int, bigram: BigramTarget) -> None:
    text = generate(bigram, PROMPT, greedy(40)).token_ids
    drafter = OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=0)
    assert speculate(bigram, drafter, greedy(limit)).token_ids == text[:limit]


@pytest.mark.parametrize("end", range(6))
def test_a_text_ends_with_an_end_token_inside_an_accepted_block(end: int) -> None:
    target = BigramTarget(torch.eye(12).roll(1, dims=1))  # counts upwards
    text = [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    drafter = OracleDrafter(PROMPT + text, 12, wrong_every=0)
    decoded = speculate(target, drafter, greedy(11, eos_token_ids=(text[end],)))
    assert decoded.token_ids == text[: end + 1]
    assert decoded.finish_reason == "eos"
    assert target.committed == PROMPT + text[:end]


@pytest.mark.parametrize("end", range(6))
def test_a_receiver_can_end_the_text_inside_an_accepted_block(end: int) -> None:
    target = BigramTarget(torch.eye(12).roll(1, dims=1))
    text = [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    drafter = OracleDrafter(PROMPT + text, 12, wrong_every=0)
    seen: list[int] = []

    def take(token: int) -> bool:
        seen.append(token)
        return token == text[end]

    decoded = speculate(target, drafter, greedy(11), on_token=take)
    assert decoded.token_ids == seen == text[: end + 1]
    assert decoded.finish_reason == "stop"
    assert first_difference(target, PROMPT, greedy(11), decoded) is None


def test_trees_shrink_where_the_cache_ends(bigram: BigramTarget) -> None:
    plain = generate(bigram, PROMPT, greedy(20))
    full = BigramTarget(bigram.logits, capacity=len(PROMPT) + 19)
    drafter = ModelDrafter(noisy_copy(bigram), vocab_size=12, growth=BestNodes(top_k=4, depth=4, size=12))
    decoded = speculate(full, drafter, greedy(20))  # the stub fails on a call too many
    assert decoded.token_ids == plain.token_ids
    assert counts(decoded).largest_tree == 12


def test_a_draft_model_with_a_full_cache_falls_silent(bigram: BigramTarget) -> None:
    small = BigramTarget(bigram.logits, capacity=len(PROMPT) + 6)
    drafter = ModelDrafter(small, vocab_size=12, growth=BestNodes(top_k=2, depth=3, size=6))
    assert difference(bigram, drafter, greedy(30)) is None


@pytest.mark.parametrize("speculative", [False, True])
def test_all_but_the_last_new_token_must_fit(speculative: bool, bigram: BigramTarget) -> None:
    target = BigramTarget(bigram.logits, capacity=10)

    def tokens(settings: GenerationSettings) -> list[int]:
        if speculative:
            return speculate(target, NgramDrafter(), settings).token_ids
        return generate(target, PROMPT, settings).token_ids

    with pytest.raises(ValueError, match="ask for at most 6 new tokens"):
        tokens(greedy(7))
    assert target.calls == []
    assert len(tokens(greedy(6))) == 6


@pytest.mark.parametrize(("prompt", "new", "message"), [
    ([], 4, "prompt has no tokens"), (PROMPT, 0, "at least 1"), ([12], 4, "outside the vocabulary of 12"),
    (PROMPT * 3, 1, "a prompt of 15 tokens exceeds the cache's capacity of 10; shorten it"),
])  # fmt: skip
def test_mistakes_are_named(prompt: list[int], new: int, message: str, bigram: BigramTarget) -> None:
    target = BigramTarget(bigram.logits, capacity=10)
    with pytest.raises(ValueError, match=message):
        speculative_generate(target, Speculation(NgramDrafter()), prompt, greedy(new))


class CarelessTarget(BigramTarget):
    """Rounds differently where it gets more than one token."""

    def compute(self, tokens: Tensor, parents: Tensor) -> Any:
        step = super().compute(tokens, parents)
        if len(tokens) > 1 and self.length > len(PROMPT) + 3:
            step.logits.sub_(2 * step.logits)
        return step


def test_a_target_that_is_not_lossless_is_caught_and_the_first_difference_named(bigram: BigramTarget) -> None:
    target = CarelessTarget(bigram.logits)
    plain = generate(target, PROMPT, greedy(16)).token_ids
    drafter = OracleDrafter(PROMPT + plain, 12, wrong_every=2)
    decoded = speculate(target, drafter, greedy(16))
    found = first_difference(target, PROMPT, greedy(16), decoded)
    assert found is not None
    assert found.position == next(i for i, (a, b) in enumerate(zip(decoded.token_ids, plain)) if a != b)
    assert (found.speculative, found.plain) == (decoded.token_ids[found.position], plain[found.position])
    assert found.margin is not None
    assert found.margin > 0
    assert f"differ first at new token {found.position}" in str(found)


@pytest.mark.parametrize("seed", range(4))
def test_a_difference_of_draws_says_how_far_the_draw_is_from_the_other_token(bigram: BigramTarget, seed: int) -> None:
    settings = GenerationSettings(max_new_tokens=9, temperature=1.0, seed=seed)
    plain = generate(bigram, PROMPT, settings)
    ids = list(plain.token_ids)
    likely = probabilities(bigram.logits[ids[4]], None, settings).double()
    generator = torch.Generator().manual_seed(seed)
    draw = [float(torch.rand(1, dtype=torch.float64, generator=generator)) for _ in ids][5]
    other = ids[5] + 1 if ids[5] + 1 < len(likely) else ids[5] - 1
    boundary = float(likely[: max(other, ids[5])].sum())
    found = first_difference(bigram, PROMPT, settings, replace(plain, token_ids=[*ids[:5], other, *ids[6:]]))
    assert found is not None
    assert found.shift == pytest.approx(abs(draw - boundary), abs=1e-6)
    assert "of probability away from that token" in str(found)


@pytest.mark.parametrize(("margin", "shift", "near"), [(0.1, None, True), (0.3, None, False), (9, 0.001, True),
                                                       (0.1, 0.2, False), (None, None, False)])  # fmt: skip
def test_rounding_explains_near_ties_and_draws_near_a_boundary(
    margin: float | None, shift: float | None, near: bool
) -> None:
    found = Difference(3, 1, 2, margin, None if margin is None else 10.0, shift)
    assert found.may_be_rounding == near
    assert str(found).endswith("so near that rounding can decide") == near


def test_a_text_that_ends_too_early_or_too_late_is_a_difference(bigram: BigramTarget) -> None:
    plain = generate(bigram, PROMPT, greedy(9))
    short = replace(plain, token_ids=plain.token_ids[:5])
    assert first_difference(bigram, PROMPT, greedy(9), short) == Difference(5, None, plain.token_ids[5])
    last = next(i for i in range(8) if plain.token_ids[i] not in plain.token_ids[:i])
    settings = greedy(9, eos_token_ids=(plain.token_ids[last],))
    found = first_difference(bigram, PROMPT, settings, plain)
    assert found == Difference(last + 1, plain.token_ids[last + 1], None)


def test_drawn_trees_cannot_be_cut(bigram: BigramTarget) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        Speculation(drafters(bigram, [])["drawing model"], HalfShaper())


class PrefillingTarget(BigramTarget):
    """Runs a prompt by itself and gives the logits of its last token alone."""

    def prefill(self, tokens: Tensor) -> Step:
        step = self.extend(tokens)
        self.commit(torch.arange(len(tokens)))
        return Step(step.logits[-1:], step.hidden)


def test_a_target_may_run_the_prompt_in_its_own_way(bigram: BigramTarget) -> None:
    target = PrefillingTarget(bigram.logits)
    tokens = speculate(target, NgramDrafter(), greedy(9)).token_ids
    assert tokens == generate(bigram, PROMPT, greedy(9)).token_ids


class HalfShaper(Shaper):
    """Keeps half of every tree."""

    def __init__(self) -> None:
        self.observed, self.texts = 0, []

    def start(self, tokens: int) -> None:
        self.texts.append(tokens)

    def shape(self, tree: DraftTree) -> DraftTree:
        return tree.best(len(tree) // 2)

    def observe(self, tree: DraftTree, verdict: Any, step: Any) -> None:
        assert len(step.logits) == len(tree) + 1
        self.observed += 1


def test_a_shaper_cuts_every_tree_and_sees_every_verdict(bigram: BigramTarget) -> None:
    drafter = ModelDrafter(noisy_copy(bigram), vocab_size=12, growth=BestNodes(top_k=4, depth=4, size=12))
    shaper = HalfShaper()
    decoded = speculate(bigram, drafter, greedy(20), shaper=shaper)
    assert decoded.token_ids == generate(bigram, PROMPT, greedy(20)).token_ids
    assert counts(decoded).largest_tree == 6
    assert shaper.texts == [len(PROMPT)]
    assert shaper.observed == counts(decoded).verifications


class RestingShaper(Shaper):
    """Lets three rounds pass without drafts before each with."""

    def __init__(self) -> None:
        self.rests: list[int] = []
        self.drafts_next = False

    def routine(self, most: Budget) -> Routine | None:
        self.drafts_next = not self.drafts_next
        return Routine(3, Budget(nodes=0, depth=0)) if self.drafts_next else None

    def rested(self, seconds: Sequence[float]) -> None:
        assert all(0 < spent < 1 for spent in seconds)
        self.rests.append(len(seconds))


class ListeningDrafter(OracleDrafter):
    """Keeps what it is told of the text."""

    def start(self, prompt: Any) -> None:
        self.told = list[int]()

    def observe(self, tokens: Any, hidden: Tensor) -> None:
        assert len(tokens) == len(hidden)
        self.told += list(tokens)


def decode_in_rows(
    bigram: BigramTarget, settings: GenerationSettings, shaper: Shaper, *, length: int
) -> tuple[Generation, list[int], ListeningDrafter]:
    """A text with drafts that are always right, the same as the plain loop's; that text; and the drafter."""
    text = generate(bigram, PROMPT, settings).token_ids
    drafter = ListeningDrafter(PROMPT + text, bigram.vocab_size, wrong_every=0, length=length)
    decoded = speculate(bigram, drafter, settings, shaper=shaper)
    assert decoded.token_ids == text
    return decoded, text, drafter


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_in_a_row_without_drafts_change_nothing(bigram: BigramTarget, temperature: float) -> None:
    settings, shaper = replace(greedy(22), temperature=temperature, seed=4), RestingShaper()
    decoded, text, drafter = decode_in_rows(bigram, settings, shaper, length=2)
    # A first token, then three plain ones and three with drafts in turn; the last rest ends with the text.
    assert shaper.rests == [3, 3, 3, 3]
    assert (counts(decoded).verifications, counts(decoded).verified_tokens) == (12 + 3, 21)
    assert drafter.told == PROMPT + text[:-1]
    cut = RestingShaper()
    assert speculate(bigram, drafter, replace(settings, max_new_tokens=3), shaper=cut).token_ids == text[:3]
    assert cut.rests == [2]


def test_a_rest_that_nobody_reads_to_its_end_is_told_without_the_time_of_its_reader(bigram: BigramTarget) -> None:
    shaper = RestingShaper()
    request = Request(PROMPT, greedy(22))
    blocks = speculate_in_blocks(bigram, Speculation(NgramDrafter(), shaper), request)
    first, second = next(blocks), next(blocks)
    time.sleep(1.1)
    third = next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert shaper.rests == [2]
    assert first + second + third == generate(bigram, PROMPT, greedy(3)).token_ids
    assert request.recorder.speculation is not None
    assert request.recorder.speculation.verifications == 2


class RowsShaper(RestingShaper):
    """Rows of two rounds with chains of up to three, after each row of plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[Round] = []

    def routine(self, most: Budget) -> Routine | None:
        return super().routine(most) or Routine(2, Budget(nodes=3, depth=3, chain=True))

    def budget(self, most: Budget) -> Budget:
        raise AssertionError("nothing is asked between the rounds of a routine")

    def passed(self, rounds: Sequence[Round]) -> None:
        assert all(0 <= round_.draft_seconds < round_.seconds < 1 for round_ in rounds)
        self.rounds += rounds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_in_a_row_with_drafts_change_nothing(bigram: BigramTarget, temperature: float) -> None:
    settings, shaper = replace(greedy(23), temperature=temperature, seed=4), RowsShaper()
    decoded, text, drafter = decode_in_rows(bigram, settings, shaper, length=5)
    # A first token, three plain ones, two rounds of four; then the same, but the text leaves room for fewer drafts.
    assert shaper.rests == [3, 3]
    assert [(len(round_.tree), round_.accepted) for round_ in shaper.rounds] == [(3, 3), (3, 3), (3, 3), (3, 3)]
    assert (counts(decoded).verifications, counts(decoded).nodes) == (6 + 4, 12)
    assert drafter.told == PROMPT + text[:-1]
    short = RowsShaper()
    assert speculate(bigram, drafter, replace(settings, max_new_tokens=7), shaper=short).token_ids == text[:7]
    assert [len(round_.tree) for round_ in short.rounds] == [2]  # the target adds the last token


def test_a_row_of_drafts_that_nobody_reads_to_its_end_is_told(bigram: BigramTarget) -> None:
    text, shaper = generate(bigram, PROMPT, greedy(22)).token_ids, RowsShaper()
    drafter = OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=0, length=5)
    blocks = speculate_in_blocks(bigram, Speculation(drafter, shaper), Request(PROMPT, greedy(22)))
    read = [token for _ in range(5) for token in next(blocks)]
    blocks.close()  # type: ignore[attr-defined]
    assert read == text[: 4 + 4]
    assert len(shaper.rounds) == 1


def test_counts_of_several_texts_add_up(bigram: BigramTarget) -> None:
    text = generate(bigram, PROMPT, greedy(25)).token_ids
    short, long = (OracleDrafter(PROMPT + text, bigram.vocab_size, wrong_every=0, length=n) for n in (2, 5))
    total = SpeculationStatistics()
    for drafter in (short, long):
        total.add(counts(speculate(bigram, drafter, greedy(25))))
    assert (total.verifications, total.verified_tokens, total.largest_tree) == (8 + 4, 48, 5)
    assert total.tried == total.accepted == [12, 12, 4, 4, 4]
    assert total.acceptance_length == 4
