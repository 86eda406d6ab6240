"""Time ways of decoding in turns, after their texts have been checked, and say what each gives.

Every round takes every prompt through every way before the next prompt, each prompt beginning with another way. So a
slow period of the machine meets all alike, and ratios, which are taken within a round, are steadier than rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from blockffn.evaluation.decoding.prompts import EncodedPrompt
from blockffn.evaluation.decoding.ways import Decoder, Run, Way
from blockffn.inference.speculative.statistics import SpeculationStatistics

ALL = "all"


@dataclass(frozen=True)
class Check:
    """How the texts of a way compare with those of the plain loop over the same target.

    Attributes:
        texts: compared. ties: that part where two logits nearly tie, so that rounding can explain it.
        faults: that part elsewhere, said in words.
    """

    way: str
    texts: int
    ties: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """What a way gives for one kind of prompt, or for all.

    Attributes:
        tokens_per_second: new tokens but the first over the time after the prompt; median of the rounds.
        ratio: of these to the baseline's of the same round, median; `None` without a baseline.
        lowest_ratio, highest_ratio: of the rounds.
        acceptance_length: tokens per step; 1 without drafts, `None` where it is not known.
        union_experts: per layer, that the tokens of a step activate together; `None` for dense models and peers.
    """

    task: str
    tokens_per_second: float
    ratio: float | None
    lowest_ratio: float | None
    highest_ratio: float | None
    acceptance_length: float | None
    prefill_tokens_per_second: float
    union_experts: float | None = None


@dataclass(frozen=True)
class WayResult:
    """A way's rates by kind of prompt (the last: all), and what its steps were like, over all prompts and rounds.

    Attributes:
        active_experts, union_experts: per layer, of a token and of a step; `None` for dense models and peers.
        tree_size: draft tokens per step. shares: of the time after the prompt: `draft`, `decode`, `sampling`.
    """

    way: str
    rates: tuple[Rate, ...]
    active_experts: float | None = None
    union_experts: float | None = None
    tree_size: float | None = None
    acceptance_by_depth: tuple[float, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def overall(self) -> Rate:
        return self.rates[-1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_way(way: Decoder, prompts: Sequence[EncodedPrompt], max_new_tokens: int) -> Check:
    """Compare a way with the plain loop, prompt by prompt."""
    ties, faults = 0, []
    for prompt in prompts:
        difference = way.difference(prompt.ids, max_new_tokens)
        if difference is None:
            continue
        if difference.may_be_rounding:
            ties += 1
        else:
            faults.append(f"{prompt.task}: {difference}")
    return Check(way.name, len(prompts), ties, tuple(faults))


def time_ways(
    ways: Sequence[Way],
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    rounds: int,
    baseline: str | None,
    on_run: Callable[[str, EncodedPrompt, Run], None] | None = None,
) -> list[WayResult]:
    """Time every way on every prompt in every round.

    Args:
        baseline: name of the way that ratios refer to.

    Raises:
        ValueError: too few tokens or rounds, no prompts, two ways of one name, or a baseline that is none of them.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 2),
        ("rounds", rounds, 1),
        ("prompts", len(prompts), 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least} to time decoding, got {value}")
    names = [way.name for way in ways]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is the name of {names.count(name)} ways, whose runs could not be told apart")
    if baseline is not None and baseline not in names:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(names)}")
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in range(rounds)] for name in names}
    for round_ in range(rounds):
        for number, prompt in enumerate(prompts):
            first = (round_ + number) % len(ways)
            for way in (*ways[first:], *ways[:first]):
                run = way.run(prompt.ids, max_new_tokens)
                runs[way.name][round_].append(run)
                if on_run is not None:
                    on_run(way.name, prompt, run)
    base = None if baseline is None else runs[baseline]
    return [summarise(name, runs[name], prompts, base) for name in names]


def summarise(
    name: str, runs: Sequence[Sequence[Run]], prompts: Sequence[EncodedPrompt], baseline: Sequence[Sequence[Run]] | None
) -> WayResult:
    """A way's result from its runs, by round and prompt."""
    tasks = [*dict.fromkeys(prompt.task for prompt in prompts), ALL]
    rates = []
    for task in tasks:
        chosen = [i for i, prompt in enumerate(prompts) if task in (prompt.task, ALL)]
        own = [_rate([round_[i] for i in chosen]) for round_ in runs]
        ratios = None
        if baseline is not None:
            ratios = [a / _rate([round_[i] for i in chosen]) for a, round_ in zip(own, baseline)]
        flat = [round_[i] for round_ in runs for i in chosen]
        prefill = sum(len(prompts[i].ids) for i in chosen) * len(runs) / sum(run.prefill_seconds for run in flat)
        rates.append(
            Rate(
                task,
                statistics.median(own),
                None if ratios is None else statistics.median(ratios),
                None if ratios is None else min(ratios),
                None if ratios is None else max(ratios),
                _acceptance_length(flat),
                prefill,
                _mean_of_steps(flat, "union_experts"),
            )
        )
    return WayResult(name, tuple(rates), **_steps([run for round_ in runs for run in round_]))


def _rate(runs: Sequence[Run]) -> float:
    return sum(run.timed_tokens for run in runs) / sum(run.seconds for run in runs)


def _acceptance_length(runs: Sequence[Run]) -> float | None:
    found = _speculations(runs)
    if found:
        return sum(s.verified_tokens for s in found) / max(sum(s.verifications for s in found), 1)
    return 1.0 if all(run.statistics is not None for run in runs) else None


def _speculations(runs: Sequence[Run]) -> list[SpeculationStatistics]:
    all_ = [run.statistics.speculation for run in runs if run.statistics is not None]
    return [one for one in all_ if one is not None]


def _steps(runs: Sequence[Run]) -> dict[str, Any]:
    """Fields of `WayResult` that our own loops know."""
    known = [run.statistics for run in runs if run.statistics is not None]
    if not known:
        return {}
    total = sum(s.draft_seconds + s.decode_seconds + s.sampling_seconds for s in known)
    parts = {
        part: sum(getattr(s, f"{part}_seconds") for s in known) / total for part in ("draft", "decode", "sampling")
    }
    values: dict[str, Any] = {"shares": parts}
    for name in ("active_experts", "union_experts"):
        values[name] = _mean_of_steps(runs, name)
    found = _speculations(runs)
    if found:
        values["tree_size"] = sum(s.nodes for s in found) / max(sum(s.verifications for s in found), 1)
        values["acceptance_by_depth"] = acceptance_by_depth(found)
    return values


def _mean_of_steps(runs: Sequence[Run], name: str) -> float | None:
    """A statistic of each run, weighted with its steps; `None` where there is none."""
    known = [run.statistics for run in runs if run.statistics is not None and run.statistics.steps]
    weighted = [getattr(s, name) * s.steps for s in known if getattr(s, name) is not None]
    return sum(weighted) / sum(s.steps for s in known) if weighted else None


def acceptance_by_depth(statistics: Sequence[SpeculationStatistics]) -> tuple[float, ...]:
    """How often a token is accepted where one is offered and its parent was accepted, over several texts."""
    depth = max((len(s.tried) for s in statistics), default=0)
    rates = []
    for level in range(depth):
        tried = sum(s.tried[level] for s in statistics if level < len(s.tried))
        accepted = sum(s.accepted[level] for s in statistics if level < len(s.accepted))
        rates.append(accepted / tried)
    return tuple(rates)
