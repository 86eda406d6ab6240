"""What is learnt while decoding comes out as what generated it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from blockffn.inference.speculative.estimates import AcceptanceEstimate, TimeEstimate, UnionEstimate
from blockffn.inference.speculative.tree import DraftTree, chain
from blockffn.inference.speculative.verify import Verdict


def test_before_anything_is_seen_the_draft_is_believed() -> None:
    tree = chain([1, 2], [math.log(0.8), math.log(0.5)])
    assert AcceptanceEstimate().reach(tree) == pytest.approx([0.8, 0.4], abs=1e-6)


def test_siblings_share_one_probability() -> None:
    tree = DraftTree(torch.tensor([1, 2]), torch.tensor([-1, -1]), torch.tensor([0.9, 0.9]).log())
    assert AcceptanceEstimate().reach(tree) == pytest.approx([0.5, 0.5])


def test_a_draft_that_is_too_sure_of_itself_is_corrected_by_depth() -> None:
    rng, estimate = random.Random(0), AcceptanceEstimate()
    true = {1: 0.6, 2: 0.2}
    tree = chain([1, 2], [math.log(0.85), math.log(0.85)])
    for _ in range(3000):
        path = []
        while len(path) < 2 and rng.random() < true[len(path) + 1]:
            path.append(len(path))
        estimate.observe(tree, Verdict(path, 0))
    assert estimate.probability(0.85, 1) == pytest.approx(0.6, abs=0.05)
    assert estimate.probability(0.85, 2) == pytest.approx(0.2, abs=0.05)
    assert estimate.probability(0.1, 1) == pytest.approx(0.1)  # other bins are untouched


def test_later_siblings_teach_nothing_of_first_ones_that_are_as_probable() -> None:
    tree = DraftTree(torch.tensor([1, 2]), torch.tensor([-1, -1]), torch.tensor([0.25, 0.25]).log())
    estimate = AcceptanceEstimate()
    for _ in range(400):
        estimate.observe(tree, Verdict([0], 0))
    assert estimate.probability(0.25, 1, 0) > 0.9
    assert estimate.probability(0.25, 1, 1) < 0.05


def test_what_was_measured_comes_back_as_the_first_assumption() -> None:
    measured, tree = AcceptanceEstimate(forget=1.0), chain([1, 2], [math.log(0.25), math.log(0.25)])
    for number in range(1000):
        measured.observe(tree, Verdict([0, 1] if number % 5 else [], 0))
    calibration = measured.calibration()
    assert calibration == {"first": [[0.25, 0.8889, 1800]], "later": []}
    assert AcceptanceEstimate(calibration).probability(0.25, 1) == pytest.approx(0.8889, rel=0.01)
    assert AcceptanceEstimate(calibration).probability(0.25, 1, 1) == pytest.approx(0.25)


def test_what_is_forgotten_does_not_depend_on_when_sums_are_rescaled() -> None:
    tree = chain([1], [math.log(0.4)])
    estimate = AcceptanceEstimate(forget=0.9)
    for number in range(7000):  # 0.9 to the power of -7000 is no number any more
        estimate.observe(tree, Verdict([0] if number < 6900 else [], 0))
    # Ten rounds of 0.4 are remembered, beside four acceptances assumed; of the depth the same once more.
    factor = 4 / (4 + 0.4 * 10)
    assert estimate.probability(0.4, 1) == pytest.approx(0.4 * factor * 4 / (4 + factor * 0.4 * 10), rel=0.01)


def random_tree(rng: random.Random) -> DraftTree:
    size = rng.randrange(1, 20)
    parents = [rng.randrange(-1, node) for node in range(size)]
    return DraftTree(torch.arange(size), torch.tensor(parents), torch.zeros(size))


def test_the_union_of_nodes_that_use_a_share_of_the_rest_is_predicted() -> None:
    """First children bring 5 % of what is unused, later ones 15 %."""
    rng, estimate = random.Random(0), UnionEstimate(1000)
    for _ in range(400):
        tree = random_tree(rng)
        unused = 900.0 * math.prod(0.85 if rank else 0.95 for rank in tree.rank.tolist())
        estimate.observe(tree, union=round(1000 - unused), active=[100] * (len(tree) + 1), last=0)
    for _ in range(20):
        tree = random_tree(rng)
        true = 1000 - 900.0 * math.prod(0.85 if rank else 0.95 for rank in tree.rank.tolist())
        assert estimate.union(estimate.start() + sum(estimate.brings(tree))) == pytest.approx(true, rel=0.05)


def test_the_next_root_is_expected_to_use_what_the_last_token_used() -> None:
    estimate = UnionEstimate(100)
    estimate.observe(chain([1, 2]), union=50, active=[10, 20, 40], last=2)
    assert estimate.union(estimate.start()) == pytest.approx(40)


def test_a_union_of_everything_stays_finite() -> None:
    estimate = UnionEstimate(10)
    for _ in range(50):
        estimate.observe(chain([1, 2]), union=10, active=[10, 10, 10], last=0)
    assert 9 < estimate.union(estimate.start() + sum(estimate.brings(chain([1, 2])))) <= 10


def test_prices_are_learnt_from_times_that_vary_apart() -> None:
    estimate = TimeEstimate((0.0, 1.0, 0.0), doubts=(2.0, 2.0, 0.5))
    for levels, nodes in [(1, 1), (2, 3), (5, 9), (3, 3), (4, 12), (1, 1), (2, 6)] * 6:
        estimate.observe((1, levels, nodes), 1 + 2 * levels + 0.5 * nodes)
    for levels, nodes in [(1, 1), (5, 9), (4, 12), (2, 6)]:
        assert estimate.milliseconds((1, levels, nodes)) == pytest.approx(1 + 2 * levels + 0.5 * nodes, rel=0.1)


def test_a_time_far_too_long_teaches_little_and_prices_stay_positive() -> None:
    estimate = TimeEstimate((1.0, 1.0), doubts=(0.5, 0.5))
    for _ in range(50):
        estimate.observe((1, 3), 4.0)
    before = estimate.milliseconds((1, 3))
    estimate.observe((1, 3), 4000.0)
    assert estimate.milliseconds((1, 3)) < 1.5 * before
    for _ in range(50):
        estimate.observe((1, 3), 0.0)
    assert min(estimate.prices) >= 0


def test_what_was_not_measured_for_long_is_learnt_anew_at_once() -> None:
    known, stale = (TimeEstimate((1.0,), doubts=(1.0,)) for _ in range(2))
    for estimate in (known, stale):
        for _ in range(100):
            estimate.observe((1,), 1.0)
    for _ in range(400):
        stale.forget(1)
    for estimate in (known, stale):
        estimate.observe((1,), 2.0)
    assert known.prices[0] < 1.1
    assert stale.prices[0] > 1.8
