"""A tree keeps the nodes that pay."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockffn.inference.speculative.cost import CostModel
from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.estimates import UnionEstimate
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.inference.speculative.shaping import CostAwareShaper, Prices, choose_nodes
from blockffn.inference.speculative.tree import DraftTree, chain
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step
from tests.inference.speculative.stub_targets import BigramTarget, decode_losslessly
from tests.inference.speculative.test_tree import trees


def reach_of(tree: DraftTree) -> list[float]:
    return tree.path_log_probs.exp().tolist()


def prices(cost: CostModel, num_experts: int = 100) -> Prices:
    return Prices(cost, UnionEstimate(num_experts))


FREE = CostModel(10, 0, 0, 0)
TOKENS = CostModel(1, 1, 0, 0)
EXPERTS = CostModel(1, 0, 0.5, 0)


def test_where_tokens_are_free_everything_is_verified() -> None:
    tree = chain(range(6), [math.log(0.3)] * 6)
    nodes = choose_nodes(tree, reach=reach_of(tree), brings=[0.0] * 6, prices=prices(FREE), rate=None).nodes
    assert nodes == list(range(6))


def test_where_a_token_costs_what_it_brings_nothing_is_verified() -> None:
    tree = chain(range(6), [math.log(0.4)] * 6)
    assert choose_nodes(tree, reach=reach_of(tree), brings=[0.0] * 6, prices=prices(TOKENS), rate=None).nodes == []


def test_of_two_equal_promises_the_one_that_needs_no_new_expert_is_kept() -> None:
    tree = DraftTree(torch.tensor([1, 2]), torch.tensor([-1, -1]), torch.tensor([0.45, 0.45]).log())
    nodes = choose_nodes(tree, reach=[0.45, 0.45], brings=[0.7, 0.01], prices=prices(EXPERTS), rate=None).nodes
    assert nodes == [1]


def test_a_higher_rate_of_the_text_makes_a_round_spend_less() -> None:
    tree = chain(range(6), [math.log(0.7)] * 6)
    sizes = [
        len(choose_nodes(tree, reach=reach_of(tree), brings=[0.0] * 6, prices=prices(TOKENS), rate=rate).nodes)
        for rate in (0.01, 0.3, 0.5, 1.0)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 6
    assert sizes[-1] == 0


@given(trees(), st.floats(0.0, 1.0), st.sampled_from([FREE, TOKENS, EXPERTS, CostModel(3, 0.1, 0.2, 0.4)]))
def test_what_is_chosen_is_a_tree_and_no_worse_than_any_best_nodes(
    tree: DraftTree, rate: float, cost: CostModel
) -> None:
    """Where every node costs the same, best-first growth passes through the best tree of every size."""
    brings = [0.0] * len(tree)
    chosen = choose_nodes(tree, reach=reach_of(tree), brings=brings, prices=prices(cost), rate=rate).nodes
    tree.subtree(torch.tensor(chosen, dtype=torch.int64))  # refuses what is no tree

    def value(reach: list[float]) -> float:
        spent = prices(cost).milliseconds(len(reach) + 1, prices(cost).union.start())
        return 1 + sum(reach) - rate * spent

    ours = value([reach_of(tree)[node] for node in chosen])
    assert all(ours >= value(reach_of(tree.best(size))) - 1e-4 for size in range(len(tree) + 1))


def test_decoding_with_a_cost_aware_shaper_is_lossless_and_learns(bigram: BigramTarget) -> None:
    draft = BigramTarget(bigram.logits + 0.3 * torch.randn(12, 12))
    drafter = ModelDrafter(draft, vocab_size=12, growth=BestNodes(top_k=4, depth=6, size=40))
    shaper = CostAwareShaper(CostModel(4, 0.2, 0.5, 0.05), num_experts=8)
    statistics = decode_losslessly(bigram, Speculation(drafter, shaper), [1, 2, 3], 80)
    assert statistics.tree_size is not None
    assert 0 < statistics.tree_size < 40
    assert shaper.rate is not None
    assert shaper.rate > 0


def drafted(shaper: CostAwareShaper, *, draft_probability: float, rounds: int) -> list[int]:
    """Levels drafted in each round, where a chain's tokens are right as often as the draft says."""
    rng, depths = random.Random(0), []
    for _ in range(rounds):
        budget = shaper.budget(Budget(nodes=20, depth=6))
        depths.append(budget.depth)
        tree = chain(range(budget.depth), [math.log(draft_probability)] * budget.depth)
        if len(tree):
            tree = shaper.shape(tree)
        path: list[int] = []
        while len(path) < len(tree) and rng.random() < draft_probability:
            path.append(len(path))
        size = len(tree) + 1
        shaper.observe(tree, Verdict(path, 0), Step(torch.empty(size, 0), torch.empty(size, 0)))
    return depths


def test_levels_are_drafted_while_they_are_worth_their_drafting() -> None:
    cost = CostModel(10, 0.1, 0, 0)
    free = drafted(CostAwareShaper(cost, num_experts=1), draft_probability=0.5, rounds=80)
    dear = drafted(CostAwareShaper(cost, num_experts=1, draft_level=2.0), draft_probability=0.5, rounds=80)
    ruinous = drafted(
        CostAwareShaper(cost, num_experts=1, draft_level=9.0, probe_every=50), draft_probability=0.5, rounds=80
    )
    assert set(free) == {6}
    assert 1 <= dear[-1] <= 3
    assert ruinous[-1] == 0
    assert ruinous[49] == 6  # a probing round drafts in full


def test_what_a_round_costs_besides_is_learnt_by_the_clock_and_makes_trees_larger() -> None:
    cost = CostModel(1, 0.5, 0, 0)

    def rounds_of(milliseconds: float) -> tuple[CostAwareShaper, float]:
        """400 rounds that take so much more than their verification; the mean tree of the last 100."""
        now, rng, sizes = [0.0], random.Random(1), []
        shaper = CostAwareShaper(cost, num_experts=1, clock=lambda: now[0], probe_every=10_000)
        for _ in range(400):
            shaper.budget(Budget(nodes=20, depth=6))
            tree = shaper.shape(chain(range(6), [math.log(0.6)] * 6))
            now[0] += (cost.milliseconds(len(tree) + 1, 1, len(tree) + 1) + milliseconds) / 1000
            path: list[int] = []
            while len(path) < len(tree) and rng.random() < 0.6:
                path.append(len(path))
            shaper.observe(tree, Verdict(path, 0), Step(torch.empty(len(tree) + 1, 0), torch.empty(len(tree) + 1, 0)))
            sizes.append(len(tree))
        return shaper, sum(sizes[-100:]) / 100

    free, small = rounds_of(0.0)
    busy, large = rounds_of(4.0)
    assert free.overhead == pytest.approx(0.0, abs=1e-9)
    assert busy.overhead == pytest.approx(4.0, rel=0.1)
    assert large > small + 0.5


def test_a_draft_that_is_slower_than_was_measured_is_given_up_and_its_time_is_no_overhead() -> None:
    cost, now, rng = CostModel(1, 0.1, 0, 0), [0.0], random.Random(1)
    shaper = CostAwareShaper(cost, num_experts=1, clock=lambda: now[0], draft_level=0.1, probe_every=10_000)
    levels = []
    for _ in range(300):
        budget = shaper.budget(Budget(nodes=20, depth=6))
        depth = budget.depth if budget.nodes else 0
        now[0] += 5.0 * depth / 1000  # fifty times as long as was measured
        tree = shaper.shape(chain(range(depth), [math.log(0.6)] * depth)) if depth else chain([])
        now[0] += cost.milliseconds(len(tree) + 1, 1, len(tree) + 1) / 1000
        path: list[int] = []
        while len(path) < len(tree) and rng.random() < 0.6:
            path.append(len(path))
        shaper.observe(tree, Verdict(path, 0), Step(torch.empty(len(tree) + 1, 0), torch.empty(len(tree) + 1, 0)))
        levels.append(depth)
    assert levels[0] == 6
    assert sum(levels[-100:]) == 0
    assert shaper.overhead < 1.0


def test_no_experts_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="1 for a dense model; got 0"):
        CostAwareShaper(FREE, num_experts=0)
