"""The plain loop: one token after the other. What every faster way of decoding must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from blockffn.inference.sampling import SamplingSettings, choose
from blockffn.inference.statistics import GenerationStatistics, Recorder
from blockffn.inference.target import Step, Target, check_request, prefill


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


def generate(
    target: Target,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    on_token: Callable[[int], bool | None] | None = None,
) -> Generation:
    """Continue a prompt, one token after the other.

    Args:
        on_token: called with each new token; decoding ends when it returns `True`.

    Raises:
        ValueError: an empty or foreign prompt, a request beyond the cache (before any work), or logits that are not
            numbers.
    """
    check_request(target, prompt_ids, settings.max_new_tokens)
    recorder, new, reason = Recorder(), list[int](), "length"
    for token in decode(target, prompt_ids, settings, recorder):
        new.append(token)
        stop = on_token is not None and on_token(token)
        if token in settings.eos_token_ids:
            reason = "eos"
        elif stop:
            reason = "stop"
        if reason != "length":
            break
    return Generation(new, reason, recorder.statistics(prompt_tokens=len(prompt_ids), new_tokens=len(new)))


def decode(
    target: Target, prompt_ids: Sequence[int], settings: GenerationSettings, recorder: Recorder
) -> Iterator[int]:
    """New tokens as they come, `max_new_tokens` of them; the one who takes them decides when to stop earlier."""
    target.reset()
    with recorder.time("prefill"):
        step = prefill(target, torch.tensor(prompt_ids))
        check_finite(step)
    history = list(prompt_ids)
    generator = torch.Generator(step.logits.device).manual_seed(settings.seed)
    one = torch.arange(1)
    for count in range(settings.max_new_tokens):
        if count:
            with recorder.time("decode"):
                step = target.extend(torch.tensor(history[-1:]))
                target.commit(one)
            recorder.add(step)
        with recorder.time("sampling"):
            occurred = torch.tensor(history) if settings.repetition_penalty != 1 else None
            token = choose(step.logits[-1], occurred, settings, generator)
        history.append(token)
        yield token


def check_finite(step: Step) -> None:
    """Raise `ValueError` if logits are not numbers."""
    if not bool(step.logits.isfinite().all()):
        raise ValueError("the model's output is not a number: its weights are damaged or its training diverged")
