"""What verifying some tokens costs, as a function of how many they are and of the experts that they use together.

    milliseconds = fixed + per_token · T + max(per_expert · U, per_pair · P)

`U` experts of the union are read from memory, `P` pairs of a token and an expert are computed, and the slower of the
two decides; both are sums over layers. What every token adds (attention, head) is linear, what every call costs
(reading attention and head, launches) is fixed. For a dense model `U` is 1 and `P` is `T`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.target import Step, Target

SIZES = (1, 2, 4, 8, 16, 32)
DRAFT_CONTEXT, DRAFT_ROUNDS = 32, 3  # tokens before a draft that is measured, and how often each way is


@dataclass(frozen=True)
class Measurement:
    """One call of a target: tokens, experts of the union, pairs (both summed over layers), and its time."""

    tokens: int
    union: int
    pairs: int
    milliseconds: float


@dataclass(frozen=True)
class CostModel:
    """Coefficients in milliseconds; see the module."""

    fixed: float
    per_token: float
    per_expert: float
    per_pair: float

    def milliseconds(self, tokens: float, union: float, pairs: float) -> float:
        return self.fixed + self.per_token * tokens + max(self.per_expert * union, self.per_pair * pairs)


def union_and_pairs(step: Step) -> tuple[int, int]:
    """`U` and `P` of a call, as the cost model counts them."""
    if step.union is None or step.active is None:
        return 1, len(step.logits)
    return int(step.union.sum()), int(step.active.sum())


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """The non-negative coefficients of the least squared relative error.

    Pairs over experts tells memory from compute: the fit tries every split of the measurements by it, with least
    squares on each.

    Raises:
        ValueError: fewer than two measurements, or a time that is not positive.
    """
    if len(measurements) < 2:
        raise ValueError(f"a cost model needs at least two measurements, got {len(measurements)}")
    if min(m.milliseconds for m in measurements) <= 0:
        raise ValueError("a measured time is not positive; the clock is too coarse for this model")
    ordered = sorted(measurements, key=lambda m: m.pairs / max(m.union, 1))
    candidates = []
    for split in range(len(ordered) + 1):
        rows = [(1, m.tokens, m.union if i < split else 0, m.pairs if i >= split else 0) for i, m in enumerate(ordered)]
        times = torch.tensor([m.milliseconds for m in ordered], dtype=torch.float64)
        a = torch.tensor(rows, dtype=torch.float64) / times[:, None]
        candidates.append(CostModel(*_non_negative_least_squares(a, torch.ones_like(times))))
    return min(candidates, key=lambda model: _relative_error(model, ordered))


def _relative_error(model: CostModel, measurements: Sequence[Measurement]) -> float:
    return sum((model.milliseconds(m.tokens, m.union, m.pairs) / m.milliseconds - 1) ** 2 for m in measurements)


def _non_negative_least_squares(a: Tensor, b: Tensor) -> list[float]:
    """Exact for few columns: the best of the least-squares solutions over every set of columns that is feasible."""
    columns = a.shape[1]
    best, best_error = [0.0] * columns, float(b.square().sum())
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part = a[:, chosen]
            solution = torch.linalg.lstsq(part, b[:, None], driver="gelsd").solution[:, 0]
            error = float((part @ solution - b).square().sum())
            if (solution >= 0).all() and error < best_error * (1 - 1e-9):
                best = [0.0] * columns
                for column, value in zip(chosen, solution.tolist()):
                    best[column] = value
                best_error = error
    return best


def calibrate(
    target: Target,
    *,
    context: int = 64,
    sizes: Sequence[int] = SIZES,
    rounds: int = 3,
    seconds: float = float("inf"),
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Measure a target for its cost model, in `2 * (rounds + 1) * len(sizes)` calls. It is reset before and after.

    Each size is called with different tokens, which use many experts, and with equal ones, which use few: so the cost
    of an expert shows apart from that of a token. The first call of a size, which may compile or allocate, is not
    counted. After `seconds` each is called twice only.
    """
    begun = clock()
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in sizes if size < target.capacity]
    context = max(1, min(context, target.capacity - max(sizes, default=0)))
    target.reset()
    target.extend(torch.randint(target.vocab_size, (context,), generator=generator).tolist())
    target.commit(range(context))
    measurements = []
    for size in sizes:
        different = torch.randint(target.vocab_size, (size,), generator=generator).tolist()
        for tokens in (different, different[:1] * size):
            times = []
            for _ in range(rounds + 1):
                begin = clock()
                step = target.extend(tokens, [-1] * size)
                float(step.logits[-1, 0])  # waits for a device that works asynchronously
                times.append(1000 * (clock() - begin))
                target.commit([])
                if len(times) > 1 and clock() - begun > seconds:
                    break
            measurements.append(Measurement(size, *union_and_pairs(step), statistics.median(times[1:])))
    target.reset()
    return fit(measurements)


@dataclass(frozen=True)
class DraftingCost:
    """Milliseconds of a proposal, of each of its levels, and of each token of the text that the draft has to read."""

    proposal: float = 0.0
    level: float = 0.0
    read: float = 0.0


def calibrate_drafter(
    target: Target, drafter: Drafter, most: Budget, *, clock: Callable[[], float] = time.perf_counter
) -> DraftingCost:
    """Measure what drafting costs behind random tokens: with one level and with all, and with much of the text unread.

    The target is reset before and after. A cache too short for this is used as far as it goes.
    """
    context = max(min(DRAFT_CONTEXT, (target.capacity - 3 * DRAFT_ROUNDS - 1) // (DRAFT_ROUNDS + 1)), 1)
    one = most._replace(depth=1)
    turns = [(context, most), *[(1, one), (1, most), (context, one)] * DRAFT_ROUNDS]
    found = _time_proposals(target, drafter, turns, clock)[1:]  # the first may allocate
    short, long, behind = (statistics.median(spent for spent, _ in found[kind::3]) for kind in range(3))
    levels = max((levels for _, levels in found), default=1)
    level = max(long - short, 0.0) / (levels - 1) if levels > 1 else short
    read = max(behind - short, 0.0) / (context - 1) if context > 1 else 0.0
    return DraftingCost(max(short - level - read, 0.0), level, read)


def milliseconds_per_level(
    target: Target, drafter: Drafter, most: Budget, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What a level of a proposal of all levels costs, all its costs included, as `calibrate_drafter` measures."""
    context = max(min(DRAFT_CONTEXT, target.capacity - DRAFT_ROUNDS - 1), 1)
    found = _time_proposals(target, drafter, [(context, most), *[(1, most)] * DRAFT_ROUNDS], clock)
    return statistics.median(spent / levels for spent, levels in found[1:] or found)


def _time_proposals(
    target: Target, drafter: Drafter, turns: Sequence[tuple[int, Budget]], clock: Callable[[], float]
) -> list[tuple[float, int]]:
    """Milliseconds and levels (1 at least) of proposals, each behind so many more random tokens, as far as they fit."""
    total = min(sum(new for new, _ in turns) + 1, target.capacity)
    tokens = torch.randint(target.vocab_size, (total,), generator=torch.Generator().manual_seed(0)).tolist()
    target.reset()
    drafter.start(tokens[: turns[0][0]])
    committed, found = 0, []
    for count, budget in turns:
        new = tokens[committed : committed + count]
        if committed + len(new) >= total:
            break
        step = target.extend(new)
        target.commit(range(len(new)))
        drafter.observe(new, step.hidden)
        committed += len(new)
        begin = clock()
        tree = drafter.propose(tokens[: committed + 1], budget)
        found.append((1000 * (clock() - begin), max(tree.depths, default=1)))
    target.reset()
    return found
