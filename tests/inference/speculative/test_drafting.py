"""How far to draft follows from what the steps of drafting brought and took."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.inference.speculative.cost import DraftingCost
from blockffn.inference.speculative.drafting import (
    FEWEST_ROUNDS,
    FIRST_HOPE,
    FORGET_WORTH,
    HOPE,
    LEAST_WORTH,
    MOST_FORGOTTEN,
    STEPS,
    Drafted,
    WayOfDrafting,
    first_choices,
)
from blockffn.inference.speculative.tree import DraftTree, no_tree

LAST = len(STEPS)
# Two children of the root, two of the first of them, one of the second: paths of 0.6, 0.3, 0.36, 0.18, 0.09.
TREE = DraftTree(
    torch.arange(5), torch.tensor([-1, -1, 0, 0, 1]), torch.tensor([math.log(p) for p in (0.6, 0.3, 0.6, 0.3, 0.3)])
)


def way(level: float = 1.0, *, chain: bool = False) -> WayOfDrafting:
    return WayOfDrafting(DraftingCost(level=level), chain=chain, plain=10.0)


def test_what_was_drafted_at_a_step_is_the_children_of_paths_as_probable() -> None:
    drafted = Drafted(TREE)
    assert drafted.quantities(1.0) == (1, 1, 1)
    assert drafted.quantities(0.55) == drafted.quantities(0.35) == (1, 2, 2)
    assert drafted.quantities(0.25) == (1, 2, 3)
    assert drafted.quantities(0.0) == (1, 2, 3)  # the last level has no children that were asked for


def test_of_a_part_only_its_own_nodes_count() -> None:
    deep = DraftTree(torch.arange(3), torch.tensor([-1, 0, 1]), torch.zeros(3))
    assert Drafted(deep, [0]).quantities(0.0) == (1, 1, 1)
    assert Drafted(deep, [0, 1]).quantities(0.0) == (1, 2, 2)
    assert Drafted(no_tree()).quantities(0.0) == (1, 1, 1)


def test_a_node_belongs_to_the_step_in_which_it_is_drafted_first() -> None:
    sums = Drafted(TREE).by_step({0: 0.5, 1: 0.25, 2: 0.3, 3: 0.1, 4: 0.05})
    steps = {1.0: 0.75, 0.5: 0.4, 0.25: 0.05}  # the path of node 1 has 0.3
    assert sums == pytest.approx([steps.get(least, 0.0) for least in STEPS])


def test_before_anything_is_known_everything_is_drafted() -> None:
    assert way().usual == LAST
    assert way(level=1.0).worth(0, LAST) == pytest.approx(HOPE * LAST + FIRST_HOPE - 0.1)
    assert way(level=20.0).usual == 0  # but where it takes two plain rounds


def test_a_step_is_worth_what_its_nodes_bring_less_what_its_time_is_worth() -> None:
    one = way(level=2.0)
    brought = Drafted(TREE).by_step({0: 0.5, 2: 0.3})
    worths = one.learn(Drafted(TREE), brought, steps=LAST, rate=0.1, read=0)
    assert worths[0] == pytest.approx(0.5 - 0.1 * 2.0)
    assert worths[2] == pytest.approx(0.3 - 0.1 * 2.0)  # one level more
    assert [worths[i] for i in (1, 3, 5, LAST - 1)] == pytest.approx([0.0] * 4)


def test_the_first_round_counts_for_a_third_and_later_ones_for_less_until_they_are_forgotten() -> None:
    one, drafted = way(level=0.0), Drafted(TREE)
    one.learn(drafted, [1.0] * LAST, steps=1, rate=0.1, read=0)
    first = HOPE + FIRST_HOPE
    after_one = first + (1 - first) / (FEWEST_ROUNDS + 1)
    assert one.worth(0, 1) == pytest.approx(after_one)
    assert one.worth(1, 2) == HOPE  # a step that was not taken teaches nothing
    one.learn(drafted, [0.0] * LAST, steps=1, rate=0.1, read=0)
    assert one.worth(0, 1) == pytest.approx(after_one * (1 - 1 / (FEWEST_ROUNDS + 2)))
    before = one.worth(0, 1)
    for _ in range(200):
        one.forget(1)
    one.learn(drafted, [0.0] * LAST, steps=1, rate=0.1, read=0)
    seen = (FEWEST_ROUNDS + 2) * FORGET_WORTH**MOST_FORGOTTEN  # however many rounds passed
    assert one.worth(0, 1) == pytest.approx(before * (1 - 1 / (seen + 1)))


@pytest.mark.parametrize(
    ("worths", "usual"),
    [
        ([0.3, -0.1, 0.2], 3),  # a step that loses is taken where the next makes up for it
        ([0.3, -0.1, 0.05], 1),
        ([-0.1, -0.1, -0.1], 0),
        ([0.8 * LEAST_WORTH, 0.0, 0.0], 0),
        ([1.1 * LEAST_WORTH, -0.1, 0.0], 1),
    ],
)
def test_the_steps_with_the_largest_sum_are_usual_if_it_is_worth_anything(worths: list[float], usual: int) -> None:
    one = way(level=0.0, chain=True)
    brought = worths + [-0.1] * (LAST - len(worths))
    for _ in range(400):
        one.learn(Drafted(TREE), brought, steps=LAST, rate=0.1, read=0)
    assert one.usual == usual


def test_a_tree_is_usual_whatever_little_it_brings() -> None:
    one = way(level=0.0)
    for _ in range(400):
        one.learn(Drafted(TREE), [0.5 * LEAST_WORTH] + [-0.1] * (LAST - 1), steps=LAST, rate=0.1, read=0)
    assert one.usual == 1


def test_the_chain_within_a_tree_is_that_of_the_most_probable_children() -> None:
    tree = DraftTree(torch.arange(5), torch.tensor([-1, -1, 0, 1, 1]), torch.tensor([0.3, 0.6, 0.9, 0.2, 0.7]).log())
    assert first_choices(tree) == [1, 4]
    assert first_choices(no_tree()) == []
