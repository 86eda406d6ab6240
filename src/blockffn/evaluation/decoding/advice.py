"""From a few measurements of a machine to how a model is best decoded there. Pure functions; `measure` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blockffn.inference.speculative.tree import ROOT, DraftTree

PAYS = 1.03  # a gain below this is not worth a draft
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 31)  # draft tokens of the trees that are considered


@dataclass(frozen=True)
class Recorded:
    """A round of drafting on real text: the whole tree, and the path of it that the target accepted."""

    tree: DraftTree
    path: tuple[int, ...]


@dataclass(frozen=True)
class DraftMeasurement:
    """A draft on a text.

    Attributes:
        name: as `--draft` takes it.
        tokens_per_step: by number of draft tokens, the target's own included.
        levels: of such a tree, on average.
        milliseconds_per_level: of drafting. overhead: of a round, whatever is drafted.
    """

    name: str
    tokens_per_step: dict[int, float]
    levels: dict[int, float]
    milliseconds_per_level: float
    overhead: float = 0.0


@dataclass(frozen=True)
class TargetMeasurement:
    """A way of running the model.

    Attributes:
        milliseconds: of a step on real text, by number of tokens, 1 among them. bytes_per_token: of weights that a step
            of one token reads.
    """

    backend: str
    precision: str
    milliseconds: dict[int, float]
    bytes_per_token: float

    def of(self, tokens: float) -> float:
        """Milliseconds of a step of so many tokens, straight between what was measured and level beyond it."""
        known = sorted(self.milliseconds)
        if tokens <= known[0]:
            return self.milliseconds[known[0]]
        for low, high in pairwise(known):
            if tokens <= high:
                share = (tokens - low) / (high - low)
                return (1 - share) * self.milliseconds[low] + share * self.milliseconds[high]
        return self.milliseconds[known[-1]]


@dataclass(frozen=True)
class Option:
    """A way of decoding and what it is estimated to give. `tree` of 0: no drafts."""

    backend: str
    precision: str
    draft: str
    tree: int
    tokens_per_step: float
    milliseconds_per_step: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.tokens_per_step / self.milliseconds_per_step


@dataclass(frozen=True)
class Advice:
    """Options, the best first; what is best among those that leave the weights alone; and warnings.

    Plain decoding is among the options of every target, beside the draft that may pay.
    """

    options: tuple[Option, ...]
    best: Option
    best_exact: Option
    warnings: tuple[str, ...]


def replay(recorded: Sequence[Recorded], size: int) -> tuple[float, float]:
    """Tokens per step, and levels, if only the `size` most probable nodes of each tree had been verified."""
    tokens = levels = 0
    for round_ in recorded:
        kept = set(round_.tree.most_probable(size))
        tokens += 1 + next((i for i, node in enumerate(round_.path) if node not in kept), len(round_.path))
        depths = round_.tree.depths
        levels += max((depths[node] for node in kept), default=0)
    return tokens / len(recorded), levels / len(recorded)


def conditional_rates(recorded: Sequence[Recorded]) -> tuple[tuple[float, int], ...]:
    """By depth: how often a token was accepted where one was offered and its parent was accepted, and of how many."""
    tried: list[int] = []
    accepted: list[int] = []
    for round_ in recorded:
        parents = set(round_.tree.parent_list)
        for depth, node in enumerate((ROOT, *round_.path)):
            if node not in parents:
                break
            if depth == len(tried):
                tried.append(0)
                accepted.append(0)
            tried[depth] += 1
            accepted[depth] += depth < len(round_.path)
    return tuple((a / t, t) for a, t in zip(accepted, tried))


def options_of(target: TargetMeasurement, drafts: Sequence[DraftMeasurement]) -> list[Option]:
    """Plain decoding, and every draft with every size of tree."""
    options = [Option(target.backend, target.precision, "none", 0, 1.0, target.of(1))]
    for draft in drafts:
        for size, tokens in draft.tokens_per_step.items():
            spent = target.of(size + 1) + draft.levels[size] * draft.milliseconds_per_level + draft.overhead
            options.append(Option(target.backend, target.precision, draft.name, size, tokens, spent))
    return options


def by_measurement(advice: Advice, rates: Sequence[float]) -> Advice:
    """The same options, ordered by the new tokens per second that decoding with them really gave.

    Weights in another format than they are stored in must gain 3 % to be recommended, and so must drafts over the plain
    decoding of the same weights; of drafts that did not, although it was estimated, there is a warning.

    Args:
        rates: in the order of `advice.options`.
    """
    ranked = sorted(zip(rates, advice.options, strict=True), key=lambda pair: -pair[0])
    best_of = {(option.backend, option.precision): (rate, option) for rate, option in ranked if option.tree == 0}
    warnings = []
    for rate, option in ranked:
        way = option.backend, option.precision
        if option.tree and rate >= PAYS * best_of[way][0]:
            best_of[way] = rate, option
        elif option.tree:
            gain = rate / best_of[way][0]
            warnings.append(
                f"{', '.join(way)}: {option.draft} with a tree of {option.tree} was estimated to pay, and gave "
                f"{gain:.2f} times plain decoding"
            )
    exact_rate, exact = best_of[advice.best_exact.backend, advice.best_exact.precision]
    best_rate, best = max(best_of.values(), key=lambda pair: pair[0])
    return Advice(
        options=tuple(option for _, option in ranked),
        best=best if best_rate >= PAYS * exact_rate else exact,
        best_exact=exact,
        warnings=(*advice.warnings, *warnings),
    )


def advise(targets: Sequence[TargetMeasurement], drafts: Sequence[DraftMeasurement]) -> Advice:
    """What pays.

    The first target is the one whose weights are as they are stored. A draft that gains less than 3 % over plain
    decoding is not recommended.

    Raises:
        ValueError: no targets.
    """
    if not targets:
        raise ValueError("there is nothing to advise on: no target was measured")
    chosen, tried, warnings = [], [], []
    for target in targets:
        options = options_of(target, drafts)
        plain, drafted = options[0], options[1:]
        best = max(drafted, key=lambda option: option.tokens_per_second, default=plain)
        gain = best.tokens_per_second / plain.tokens_per_second
        chosen.append(best if gain >= PAYS else plain)
        tried += [best, plain] if gain >= PAYS else [plain]  # what a draft gains is measured against plain decoding
        where = f"{target.backend}, {target.precision}"
        if drafted and gain < PAYS:
            warnings.append(
                f"{where}: no draft pays; the best, {best.draft} with a tree of {best.tree}, gives {gain:.2f} times "
                "plain decoding"
            )
        for draft in drafts:
            large = max((o for o in drafted if o.draft == draft.name), key=lambda option: option.tree)
            loss = large.tokens_per_second / plain.tokens_per_second
            if loss < 1 and gain >= PAYS:
                warnings.append(
                    f"{where}: {draft.name} with a tree of {large.tree} loses: {loss:.2f} times plain decoding"
                )
    order = sorted(tried, key=lambda option: -option.tokens_per_second)
    return Advice(tuple(order), order[0], chosen[0], tuple(warnings))
