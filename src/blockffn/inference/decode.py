"""Requests, and the plain loop: one token after the other. What every faster way of decoding must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.inference.sampling import SamplingSettings, choose, decisive_logits
from blockffn.inference.statistics import GenerationStatistics, Recorder
from blockffn.inference.target import Step, Target, ask_best, check_request, expect_choices, prefill

OnToken = Callable[[int], bool | None]


@dataclass(frozen=True)
class GenerationSettings(SamplingSettings):
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: at most so many.
        eos_token_ids: the first of these ends the text; it counts as a new token.
    """

    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """New tokens of one request.

    Attributes:
        finish_reason: `length`, `eos`, or `stop`: whoever received the tokens asked for no more.
    """

    token_ids: list[int]
    finish_reason: str
    statistics: GenerationStatistics


class Request:
    """One prompt that is being continued, by whichever loop.

    Args:
        on_token: called with each new token; the text ends when it returns `True`.
        recorder: of times and steps; default: one of its own.

    Attributes:
        tokens: the prompt's and the new ones.
        finish_reason: `None` while the text goes on; see `Generation`.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationSettings,
        *,
        on_token: OnToken | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self.recorder = Recorder() if recorder is None else recorder
        self.tokens = list(prompt_ids)
        self.finish_reason: str | None = None
        self._on_token = on_token

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt_ids) :]

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.settings.max_new_tokens - len(self.tokens) + len(self.prompt_ids)

    def take(self, tokens: Sequence[int]) -> int:
        """Add tokens until the text ends; returns how many were added."""
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            stop = self._on_token is not None and self._on_token(token)
            if token in self.settings.eos_token_ids:
                self.finish_reason = "eos"
            elif stop:
                self.finish_reason = "stop"
            elif not self.left:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return count
        return len(tokens)

    def generation(self) -> Generation:
        """What came of it, once it has ended."""
        assert self.finish_reason is not None
        new = self.new
        statistics = self.recorder.statistics(prompt_tokens=len(self.prompt_ids), new_tokens=len(new))
        return Generation(new, self.finish_reason, statistics)


def generate(
    target: Target, prompt_ids: Sequence[int], settings: GenerationSettings, *, on_token: OnToken | None = None
) -> Generation:
    """Continue a prompt, one token after the other.

    Args:
        on_token: called with each new token; decoding ends when it returns `True`.

    Raises:
        ValueError: an empty or foreign prompt, a request beyond the cache (before any work), or logits that are not
            numbers.
    """
    check_request(target, prompt_ids, settings.max_new_tokens)
    request = Request(prompt_ids, settings, on_token=on_token)
    for _ in decode(target, request):
        pass
    return request.generation()


def decode(
    target: Target, request: Request, *, on_logits: Callable[[Tensor], None] | None = None
) -> Iterator[list[int]]:
    """Continue a request to its end; gives its new tokens as they come, one at a time.

    Args:
        on_logits: called with the logits `[V]` that the next token is chosen by.
    """
    recorder = request.recorder
    step = begin(target, request, all_logits=on_logits is not None)
    if request.settings.takes_best and on_logits is None:
        expect_choices(target)
    generator = torch.Generator(step.logits.device).manual_seed(request.settings.seed)
    while True:
        if on_logits is not None:
            on_logits(step.logits[-1])
        recorder.start()
        token = next_token(step, request, generator)
        request.take([token])
        recorder.lap("sampling")
        yield [token]
        if request.finish_reason is not None:
            return
        recorder.start()
        step = target.extend([token])
        target.commit([0])
        recorder.lap("decode")
        recorder.add(step)


def begin(target: Target, request: Request, *, all_logits: bool = False) -> Step:
    """Run the prompt on an empty cache. Raises `ValueError` if the logits are not numbers.

    Args:
        all_logits: of later steps every logit is wanted, not only those that decide.
    """
    target.reset()
    ask_best(target, None if all_logits else decisive_logits(request.settings))
    request.recorder.start()
    step = prefill(target, request.prompt_ids)
    check_finite(step)
    request.recorder.lap("prefill")
    return step


def next_token(step: Step, request: Request, generator: torch.Generator) -> int:
    """The token behind the last one of a step, which runs behind the request's others."""
    settings = request.settings
    if step.choices is not None and settings.temperature == 0:
        return step.choices[-1]
    occurred = torch.tensor(request.tokens) if settings.repetition_penalty != 1 else None
    return choose(step.logits[-1], occurred, settings, generator)


def check_finite(step: Step) -> None:
    """Raise `ValueError` if logits are not numbers."""
    if not bool(step.logits.isfinite().all()):
        raise ValueError("the model's output is not a number: its weights are damaged or its training diverged")
