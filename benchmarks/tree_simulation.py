"""Trees shaped by cost against trees of a fixed size, in a simulation: no device is timed, times are a cost model's.

A round of the simulated text has a draft tree of 63 nodes in up to 8 levels, the true probability of each node, which
the draft's is a distorted copy of, and the experts that the root and each node use. Every policy meets the same rounds.
It knows the draft's probabilities and a cost model with errors of a few percent; it is judged by the true ones. The
same code as in decoding cuts the trees (`CostAwareShaper`); fixed sizes keep the most probable nodes by the draft's
word. The column `tokens alone` is the same code with a cost model that sees the number of tokens only, fitted to the
same text: what the price of experts adds is the difference.

    python benchmarks/tree_simulation.py --rounds 200 --json tree-simulation.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from blockffn.inference.speculative.cost import CostModel, Measurement, fit
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.shaping import CostAwareShaper
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

FIXED_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 31, 48, 63)
POOL, BRANCHES, DEPTH = 63, 4, 8
WARM_UP = 100  # rounds that are decoded but not counted, for every policy


@dataclass(frozen=True)
class Regime:
    """A device, a model's routing and a draft.

    Attributes:
        cost: true milliseconds. num_experts: in all layers together. active: of a token.
        kept: share of its parent's experts that a node keeps. The rest comes from `popular` experts of the text.
        skill: mean log-odds that the draft's first choice is right. spread: of that, from passage to passage.
        distortion: factor on the draft's log-odds; above 1 it is too sure of itself.
    """

    name: str
    cost: CostModel
    num_experts: int = 96
    active: int = 14
    kept: float = 0.6
    popular: int = 48
    skill: float = 0.5
    spread: float = 1.0
    distortion: float = 1.3


# Costs of the order of a 2.8B model on a small GPU board, of a 1.2B model in int8 on two cores, and extremes.
BOARD = CostModel(fixed=17, per_token=0.37, per_expert=0.63, per_pair=0.01)
TWO_CORES = CostModel(fixed=14, per_token=1.1, per_expert=0.31, per_pair=0.04)
REGIMES = (
    Regime("board, local routing", BOARD, kept=0.8, popular=30),
    Regime("board, scattered routing", BOARD, kept=0.1, popular=96),
    Regime("two cores", TWO_CORES),
    Regime("two cores, changing text", TWO_CORES, spread=2.5),
    Regime("two cores, weak draft", TWO_CORES, skill=-2.0),
    Regime("two cores, strong draft", TWO_CORES, skill=2.5),
    Regime("memory alone, changing text", CostModel(5, 0.02, 0.6, 0.0), spread=2.5, kept=0.3, popular=96),
    Regime("compute alone", CostModel(5, 0.5, 0.0, 0.15), spread=2.0),
    Regime("tokens are nearly free", CostModel(20, 0.01, 0.02, 0.0)),
    Regime("dense model", CostModel(30, 0.8, 0.0, 0.0), num_experts=1, active=1, kept=1.0, popular=1),
)


@dataclass(frozen=True)
class Round:
    """One position of the text: the tree, each node's true probability behind its parent, and bit masks of experts."""

    tree: DraftTree
    truth: list[float]
    experts: list[int]  # root first
    luck: list[float]  # at the root and at each node: which child the target says


def simulate_rounds(regime: Regime, count: int, *, seed: int = 0) -> list[Round]:
    """Passages of some twenty rounds are equally hard and use the same popular experts."""
    rng = random.Random(seed)
    rounds = []
    skill, popular, root = 0.0, list(range(regime.num_experts)), []
    for number in range(count):
        if number == 0 or rng.random() < 0.05:
            skill = rng.gauss(regime.skill, regime.spread)
            popular = rng.sample(range(regime.num_experts), regime.popular)
        root = _experts(rng, regime, root, popular)
        rounds.append(_round(rng, regime, skill, popular, root))
    return rounds


def _round(rng: random.Random, regime: Regime, skill: float, popular: list[int], root: list[int]) -> Round:
    parents: list[int] = []
    depths = {ROOT: 0}
    draft: list[float] = []
    truth: list[float] = []
    experts = [root]
    heap: list[tuple[float, int, int, float, float]] = []
    serial = 0

    def branch(parent: int, path: float) -> None:
        nonlocal serial
        first = _sigmoid(rng.gauss(skill, 1.0))
        rest = 1.0 - first
        for rank in range(BRANCHES):
            true = first if rank == 0 else rest * 0.35 * 0.6**rank
            odds = regime.distortion * math.log(true / (1 - true)) + rng.gauss(0, 0.3)
            guess = min(max(_sigmoid(odds), 1e-6), 1 - 1e-6)
            heapq.heappush(heap, (-(path + math.log(guess)), serial, parent, true, math.log(guess)))
            serial += 1

    branch(ROOT, 0.0)
    while len(parents) < POOL:
        score, _, parent, true, log_guess = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        depths[node] = depths[parent] + 1
        draft.append(log_guess)
        truth.append(true)
        experts.append(_experts(rng, regime, experts[parent + 1], popular))
        if depths[node] < DEPTH:
            branch(node, -score)
    tree = DraftTree(torch.arange(POOL), torch.tensor(parents), torch.tensor(draft))
    masks = [sum(1 << expert for expert in chosen) for chosen in experts]
    return Round(tree, truth, masks, [rng.random() for _ in range(POOL + 1)])


def _experts(rng: random.Random, regime: Regime, before: list[int], popular: list[int]) -> list[int]:
    chosen = {expert for expert in before if rng.random() < regime.kept}
    fresh = rng.sample(popular, len(popular)) + list(range(regime.num_experts))
    for expert in fresh:
        if len(chosen) >= regime.active:
            break
        chosen.add(expert)
    return sorted(chosen)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def outcome(round_: Round, nodes: list[int]) -> tuple[float, list[int]]:
    """Expected tokens of a tree of these nodes of the round's, and the path that its luck accepts."""
    inside, reach = set(nodes), {ROOT: 1.0}
    expected = 1.0
    for node in sorted(nodes):
        reach[node] = reach[round_.tree.parent_list[node]] * round_.truth[node]
        expected += reach[node]
    path, at = [], ROOT
    while True:
        threshold, following = round_.luck[at + 1], None
        for child in round_.tree.children(at):
            threshold -= round_.truth[child]
            if threshold < 0:
                following = child
                break
        if following is None or following not in inside:
            return expected, path
        path.append(following)
        at = following


def milliseconds(regime: Regime, round_: Round, nodes: list[int]) -> tuple[float, int, list[int]]:
    """True time of a verification, the union, and experts of root and nodes."""
    masks = [round_.experts[0], *(round_.experts[node + 1] for node in nodes)]
    union = 0
    for mask in masks:
        union |= mask
    active = [mask.bit_count() for mask in masks]
    return regime.cost.milliseconds(len(masks), union.bit_count(), sum(active)), union.bit_count(), active


def fixed(regime: Regime, rounds: list[Round]) -> dict[int, dict[str, float]]:
    """Rates of every fixed size. The most probable nodes of a tree are its first, so one pass has them all."""
    results: dict[int, list[tuple[float, float, int]]] = {size: [] for size in FIXED_SIZES}
    for round_ in rounds:
        reach = {ROOT: 1.0}
        expected, union, pairs = 1.0, round_.experts[0], round_.experts[0].bit_count()
        for size in range(POOL + 1):
            if size:
                node = size - 1
                reach[node] = reach[round_.tree.parent_list[node]] * round_.truth[node]
                expected += reach[node]
                union |= round_.experts[size]
                pairs += round_.experts[size].bit_count()
            if size in results:
                spent = regime.cost.milliseconds(size + 1, union.bit_count(), pairs)
                results[size].append((expected, spent, size))
    return {size: _rates(rows) for size, rows in results.items()}


def measured(regime: Regime, *, seed: int = 0) -> CostModel:
    """The true cost model with errors of up to 5 %."""
    rng = random.Random(seed)
    return CostModel(*(value * rng.uniform(0.95, 1.05) for value in asdict(regime.cost).values()))


def by_tokens(regime: Regime, rounds: list[Round]) -> CostModel:
    """A cost model without experts: the best line through times over numbers of tokens."""
    times = [(size + 1, milliseconds(regime, r, list(range(size)))[0]) for r in rounds[::10] for size in FIXED_SIZES]
    return fit([Measurement(tokens, 0, 0, spent) for tokens, spent in times])


def cost_aware(regime: Regime, rounds: list[Round], guessed: CostModel) -> dict[str, float]:
    shaper = CostAwareShaper(guessed, num_experts=regime.num_experts)
    results = []
    for round_ in rounds:
        drafts = shaper.budget(Budget(POOL, DEPTH)).nodes > 0
        nodes = shaper.shape(round_.tree).tokens.tolist() if drafts else []  # a node's token is its index
        expected, path = outcome(round_, nodes)
        spent, union, active = milliseconds(regime, round_, nodes)
        results.append((expected, spent, len(nodes)))
        place = {node: i for i, node in enumerate(nodes)}
        step = Step(
            torch.empty(len(nodes) + 1, 0),
            torch.empty(len(nodes) + 1, 0),
            torch.tensor([union]),
            torch.tensor([active]),
        )
        shaper.observe(
            round_.tree.subtree(torch.tensor(nodes, dtype=torch.int64)), Verdict([place[n] for n in path], 0), step
        )
    return _rates(results)


def _rates(results: list[tuple[float, float, int]]) -> dict[str, float]:
    counted = results[WARM_UP:]
    tokens, spent, nodes = (sum(row[i] for row in counted) for i in range(3))
    return {
        "tokens_per_second": 1000 * tokens / spent,
        "acceptance_length": tokens / len(counted),
        "tree_size": nodes / len(counted),
    }


def compare(regime: Regime, *, rounds: int, seed: int = 0) -> dict[str, Any]:
    """All policies over one simulated text. `gain`: rate over the best fixed size's."""
    text = simulate_rounds(regime, rounds + WARM_UP, seed=seed)
    sizes = fixed(regime, text)
    best = max(sizes, key=lambda size: sizes[size]["tokens_per_second"])
    ours = cost_aware(regime, text, measured(regime, seed=seed))
    tokens_alone = cost_aware(regime, text, by_tokens(regime, text))
    rate = ours["tokens_per_second"]
    return {
        "regime": asdict(regime),
        "fixed": {str(size): values for size, values in sizes.items()},
        "best_fixed": best,
        "cost_aware": ours,
        "tokens_alone": tokens_alone,
        "gain": rate / sizes[best]["tokens_per_second"],
        "gain_over_31": rate / sizes[31]["tokens_per_second"],
        "gain_over_none": rate / sizes[0]["tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    columns = ("no tree", 9), ("31 nodes", 10), ("best fixed", 14), ("tokens alone", 14), ("cost-aware (nodes)", 20)
    print(f"{'simulated tokens/s':<30}" + "".join(f"{name:>{width}}" for name, width in columns) + f"{'gain':>8}")
    rows = []
    for regime in REGIMES:
        row = compare(regime, rounds=options.rounds, seed=options.seed)
        rows.append(row)
        speed = {size: values["tokens_per_second"] for size, values in row["fixed"].items()}
        best = f"{speed[str(row['best_fixed'])]:.1f} ({row['best_fixed']})"
        alone = row["tokens_alone"]["tokens_per_second"]
        ours = f"{row['cost_aware']['tokens_per_second']:.1f} ({row['cost_aware']['tree_size']:.1f})"
        print(
            f"{regime.name:<30}{speed['0']:>9.1f}{speed['31']:>10.1f}{best:>14}{alone:>14.1f}{ours:>20}{row['gain']:>7.2f}×",
            flush=True,
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rounds": options.rounds, "seed": options.seed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
