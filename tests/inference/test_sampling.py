from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockffn.inference.sampling import MOST_LIKELY, SamplingSettings, choose, decisive_logits, draw, probabilities

HISTORY = torch.tensor([3, 3, 8, 20])


@pytest.mark.parametrize("settings", [
    SamplingSettings(temperature=0.7, top_p=1.0),
    SamplingSettings(temperature=1.3, top_p=0.9),
    SamplingSettings(temperature=1.0, top_k=5, top_p=1.0),
    SamplingSettings(temperature=1.0, top_k=12, top_p=0.8),
    SamplingSettings(temperature=2.0, top_p=1.0, min_p=0.2),
    SamplingSettings(temperature=0.8, top_p=0.95, repetition_penalty=1.4),
    SamplingSettings(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=0.7),
])  # fmt: skip
def test_probabilities_are_those_of_hugging_face(settings: SamplingSettings) -> None:
    logits = 3 * torch.randn(4, 30)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
                                 TemperatureLogitsWarper(settings.temperature)])  # fmt: skip
    if settings.top_k:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chain.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        chain.append(MinPLogitsWarper(settings.min_p))
    expected = chain(HISTORY.expand(4, -1), logits.clone()).softmax(-1)
    torch.testing.assert_close(probabilities(logits, HISTORY, settings), expected)


def test_each_row_may_have_its_own_history() -> None:
    settings = SamplingSettings(temperature=1.0, top_p=1.0, repetition_penalty=2.0)
    logits = torch.randn(2, 9)
    histories = torch.tensor([[1, 2], [5, 5]])
    together = probabilities(logits, histories, settings)
    for row in range(2):
        torch.testing.assert_close(together[row], probabilities(logits[row], histories[row], settings))


def test_temperature_zero_is_the_most_likely_token_after_the_penalty() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    greedy = SamplingSettings(temperature=0.0, repetition_penalty=1.5)
    assert probabilities(logits, None, greedy).tolist() == [1, 0, 0]
    assert probabilities(logits, torch.tensor([0]), greedy).tolist() == [0, 1, 0]
    assert choose(logits, torch.tensor([0]), greedy, torch.Generator()) == 1


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    settings = SamplingSettings(temperature=1.0, top_p=1.0)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, None, settings, generator) for _ in range(4000)]

    first = draw(0)
    assert first == draw(0) != draw(1)
    observed = torch.bincount(torch.tensor(first), minlength=4)
    expected = 4000 * probabilities(logits, None, settings)
    assert ((observed - expected) ** 2 / expected).sum() < 16.3  # chi-square with 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
                                             ("min_p", 1.5), ("repetition_penalty", 0.0)])  # fmt: skip
def test_a_wrong_setting_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
def test_top_p_of_a_large_vocabulary_is_that_of_hugging_face(sharpness: float) -> None:
    """Flat distributions need more than the tokens that are looked at first, steep ones a few of them."""
    logits = sharpness * torch.randn(3, 6 * MOST_LIKELY)
    logits[1] *= 3  # rows that need more and rows that do not
    settings = SamplingSettings(temperature=1.0, top_p=0.9)
    expected = TopPLogitsWarper(0.9)(None, logits.clone()).softmax(-1)
    torch.testing.assert_close(probabilities(logits, None, settings), expected)


def test_a_draw_has_the_given_shares_and_never_takes_what_has_none() -> None:
    shares = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    generator = torch.Generator().manual_seed(0)
    count = 4000
    drawn = torch.bincount(torch.tensor([draw(2 * shares, generator) for _ in range(count)]), minlength=6)
    assert not drawn[shares == 0].any()
    expected = count * shares[shares > 0]
    chi_square = ((drawn[shares > 0] - expected).square() / expected).sum()
    assert chi_square < 13.8  # 2 degrees of freedom, one in a thousand


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.0, "top_k": 7}, 1),
        ({"temperature": 0.8, "top_k": 7, "top_p": 0.9}, 7),
        ({"temperature": 0.8, "top_p": 0.9}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, None),
    ],
)
def test_the_largest_logits_that_decide_are_counted(settings: dict[str, float], count: int | None) -> None:
    assert decisive_logits(SamplingSettings(**settings)) == count  # type: ignore[arg-type]
