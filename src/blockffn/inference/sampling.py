"""From logits to the next token: pure functions, shared by plain and speculative decoding.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_LIKELY = 512  # tokens among which top-p looks first


@dataclass(frozen=True)
class SamplingSettings:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from so many most likely tokens; 0: from all.
        top_p: sample from the most likely tokens of this total probability; 1: from all.
        min_p: sample from tokens at least this share as likely as the most likely one; 0: from all.
        repetition_penalty: positive logits of tokens that occurred are divided by it, negative ones multiplied; 1: off.
        seed: of the random numbers.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be finite and positive, got {self.repetition_penalty}")

    @property
    def takes_best(self) -> bool:
        """Whether the next token is always the one with the largest logit."""
        return self.temperature == 0 and self.repetition_penalty == 1


def decisive_logits(settings: SamplingSettings) -> int | None:
    """How many of the largest logits, with those that equal the least of them, decide the next token; `None`: all."""
    if settings.repetition_penalty != 1:
        return None
    return 1 if settings.temperature == 0 else settings.top_k or None


def probabilities(logits: Tensor, history: Tensor | None, settings: SamplingSettings) -> Tensor:
    """The distribution `[..., V]` in float32 from which the next token is drawn.

    Args:
        logits: `[..., V]`.
        history: token ids `[N]`, or `[..., N]` for each row, that the repetition penalty counts; `None`: none.
    """
    scores = _penalise(logits.float(), history, settings.repetition_penalty)
    if settings.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    scores = scores / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    result = scores.softmax(dim=-1)
    if settings.top_p < 1:
        result = _keep_top_p(result, settings.top_p)
    if settings.min_p > 0:
        result = result.masked_fill(result < settings.min_p * result.amax(dim=-1, keepdim=True), 0.0)
    return result / result.sum(dim=-1, keepdim=True)


def choose(logits: Tensor, history: Tensor | None, settings: SamplingSettings, generator: torch.Generator) -> int:
    """The next token after logits `[V]`; the generator is on their device. Waits for the device."""
    if settings.temperature == 0:
        return int(_penalise(logits.float(), history, settings.repetition_penalty).argmax())
    return draw(probabilities(logits, history, settings), generator)


def draw(distribution: Tensor, generator: torch.Generator) -> int:
    """A token from probabilities `[V]`, of any positive total, by the inverse of their running sum.

    `torch.multinomial` takes ten times as long on a CPU. Tokens of probability 0 are never drawn.
    """
    total = distribution.double().cumsum(dim=-1)
    uniform = torch.rand(1, dtype=torch.float64, device=distribution.device, generator=generator)
    token = torch.searchsorted(total, uniform * total[-1:], right=True)
    return int(torch.minimum(token, torch.searchsorted(total, total[-1:])))


def _penalise(scores: Tensor, history: Tensor | None, penalty: float) -> Tensor:
    if penalty == 1 or history is None:
        return scores
    occurred = torch.zeros_like(scores, dtype=torch.bool)
    occurred.scatter_(-1, history.to(scores.device).expand(*scores.shape[:-1], -1), True)
    return torch.where(occurred, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _keep_top_p(result: Tensor, top_p: float) -> Tensor:
    """Zero the tokens that are not needed to reach a total of `top_p`; the most likely one always stays.

    Sorting a whole vocabulary takes longer than a small model's step. A few hundred tokens nearly always hold `top_p`.
    """
    size = result.shape[-1]
    ordered, index = result.topk(min(MOST_LIKELY, size), dim=-1)
    if bool((ordered.sum(dim=-1) < top_p).any()):
        ordered, index = result.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    before[..., 0] = 0.0
    return torch.zeros_like(result).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0.0))
