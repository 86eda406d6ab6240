"""Rates are medians of rounds, ratios are taken within a round, and a wrong text is found."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from blockffn.evaluation.decoding.prompts import EncodedPrompt
from blockffn.evaluation.decoding.rounds import acceptance_by_depth, check_way, summarise, time_ways
from blockffn.evaluation.decoding.ways import Decoder, Run
from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.statistics import GenerationStatistics
from blockffn.inference.target import Step
from tests.inference.speculative.stub_targets import BigramTarget

PROMPTS = [EncodedPrompt("qa", (1, 2)), EncodedPrompt("qa", (3,)), EncodedPrompt("rag", (4, 5, 6))]


class Scripted:
    """Takes the seconds that it is told, call by call."""

    def __init__(self, name: str, seconds: Sequence[float], log: list[str]) -> None:
        self.name, self._seconds, self._log = name, iter(seconds), log

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Run:
        self._log.append(self.name)
        return Run([0] * max_new_tokens, next(self._seconds), 0.5)


def test_a_rate_is_the_median_round_and_a_ratio_that_of_the_rounds() -> None:
    # Rounds of 2, 4 and 8 seconds, and another way that takes half as long whatever the machine does.
    slow = [[Run([0] * 11, s, 0.5)] for s in (2.0, 4.0, 8.0)]
    fast = [[Run([0] * 11, s / 2, 0.5)] for s in (2.0, 4.0, 8.0)]
    result = summarise("fast", fast, PROMPTS[:1], slow).overall
    assert result.tokens_per_second == pytest.approx(10 / 2)
    assert result.ratio == result.lowest_ratio == result.highest_ratio == pytest.approx(2)
    assert result.prefill_tokens_per_second == pytest.approx(2 / 0.5)
    assert result.acceptance_length is None


def test_a_slow_round_moves_neither_rate_nor_ratio() -> None:
    slow = [[Run([0] * 11, s, 0.5)] for s in (2.0, 2.0, 2.0)]
    fast = [[Run([0] * 11, s, 0.5)] for s in (1.0, 1.0, 100.0)]
    result = summarise("fast", fast, PROMPTS[:1], slow).overall
    assert (result.tokens_per_second, result.ratio) == (10, 2)
    assert (result.lowest_ratio, result.highest_ratio) == (0.02, 2)


def test_experts_are_means_over_steps_and_shares_of_time_add_up() -> None:
    common = {"prompt_tokens": 2, "new_tokens": 11, "prefill_seconds": 0.5, "sampling_seconds": 1.0}
    short = GenerationStatistics(steps=2, decode_seconds=2.0, union_experts=9.0, active_experts=3.0, **common)
    long = GenerationStatistics(steps=6, decode_seconds=4.0, union_experts=1.0, active_experts=1.0, **common)
    result = summarise("way", [[Run([0] * 11, 3.0, 0.5, one) for one in (short, long)]], PROMPTS[:2], None)
    assert result.union_experts == result.overall.union_experts == 3
    assert result.active_experts == 1.5
    assert result.shares == {"draft": 0, "decode": 0.75, "sampling": 0.25}


def test_kinds_of_prompts_are_told_apart_and_all_are_pooled() -> None:
    runs = [[Run([0] * 11, 1.0, 1.0), Run([0] * 11, 3.0, 1.0), Run([0] * 11, 10.0, 1.0)]]
    rates = summarise("way", runs, PROMPTS, None).rates
    assert [rate.task for rate in rates] == ["qa", "rag", "all"]
    assert [rate.tokens_per_second for rate in rates] == pytest.approx([20 / 4, 10 / 10, 30 / 14])
    assert rates[0].ratio is None


def test_ways_take_turns_and_each_begins() -> None:
    log: list[str] = []
    ways = [Scripted(name, [1.0] * 6, log) for name in "abc"]
    results = time_ways(ways, PROMPTS, max_new_tokens=3, rounds=2, baseline="a")
    assert "".join(log) == "abc" + "bca" + "cab" + "bca" + "cab" + "abc"
    assert [result.way for result in results] == ["a", "b", "c"]


@pytest.mark.parametrize(("changed", "message"), [({"max_new_tokens": 1}, "at least 2"), ({"rounds": 0}, "at least 1"),
                                                  ({"baseline": "z"}, "none of a")])  # fmt: skip
def test_what_cannot_be_timed_is_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"max_new_tokens": 3, "rounds": 1, "baseline": "a"} | changed
    with pytest.raises(ValueError, match=message):
        time_ways([Scripted("a", [1.0] * 9, [])], PROMPTS, **arguments)  # type: ignore[arg-type]


def test_ways_of_one_name_are_refused() -> None:
    """Their runs would be taken for one way's."""
    with pytest.raises(ValueError, match="'a' is the name of 2 ways"):
        time_ways([Scripted(name, [1.0] * 3, []) for name in "aba"], PROMPTS, max_new_tokens=2, rounds=1, baseline="a")


def test_acceptance_by_depth_pools_texts_of_different_depth() -> None:
    one = SpeculationStatistics(tried=[4, 2], accepted=[2, 1])
    two = SpeculationStatistics(tried=[6], accepted=[6])
    assert acceptance_by_depth([one, two]) == pytest.approx((0.8, 0.5))


class Rounding(BigramTarget):
    """Chooses otherwise for several tokens than for one, by `margin` of the logits' scale."""

    def __init__(self, margin: float) -> None:
        logits = 10.0 * torch.nn.functional.one_hot((torch.arange(6) + 1) % 6, 6).float()
        super().__init__(logits)
        self.margin = margin

    def compute(self, tokens: torch.Tensor, parents: torch.Tensor) -> Step:
        step = super().compute(tokens, parents)
        logits = step.logits.clone()
        second = (tokens + 2) % 6
        rows = torch.arange(len(tokens))
        alone = logits[rows, (tokens + 1) % 6]
        logits[rows, second] = alone * (1 + self.margin if len(tokens) > 1 else 1 - self.margin)
        return Step(logits, step.hidden, step.union, step.active)


@pytest.mark.parametrize(("margin", "ties", "faults"), [(1e-4, 1, 0), (0.5, 0, 1)])
def test_a_near_tie_is_told_from_a_fault(margin: float, ties: int, faults: int) -> None:
    way = Decoder("drafted", Rounding(margin), Speculation(NgramDrafter()))
    check = check_way(way, [EncodedPrompt("qa", (0, 1, 2, 3, 4, 5, 0, 1, 2))], 8)
    assert (check.texts, check.ties, len(check.faults)) == (1, ties, faults)
