"""A tree keeps the nodes that pay."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockffn.inference.speculative.cost import CostModel, DraftingCost
from blockffn.inference.speculative.decode import Speculation
from blockffn.inference.speculative.drafters.model import ModelDrafter
from blockffn.inference.speculative.estimates import UnionEstimate
from blockffn.inference.speculative.growth import BestNodes, Budget
from blockffn.inference.speculative.shaping import (
    EXPLORE,
    FIRST_LEARNT,
    LEARN,
    MOST_REST,
    PLAIN_TRY,
    CostAwareShaper,
    Prices,
    choose_nodes,
)
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
    nodes = choose_nodes(tree, reach=reach_of(tree), brings=[0.0] * 6, prices=prices(FREE), rate=0.1).nodes
    assert nodes == list(range(6))


def test_where_a_token_costs_what_it_brings_nothing_is_verified() -> None:
    tree = chain(range(6), [math.log(0.4)] * 6)
    assert choose_nodes(tree, reach=reach_of(tree), brings=[0.0] * 6, prices=prices(TOKENS), rate=0.5).nodes == []


def test_of_two_equal_promises_the_one_that_needs_no_new_expert_is_kept() -> None:
    tree = DraftTree(torch.tensor([1, 2]), torch.tensor([-1, -1]), torch.tensor([0.45, 0.45]).log())
    nodes = choose_nodes(tree, reach=[0.45, 0.45], brings=[0.7, 0.01], prices=prices(EXPERTS), rate=0.1).nodes
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
    assert shaper.rate > 0


def play(
    shaper: CostAwareShaper,
    *,
    draft_probability: float,
    rounds: int,
    drafted: Callable[[int], None] = lambda levels: None,
    verified: Callable[[int], None] = lambda size: None,
) -> tuple[list[int], list[int]]:
    """Levels drafted and nodes verified in each round, where a chain's tokens are right as often as the draft says."""
    rng, depths, sizes = random.Random(0), [], []
    for _ in range(rounds):
        budget = shaper.budget(Budget(nodes=20, depth=6))
        depth = min(1, budget.nodes)
        while 0 < depth < budget.depth and draft_probability**depth >= budget.least:
            depth += 1
        drafted(depth)
        tree = chain(range(depth), [math.log(draft_probability)] * depth)
        if len(tree):
            tree = shaper.shape(tree)
        verified(len(tree))
        path: list[int] = []
        while len(path) < len(tree) and rng.random() < draft_probability:
            path.append(len(path))
        size = len(tree) + 1
        shaper.observe(tree, Verdict(path, 0), Step(torch.empty(size, 0), torch.empty(size, 0)))
        depths.append(depth)
        sizes.append(len(tree))
    return depths, sizes


def test_levels_are_drafted_while_they_are_worth_their_drafting() -> None:
    cost = CostModel(10, 0.1, 0, 0)
    shapers = [CostAwareShaper(cost, num_experts=1, tree=DraftingCost(level=level)) for level in (0.0, 2.0, 9.0)]
    free, dear, ruinous = (play(shaper, draft_probability=0.5, rounds=120)[0] for shaper in shapers)
    assert set(free[PLAIN_TRY:]) <= {0, 6}  # plain rounds are tried
    assert sum(free) >= 6 * 110
    assert 1 <= sum(dear[-40:]) / 40 <= 3
    assert sum(ruinous[-40:]) <= 6
    assert ruinous[: PLAIN_TRY + 1] == [0] * PLAIN_TRY + [6]  # the last before anything is known of drafts


def test_nothing_is_verified_beyond_a_hundredth_of_the_time_to_see_whether_it_pays() -> None:
    cost = CostModel(10, 10, 0, 0)  # a node costs what it brings at most
    shaper = CostAwareShaper(cost, num_experts=1, tree=DraftingCost(level=0.1))
    _, sizes = play(shaper, draft_probability=0.3, rounds=1000)
    assert 0 < sum(sizes) * 10 <= 0.02 * 1000 * 20


def test_what_a_round_costs_besides_is_learnt_by_the_clock_and_makes_trees_larger() -> None:
    cost = CostModel(1, 0.5, 0, 0)

    def mean_size(milliseconds: float) -> float:
        """Of the last 100 of 400 rounds that take so much more than their verification."""
        now = [0.0]

        def verified(size: int) -> None:
            now[0] += (cost.milliseconds(size + 1, 1, size + 1) + milliseconds) / 1000

        shaper = CostAwareShaper(cost, num_experts=1, clock=lambda: now[0])
        return sum(play(shaper, draft_probability=0.6, rounds=400, verified=verified)[1][-100:]) / 100

    assert mean_size(4.0) > mean_size(0.0) + 0.5


def test_a_draft_that_is_slower_than_was_measured_is_given_up() -> None:
    cost, now = CostModel(1, 0.1, 0, 0), [0.0]

    def drafted(levels: int) -> None:
        now[0] += 5.0 * levels / 1000  # fifty times as long as was measured

    def verified(size: int) -> None:
        now[0] += cost.milliseconds(size + 1, 1, size + 1) / 1000

    shaper = CostAwareShaper(cost, num_experts=1, clock=lambda: now[0], tree=DraftingCost(level=0.1))
    levels, _ = play(shaper, draft_probability=0.6, rounds=300, verified=verified, drafted=drafted)
    assert levels[PLAIN_TRY] == 6
    assert sum(levels[-100:]) <= 4


def test_what_a_plain_round_takes_is_learnt_from_plain_rounds_beyond_the_first() -> None:
    """Rounds with drafts take 2 ms more than calculated, whatever their size, and so does the first without."""
    cost, now, before = CostModel(1, 0.1, 0, 0), [0.0], [1]

    def verified(size: int) -> None:
        now[0] += (cost.milliseconds(size + 1, 1, size + 1) + (2 if size or before[0] else 0)) / 1000
        before[0] = size

    shaper = CostAwareShaper(cost, num_experts=1, clock=lambda: now[0], tree=DraftingCost(level=0.01))
    _, sizes = play(shaper, draft_probability=0.6, rounds=100, verified=verified)
    assert sum(sizes[-50:]) <= 20  # 2.4 tokens at most in 3.4 ms, against 1 in 1.1 ms
    assert shaper.rate == pytest.approx(1 / 1.1, rel=0.1)


def test_one_plain_round_that_was_disturbed_teaches_little() -> None:
    """Rounds of 1 ms, and one of 1000 ms among them: as if of 3 ms, in a mean of eight."""
    now = [0.0]
    shaper = CostAwareShaper(CostModel(1, 0, 0, 0), num_experts=1, clock=lambda: now[0])
    for number in range(100):
        shaper.budget(Budget(nodes=0, depth=0))
        now[0] += 1.0 if number == 99 else 0.001
        shaper.observe(chain([]), Verdict([], 0), step_of(1))
    assert shaper._plain() == pytest.approx((7 * 1 + 3) / 8, rel=0.01)


@pytest.mark.parametrize(("probability", "is_tried"), [(0.4, True), (0.7, False)])
def test_plain_rounds_are_tried_three_in_a_row_where_drafts_gain_little(probability: float, is_tried: bool) -> None:
    """A level costs a fifth of a round. Drafts gain 15 % and more than 50 %."""
    shaper = CostAwareShaper(CostModel(10, 0.1, 0, 0), num_experts=1, tree=DraftingCost(level=2.0))
    levels, _ = play(shaper, draft_probability=probability, rounds=590)
    runs = [len(list(rounds)) for depth, rounds in itertools.groupby(levels) if not depth]
    assert set(runs) == {PLAIN_TRY}
    assert len(runs) > 3 if is_tried else len(runs) == 1  # those before anything is known of drafts


def test_what_a_plain_round_loses_is_charged() -> None:
    shaper = CostAwareShaper(CostModel(10, 0.1, 0, 0), num_experts=1, tree=DraftingCost(level=2.0))
    play(shaper, draft_probability=0.7, rounds=100)
    rate, credit = shaper.rate, shaper._credit
    shaper._resting = 1
    assert shaper.budget(Budget(nodes=20, depth=6)).nodes == 0
    shaper.observe(chain([]), Verdict([], 0), step_of(1))
    assert shaper._credit == pytest.approx(credit + 10.1 / 80 - (10.1 - 1 / rate))


def test_where_a_round_explores_twice_as_many_nodes_are_verified_as_pay() -> None:
    tree = chain(range(6), [math.log(p) for p in (0.9, 0.9, 0.2, 0.9, 0.9, 0.9)])
    sizes = []
    for credit in (-1.0, 1.0):
        shaper = CostAwareShaper(TOKENS, num_experts=1)
        for _ in range(PLAIN_TRY):
            shaper.budget(Budget(nodes=6, depth=6))
            shaper.observe(chain([]), Verdict([], 0), step_of(1))
        shaper._credit = credit
        shaper.budget(Budget(nodes=6, depth=6))
        sizes.append(len(shaper.shape(tree)))
    assert sizes == [2, 4]


def test_where_nothing_pays_plain_rounds_come_in_rows_until_it_explores() -> None:
    now = [0.0]
    shaper = CostAwareShaper(TOKENS, num_experts=1, clock=lambda: now[0], tree=DraftingCost(level=9.0))

    def verified(size: int) -> None:
        now[0] += (2 + size) / 1000

    play(shaper, draft_probability=0.1, rounds=200, verified=verified)
    shaper._credit = -2.0 * shaper._plain()
    play(shaper, draft_probability=0.1, rounds=PLAIN_TRY, verified=verified)
    rows, unread, plain = [], shaper._unread, shaper._plain()
    while routine := shaper.routine(Budget(nodes=6, depth=6)):
        assert routine.budget.nodes == 0
        shaper.rested([plain / 1000] * routine.rounds)
        rows.append(routine.rounds)
    assert max(rows) == MOST_REST
    assert sum(rows) == pytest.approx(2 / EXPLORE, abs=4)  # credit for two rounds
    assert shaper._unread == unread + sum(rows)
    assert shaper._plain() == pytest.approx(plain)
    assert shaper.budget(Budget(nodes=6, depth=6)).nodes == 6


def test_where_drafts_pay_nothing_rests() -> None:
    shaper = CostAwareShaper(CostModel(10, 0.1, 0, 0), num_experts=1, tree=DraftingCost(level=0.1))
    for _ in range(50):
        assert shaper.routine(Budget(nodes=20, depth=6)) is None
        play(shaper, draft_probability=0.8, rounds=1)


def test_a_draft_that_was_measured_to_doubt_itself_is_used_from_the_first_round() -> None:
    """It gives 0.25 to first choices that are right in 8 of 10 cases; a node must bring 0.5."""
    cost = CostModel(1, 1, 0, 0)
    tree = chain(range(2), [math.log(0.25)] * 2)
    sizes = []
    for calibration in (None, {"first": [[0.25, 0.8, 500]], "later": []}):
        shaper = CostAwareShaper(cost, num_experts=1, calibration=calibration)
        shaper.budget(Budget(nodes=2, depth=2))
        sizes.append(len(shaper.shape(tree)))
    assert sizes == [0, 2]


def test_a_measured_acceptance_that_does_not_hold_for_a_text_is_forgotten() -> None:
    cost = CostModel(1, 0.5, 0, 0)
    calibration = {"first": [[0.25, 0.8, 500]], "later": []}
    shaper = CostAwareShaper(cost, num_experts=1, calibration=calibration, tree=DraftingCost(level=0.01))
    _, sizes = play(shaper, draft_probability=0.25, rounds=150)
    assert sum(sizes[:20]) >= 8
    assert sum(sizes[-50:]) <= 10


def step_of(tokens: int, active: list[int] | None = None) -> Step:
    """With experts `active` of each token in one layer; `None`: a dense model's."""
    if active is None:
        return Step(torch.zeros(tokens, 2), torch.zeros(tokens, 2))
    return Step(torch.zeros(tokens, 2), torch.zeros(tokens, 2), torch.tensor([max(active)]), torch.tensor([active]))


@pytest.mark.parametrize("accepted", [True, False])
def test_a_round_that_explored_for_nothing_is_followed_by_none(accepted: bool) -> None:
    """What was tried alone lies at the end of the drafted tree, and at the beginning of the verified one."""
    shaper = CostAwareShaper(TOKENS, num_experts=1)  # a token costs what it brings if it is accepted
    tree = DraftTree(torch.arange(4), torch.full((4,), -1), torch.tensor([0.02, 0.02, 0.5, 0.05]).log())
    for _ in range(100):
        shaper.budget(Budget(nodes=4, depth=1))
        part = shaper.shape(tree)
        if len(part):
            break
        shaper.observe(part, Verdict([], 0), step_of(1))
    assert part.tokens.tolist() == [2, 3]
    shaper.observe(part, Verdict([0] if accepted else [], 0), step_of(3))
    shaper.budget(Budget(nodes=4, depth=1))
    assert len(shaper.shape(tree)) == (2 if accepted else 0)


def test_the_next_root_has_the_experts_of_the_last_accepted_token() -> None:
    starts = []
    for path in ([], [0], [0, 1]):
        shaper = CostAwareShaper(EXPERTS, num_experts=20)
        shaper.budget(Budget(nodes=2, depth=2))
        shaper.observe(chain([1, 2], [0.0, 0.0]), Verdict(path, 0), step_of(3, [1, 4, 9]))
        starts.append(shaper._union.start())
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("share", "is_chosen"), [(0.9, True), (0.3, True), (0.2, False)])
def test_growth_goes_on_beyond_a_node_that_does_not_pay_but_not_beyond_a_hopeless_one(
    share: float, is_chosen: bool
) -> None:
    """The first node brings experts, those behind it none: together they pay."""
    tree = chain(range(40), [0.0] * 40)
    own = prices(EXPERTS)
    brings = [0.5] + [0.0] * 39
    price = own.milliseconds(2, own.union.start() + 0.5) - own.milliseconds(1, own.union.start())
    rate = 0.05
    reach = [share * rate * price] * 40
    nodes = choose_nodes(tree, reach=reach, brings=brings, prices=own, rate=rate).nodes
    assert nodes == (list(range(40)) if is_chosen else [])


def test_credit_that_was_not_needed_for_long_is_not_saved_up() -> None:
    """Rounds without drafts gain credit; what is tried afterwards still costs half a round at once, no more."""
    cost = CostModel(10, 10, 0, 0)
    losses = []
    for idle in (100, 3000):
        shaper = CostAwareShaper(cost, num_experts=1, tree=DraftingCost(level=0.1))
        for _ in range(idle):
            shaper.budget(Budget(nodes=20, depth=6))
            shaper.observe(chain([]), Verdict([], 0), step_of(1))
        _, sizes = play(shaper, draft_probability=0.05, rounds=40)
        losses.append(10 * sum(sizes))  # milliseconds of verifying what is hardly ever accepted
    assert losses[0] > 0
    assert losses[1] <= losses[0] + 20  # where a plain round takes 20


def test_credit_grows_by_an_eightieth_of_the_time_up_to_half_a_round() -> None:
    shaper = CostAwareShaper(CostModel(10, 10, 0, 0), num_experts=1, tree=DraftingCost(level=0.1))
    credits = []
    for _ in range(300):
        shaper.budget(Budget(nodes=20, depth=6))
        shaper.observe(chain([]), Verdict([], 0), step_of(1))
        credits.append(shaper._credit)
    assert credits[1] - credits[0] == pytest.approx(20 / 80)
    assert credits[-1] == pytest.approx(20 / 2)


def test_the_rate_changes_by_a_hundredth_with_a_round() -> None:
    shaper = CostAwareShaper(CostModel(10, 1, 0, 0), num_experts=1)
    for accepted, rounds in ((4, 600), (1, 69)):
        for _ in range(rounds):
            shaper.budget(Budget(nodes=4, depth=4))
            shaper.observe(chain(range(4), [0.0] * 4), Verdict(list(range(accepted)), 0), step_of(5))
    assert shaper.rate == pytest.approx((5 + 2) / 2 / 15, rel=0.02)  # half of what was is forgotten


def test_a_round_of_bad_luck_does_not_lower_the_rate_below_plain_decoding() -> None:
    shaper = CostAwareShaper(CostModel(10, 1, 0, 0), num_experts=1)
    plain = shaper.rate
    assert plain == pytest.approx(1 / 11)
    for _ in range(300):
        shaper.budget(Budget(nodes=4, depth=4))
        shaper.observe(chain(range(4), [-3.0] * 4), Verdict([], 0), step_of(5))
    assert shaper.rate == pytest.approx(plain)


def test_the_rate_follows_the_tokens_of_the_last_hundred_rounds() -> None:
    shaper = CostAwareShaper(CostModel(10, 1, 0, 0), num_experts=1)
    for accepted in (4, 1):
        for _ in range(300):
            shaper.budget(Budget(nodes=4, depth=4))
            shaper.observe(chain(range(4), [0.0] * 4), Verdict(list(range(accepted)), 0), step_of(5))
        assert shaper.rate == pytest.approx(max((accepted + 1) / 15, 1 / 11), rel=0.1)


def propose(shaper: CostAwareShaper, probability: float, *, second: float) -> tuple[Budget, DraftTree]:
    """Six levels as far as the budget lets them; a tree has a second choice beside each node."""
    budget = shaper.budget(Budget(nodes=20, depth=6))
    parents: list[int] = []
    shares: list[float] = []
    path, at = 1.0, -1
    while budget.nodes and path >= budget.least and len(shares) < (6 if budget.chain else 12):
        first = len(parents)
        parents += [at] if budget.chain else [at, at]
        shares += [probability] if budget.chain else [probability, second]
        path, at = path * probability, first
    return budget, DraftTree(torch.arange(len(parents)), torch.tensor(parents, dtype=torch.int64),
                             torch.tensor(shares).log())  # fmt: skip


def share_of_chains(shaper: CostAwareShaper, *, second: float, rounds: int = 200, seed: int = 0) -> float:
    """Of the last half of the rounds. The draft's first choice is right in 6 of 10 cases."""
    rng, chains = random.Random(seed), 0
    for number in range(rounds):
        budget, tree = propose(shaper, 0.6, second=second)
        part = shaper.shape(tree) if len(tree) else tree
        path, at = [], -1
        while True:
            luck = rng.random()
            found = [c for c in part.children(at) if luck < 0.6 and c == part.children(at)[0]]
            found = found or [c for c in part.children(at)[1:] if 0.6 <= luck < 0.6 + second]
            if not found:
                break
            at = found[0]
            path.append(at)
        shaper.observe(part, Verdict(path, 0), step_of(len(part) + 1))
        chains += budget.chain and number >= rounds // 2
    return chains / (rounds // 2)


@pytest.mark.parametrize(
    ("tree_level", "chain_level", "second", "least", "most"),
    [
        (2.0, 0.5, 0.05, 0.9, 1.0),  # a tree is dearer, and its second choices bring little
        (2.0, None, 0.05, 0.0, 0.0),
        (0.5, 2.0, 0.05, 0.0, 0.1),  # a chain is dearer
        (0.6, 0.5, 0.35, 0.0, 0.1),  # second choices are worth the little that they cost
    ],
)
def test_a_chain_is_drafted_where_it_is_worth_more_than_a_tree(
    tree_level: float, chain_level: float | None, second: float, least: float, most: float
) -> None:
    shaper = CostAwareShaper(
        CostModel(10, 0.5, 0, 0),
        num_experts=1,
        tree=DraftingCost(level=tree_level),
        chain=None if chain_level is None else DraftingCost(level=chain_level),
    )
    assert least <= share_of_chains(shaper, second=second) <= most


def test_trees_are_still_tried_now_and_then_while_chains_are_better() -> None:
    """Else it would never be known that second choices have become worth drafting."""
    shaper = CostAwareShaper(
        CostModel(10, 0.5, 0, 0), num_experts=1, tree=DraftingCost(level=0.9), chain=DraftingCost(level=0.5)
    )
    assert 0.8 < share_of_chains(shaper, second=0.02, rounds=300) < 1
    assert share_of_chains(shaper, second=0.39, rounds=400) < 0.2


def test_a_tree_that_was_better_for_long_gives_way_to_a_chain() -> None:
    shaper = CostAwareShaper(
        CostModel(10, 0.5, 0, 0), num_experts=1, tree=DraftingCost(level=0.9), chain=DraftingCost(level=0.5)
    )
    assert share_of_chains(shaper, second=0.39, rounds=400) < 0.2
    assert share_of_chains(shaper, second=0.02, rounds=160) > 0.6


def test_while_plain_rounds_are_tried_no_turn_of_exploring_passes() -> None:
    shaper = CostAwareShaper(TOKENS, num_experts=1)
    for _ in range(PLAIN_TRY):
        shaper._credit = 1.0
        shaper.budget(Budget(nodes=6, depth=6))
        shaper.observe(chain([]), Verdict([], 0), step_of(1))
    assert shaper._explored == 0


@dataclass
class SlowLearner:
    """A shaper whose choices take 3 ms and whose learning takes 2 ms, while a level takes 0.2 ms."""

    cost: CostModel
    now: float = 0.0
    learnt: int = 0

    def __post_init__(self) -> None:
        self.shaper = CostAwareShaper(
            self.cost, num_experts=1, clock=lambda: self.now / 1000, tree=DraftingCost(level=0.2)
        )
        brings, observe = self.shaper._union.brings, self.shaper.acceptance.observe

        def slow_brings(tree: DraftTree) -> list[float]:
            self.now += 3.0
            return brings(tree)

        def slow_observe(tree: DraftTree, verdict: Verdict, **options: Any) -> None:
            self.now += 2.0
            self.learnt += len(tree) > 0
            observe(tree, verdict)

        self.shaper._union.brings = slow_brings  # type: ignore[method-assign]
        self.shaper.acceptance.observe = slow_observe  # type: ignore[method-assign]

    def play(self, draft_probability: float, rounds: int) -> tuple[list[int], list[int]]:
        def drafted(levels: int) -> None:
            self.now += 0.2 * levels

        def verified(size: int) -> None:
            self.now += self.cost.milliseconds(size + 1, 1, size + 1)

        return play(self.shaper, draft_probability=draft_probability, rounds=rounds, drafted=drafted, verified=verified)


def test_learning_takes_a_small_part_of_the_time() -> None:
    learner = SlowLearner(CostModel(1, 0.1, 0, 0))
    learner.play(0.99, FIRST_LEARNT + 100)
    before, learnt = learner.now, learner.learnt
    levels, sizes = learner.play(0.99, 2000)
    assert levels[-1] == sizes[-1] == 6
    spent = learner.now - before
    assert 5 * (learner.learnt - learnt) == pytest.approx(LEARN * spent, rel=0.3)
    times, verifying = learner.shaper._tree.times, learner.shaper._verifying
    assert times.milliseconds((1, 6, 6, 7)) == pytest.approx(1.2, rel=0.05)  # choosing is no part of it
    assert verifying.milliseconds((1, 7, 1.7)) == pytest.approx(1.7, rel=0.05)


def test_rounds_that_do_not_learn_verify_what_paid_lately() -> None:
    """A node costs 0.5 ms of a text of some 0.5 tokens a millisecond: a path must be right in one of four cases."""
    learner = SlowLearner(CostModel(1, 0.5, 0, 0))
    for _ in range(4):
        learner.play(0.8, 60)
        learner.play(0.3, 60)
    sizes = {}
    for probability in (0.9, 0.3):
        tree = chain(range(6), [math.log(probability)] * 6)
        learner.shaper._patience, learner.shaper._to_learn = -1.0, 0
        learner.shaper.budget(Budget(nodes=6, depth=6))
        sizes[probability] = len(learner.shaper.shape(tree))
        learner.shaper.observe(tree, Verdict([], 0), step_of(7))
    assert sizes[0.9] >= 4
    assert sizes[0.3] <= 1


def test_a_try_is_charged_for_the_text_that_the_draft_reads_for_it_alone() -> None:
    shaper = CostAwareShaper(CostModel(10, 0.1, 0, 0), num_experts=1, tree=DraftingCost(level=9.0, read=1.0))
    shaper.start(500)
    play(shaper, draft_probability=0.3, rounds=PLAIN_TRY + 1)
    assert shaper._drafted is not None
    assert shaper._drafted[-1] == 500 + PLAIN_TRY
    play(shaper, draft_probability=0.3, rounds=100)
    shaper._credit = 1.0
    unread = shaper._unread
    assert unread > 50
    play(shaper, draft_probability=0.3, rounds=1)
    assert shaper._drafted is not None
    assert shaper._credit <= 1.0 - (unread - 1)


def test_no_experts_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="1 for a dense model; got 0"):
        CostAwareShaper(FREE, num_experts=0)
