"""Ways of decoding that are timed side by side: the plain loop, speculation, and whatever else continues a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.lossless import Difference, first_difference
from blockffn.inference.statistics import GenerationStatistics
from blockffn.inference.target import Target


@dataclass(frozen=True)
class Run:
    """One prompt continued.

    Attributes:
        seconds: from the first new token to the last, so without the prompt.
        prefill_seconds: of the prompt and the first new token.
        statistics: where our own loops did it.
    """

    token_ids: list[int]
    seconds: float
    prefill_seconds: float
    statistics: GenerationStatistics | None = None

    @property
    def timed_tokens(self) -> int:
        """New tokens but the first, which is the prompt's."""
        return len(self.token_ids) - 1


class Way(Protocol):
    """Continues prompts greedily, exactly so many tokens."""

    @property
    def name(self) -> str: ...

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Run: ...


@dataclass(frozen=True)
class Decoder:
    """One of our loops over a target: plain, or with drafts."""

    name: str
    target: Target
    speculation: Speculation | None = None

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Run:
        settings = greedy(max_new_tokens)
        if self.speculation is None:
            generation = generate(self.target, prompt_ids, settings)
        else:
            generation = speculative_generate(self.target, self.speculation, prompt_ids, settings)
        statistics = generation.statistics
        seconds = statistics.seconds - statistics.prefill_seconds
        return Run(generation.token_ids, seconds, statistics.prefill_seconds, statistics)

    def difference(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Difference | None:
        """Where its text parts from the plain loop's over the same target."""
        settings = greedy(max_new_tokens)
        assert self.speculation is not None
        generation = speculative_generate(self.target, self.speculation, prompt_ids, settings)
        return first_difference(self.target, prompt_ids, settings, generation)


def greedy(max_new_tokens: int) -> GenerationSettings:
    """No end token: every way writes as many tokens, whatever they are."""
    return GenerationSettings(max_new_tokens=max_new_tokens, temperature=0.0)
