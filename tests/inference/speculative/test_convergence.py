"""The tree by cost finds what the best fixed size would give, whatever the draft and the device, and finds it soon.

A simulation in expected tokens and in milliseconds of an invented clock: the draft says how sure it is, and is right
`trust` times as often. Trees grow as in decoding, so drafting less is quicker.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from blockffn.inference.speculative.cost import CostModel, DraftingCost
from blockffn.inference.speculative.decode import Round
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.inference.speculative.shaping import CostAwareShaper
from blockffn.inference.speculative.tree import ROOT, DraftTree, no_tree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

SIZES = (0, 1, 2, 3, 5, 7, 10, 15)
CHAINS = (1, 2, 3, 4, 5)
WIDTH, DEPTH = 4, 5


@dataclass(frozen=True)
class Regime:
    """Milliseconds of a plain step, of a node more, and of drafting: a proposal, a level, a node's children.

    Attributes:
        sure: mean probability that the draft gives its first choice. trust: how often it is right, of what it says.
        assumed: of what a level costs, as `CostAwareShaper` is told. misjudged: factor on its cost model.
        link: of drafting a level of a chain; `None`: chains are not drafted.
        look: of each look at the clock: learning takes some. cold: of drafting, where the round before did not.
    """

    sure: float
    trust: float = 1.0
    plain: float = 13.0
    node: float = 2.3
    proposal: float = 1.0
    level: float = 1.7
    children: float = 0.4
    assumed: float = 2.0
    misjudged: float = 1.0
    link: float | None = None
    look: float = 0.0
    cold: float = 0.0


class World:
    """Rounds of a regime that any policy can play; equal numbers are equal rounds."""

    def __init__(self, regime: Regime, *, seed: int = 0) -> None:
        self.regime, self.seed, self.now = regime, seed, 0.0
        self.chains = 0  # that were drafted
        self._is_cold = False

    def clock(self) -> float:
        self.now += self.regime.look
        return self.now / 1000

    def propose(self, number: int, size: int, budget: Budget) -> DraftTree:
        if budget.nodes < 1 or budget.depth < 1:
            self._is_cold = True
            return no_tree()
        self.now += self.regime.proposal + self._is_cold * self.regime.cold
        self._is_cold = False
        self.chains += budget.chain

        def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
            self.now += self._level(len(nodes), budget)
            depths = [0 if node == ROOT else int(tree.depth[node]) for node in nodes]
            return torch.tensor([self._says(number, depth) for depth in depths]).log()

        growth = BestNodes(top_k=min(size, WIDTH), depth=min(size, DEPTH), size=size)
        return growth(expand, budget, vocab_size=WIDTH)

    def _level(self, nodes: int, budget: Budget) -> float:
        if budget.chain:
            assert self.regime.link is not None
            return self.regime.link
        return self.regime.level + self.regime.children * nodes

    def verify(self, number: int, tree: DraftTree) -> tuple[float, Verdict]:
        """Expected tokens, and what is accepted."""
        self.now += self.regime.plain + self.regime.node * len(tree)
        right: list[float] = []
        left = dict.fromkeys((ROOT, *range(len(tree))), 0.98)  # of each node's children, those that come first
        for p, parent in zip(tree.log_probs.exp().tolist(), tree.parent_list):
            right.append(min(self.regime.trust * p, left[parent]))
            left[parent] -= right[-1]
        reach: list[float] = []
        for own, parent in zip(right, tree.parent_list):
            reach.append(own * (1.0 if parent == ROOT else reach[parent]))
        path, at = [], ROOT
        rng = random.Random(f"luck {self.seed} {number}")
        while True:
            luck, before = rng.random(), len(path)
            for child in tree.children(at):
                luck -= right[child]
                if luck < 0:
                    path.append(child)
                    at = child
                    break
            if len(path) == before:
                return 1 + sum(reach), Verdict(path, 0)

    def _says(self, number: int, depth: int) -> list[float]:
        sure = self.regime.sure
        first = random.Random(f"{self.seed} {number + depth}").betavariate(2 * sure, 2 * (1 - sure))
        shares = [min(max(first, 0.01), 0.99)]
        for _ in range(1, WIDTH):
            shares.append(min(shares[-1], (1 - sum(shares)) / 2))
        return shares


def fixed_rate(world: World, size: int, numbers: range, *, chain: bool = False) -> float:
    tokens, begun = 0.0, world.now
    for number in numbers:
        tree = world.propose(number, size, Budget(size, DEPTH, chain=chain))
        tokens += world.verify(number, tree)[0]
    return tokens / (world.now - begun)


def shaper_for(world: World) -> CostAwareShaper:
    regime = world.regime
    node, plain = regime.misjudged * regime.node, regime.misjudged * regime.plain
    cost = CostModel(plain - node, node, 0, 0)
    return CostAwareShaper(
        cost, num_experts=1, clock=world.clock, tree=DraftingCost(level=regime.assumed),
        chain=None if regime.link is None else DraftingCost(level=regime.link),
    )  # fmt: skip


def by_cost_rate(world: World, shaper: CostAwareShaper, numbers: range) -> float:
    tokens, begun, most, number = 0.0, world.now, Budget(31, 16), numbers.start
    while number < numbers.stop:
        routine = shaper.routine(most)
        if routine is not None:
            rounds = []
            while len(rounds) < routine.rounds and number < numbers.stop:
                expected, round_ = play_alike(world, number, routine.budget)
                rounds.append(round_)
                tokens += expected
                number += 1
            if routine.budget.nodes:
                shaper.passed(rounds)
            else:
                shaper.rested([round_.seconds for round_ in rounds])
        else:
            tree = world.propose(number, 31, shaper.budget(most))
            if len(tree):
                tree = shaper.shape(tree)
            expected, verdict = world.verify(number, tree)
            size = len(tree) + 1
            shaper.observe(tree, verdict, Step(torch.empty(size, 0), torch.empty(size, 0)))
            tokens += expected
            number += 1
    return tokens / (world.now - begun)


def play_alike(world: World, number: int, budget: Budget) -> tuple[float, Round]:
    """A round of a routine, and its expected tokens."""
    begun = world.now
    tree = world.propose(number, 31, budget)
    drafted = world.now
    expected, verdict = world.verify(number, tree)
    return expected, Round(tree, len(verdict.path), (drafted - begun) / 1000, (world.now - begun) / 1000)


def over_best_fixed(world: World, shaper: CostAwareShaper, numbers: range) -> tuple[float, str]:
    fixed = {f"tree {size}": fixed_rate(World(world.regime), size, numbers) for size in SIZES}
    if world.regime.link is not None:
        for size in CHAINS:
            fixed[f"chain {size}"] = fixed_rate(World(world.regime), size, numbers, chain=True)
    best = max(fixed, key=lambda size: fixed[size])
    return by_cost_rate(world, shaper, numbers) / fixed[best], best


REGIMES = {
    "a usual draft": Regime(0.6),
    "a good draft": Regime(0.9),
    "a draft for which plain decoding is best": Regime(0.2, trust=0.5),
    "a sure draft that is never right": Regime(0.8, trust=0.02),
    "a draft that is too sure": Regime(0.8, trust=0.6),
    "a draft that is dear": Regime(0.6, level=6.0, children=1.0),
    "a draft whose cost is in the proposal": Regime(0.75, proposal=6.0, level=0.3, children=0.1, assumed=1.75),
    "a draft ten times as dear as was measured": Regime(0.7, level=8.0, assumed=0.8),
    "a draft that takes no time": Regime(0.5, proposal=0.05, level=0.0, children=0.0, assumed=0.0),
    "nodes that cost nearly nothing": Regime(0.6, node=0.1),
    "nodes that are dear": Regime(0.6, node=5.0),
    "nodes that seemed half as dear": Regime(0.75, misjudged=0.5),
    "nodes that seemed twice as dear": Regime(0.75, misjudged=2.0),
    "chains that are cheaper": Regime(0.7, link=0.9),
    "chains that are nearly free": Regime(0.6, link=0.1),
    "chains of a good draft": Regime(0.9, link=0.9),
    "chains of a draft that errs": Regime(0.4, trust=0.6, link=0.9),
    "chains that are as dear as trees": Regime(0.7, children=0.0, link=1.7),
    "chains that are dearer than trees": Regime(0.7, children=0.0, link=4.0),
    "chains where many nodes pay": Regime(0.45, node=0.2, level=0.5, children=0.05, link=0.3),
    "chains where nothing pays": Regime(0.2, trust=0.5, link=0.9),
    "a draft that doubts itself": Regime(0.35, trust=2.2, link=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_after_sixty_rounds_it_is_within_three_percent_of_the_best_fixed_size(name: str) -> None:
    world = World(REGIMES[name])
    shaper = shaper_for(world)
    by_cost_rate(world, shaper, range(60))
    gain, best = over_best_fixed(world, shaper, range(60, 260))
    print(f"GAIN {gain:.3f} {best}")
    assert gain > 0.97, f"{gain:.3f} of the best fixed size, {best}"


QUICK = Regime(0.85, node=2.5, proposal=2.0, level=25.0, link=4.0, look=3.0, cold=40.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "least", "most"),
    [
        (QUICK, 0.8, 1.0),
        (replace(QUICK, trust=0.3), 0.0, 0.1),
        (replace(QUICK, sure=0.95, trust=0.95), 0.8, 1.0),
        (replace(QUICK, link=9.0), 0.0, 0.1),
    ],
)
def test_a_model_beside_which_learning_takes_long_drafts_chains_in_rows_where_they_pay(
    regime: Regime, least: float, most: float
) -> None:
    """Each chain behind a plain round loses: only rows of them show what they bring."""
    world = World(regime)
    shaper = shaper_for(world)
    by_cost_rate(world, shaper, range(2000))
    before = world.chains
    gain, best = over_best_fixed(world, shaper, range(2000, 5000))
    print(f"GAIN {gain:.3f} {best} {(world.chains - before) / 3000:.2f}")
    assert least <= (world.chains - before) / 3000 <= most
    assert gain > 0.96, f"{gain:.3f} of the best fixed size, {best}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Regime(0.85), Regime(0.2, trust=0.5)),
        (Regime(0.2, trust=0.5), Regime(0.85)),
        (Regime(0.8, trust=0.05), Regime(0.8)),
        (Regime(0.8), Regime(0.8, trust=0.05)),
        (Regime(0.7), Regime(0.7, level=8.0)),
        (Regime(0.7, level=8.0), Regime(0.7)),
        (Regime(0.8, node=0.5), Regime(0.8, node=5.0)),
        (Regime(0.85, link=0.9), Regime(0.2, trust=0.5, link=0.9)),
        (Regime(0.2, trust=0.5, link=0.9), Regime(0.85, link=0.9)),
        (Regime(0.7, link=0.5), Regime(0.7, children=0.0, link=5.0)),
        (Regime(0.7, children=0.0, link=5.0), Regime(0.7, link=0.5)),
        (Regime(0.9, link=0.9), Regime(0.45, node=0.2, level=0.5, children=0.05, link=0.4)),
    ],
)
def test_what_changes_midway_is_found_out_within_two_hundred_rounds(before: Regime, after: Regime) -> None:
    world = World(before)
    shaper = shaper_for(world)
    by_cost_rate(world, shaper, range(200))
    world.regime = after
    by_cost_rate(world, shaper, range(200, 400))
    gain, best = over_best_fixed(world, shaper, range(400, 600))
    print(f"GAIN {gain:.3f} {best}")
    assert gain > 0.97, f"{gain:.3f} of the best fixed size, {best}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("chains that are cheaper", 0.9, 1.0),
        ("chains of a good draft", 0.9, 1.0),
        ("chains that are dearer than trees", 0.0, 0.1),
        ("chains where many nodes pay", 0.0, 0.15),
    ],
)
def test_chains_are_drafted_where_they_pay_and_elsewhere_only_tried(name: str, least: float, most: float) -> None:
    world = World(REGIMES[name])
    shaper = shaper_for(world)
    by_cost_rate(world, shaper, range(60))
    before = world.chains
    by_cost_rate(world, shaper, range(60, 260))
    assert least <= (world.chains - before) / 200 <= most


@pytest.mark.slow
def test_chains_make_text_faster_where_they_are_cheaper() -> None:
    """Against a shaper that knows no chains; a tenth and more of what a round costs is saved."""
    regime = REGIMES["chains that are cheaper"]
    rates = []
    for link in (regime.link, None):
        world = World(replace(regime, link=link))
        shaper = shaper_for(world)
        by_cost_rate(world, shaper, range(60))
        rates.append(by_cost_rate(world, shaper, range(60, 260)))
    assert rates[0] > 1.08 * rates[1]


@pytest.mark.slow
def test_where_text_alternates_between_easy_and_hard_no_fixed_size_comes_near() -> None:
    easy, hard = Regime(0.93), Regime(0.15)
    world = World(easy)
    shaper = shaper_for(world)
    tokens = dict.fromkeys((*SIZES, -1), 0.0)
    spent = dict(tokens)
    others = {size: World(easy) for size in SIZES}
    for start in range(0, 300, 20):
        regime = easy if start % 40 else hard
        for size, one in (*others.items(), (-1, world)):
            one.regime, begun = regime, one.now
            numbers = range(start, start + 20)
            rate = by_cost_rate(one, shaper, numbers) if size < 0 else fixed_rate(one, size, numbers)
            if start >= 100:
                tokens[size] += rate * (one.now - begun)
                spent[size] += one.now - begun
    rates = {size: tokens[size] / spent[size] for size in tokens}
    assert rates[-1] > 1.10 * max(rates[size] for size in SIZES), rates
