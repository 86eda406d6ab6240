"""Greedy verification accepts what the target would say; sampling verification leaves its distribution as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blockffn.inference.sampling import SamplingSettings, draw, probabilities
from blockffn.inference.speculative.growth import BestNodes, Budget, DrawnNodes
from blockffn.inference.speculative.tree import DraftTree, chain, no_tree
from blockffn.inference.speculative.verify import verify_greedy, verify_sampling

V = 5
SOFTMAX = SamplingSettings(temperature=1.0, top_p=1.0)
SHARP = SamplingSettings(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)
ROOT = torch.tensor([0])
TARGET = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1], [0.5, 0.1, 0.1, 0.2, 0.1], [0.05, 0.05, 0.6, 0.2, 0.1],
                       [0.3, 0.3, 0.2, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])  # fmt: skip


def logits_for(tree: DraftTree, root: int = 0) -> Tensor:
    return TARGET.log()[tree.behind(root)[0]]


def test_the_longest_right_path_wins_and_the_target_adds_its_own() -> None:
    tree = DraftTree(torch.tensor([3, 4, 5, 6, 9]), torch.tensor([-1, -1, 1, 2, 0]), torch.zeros(5))
    verdict = verify_greedy(tree, torch.tensor([4, 9, 5, 6, 7, 0]))
    assert verdict.path == [1, 2, 3]
    assert verdict.bonus == 7


def test_a_right_token_below_a_wrong_one_does_not_count() -> None:
    verdict = verify_greedy(chain([1, 2]), torch.tensor([5, 2, 3]))
    assert (verdict.path, verdict.bonus) == ([], 5)


def test_without_a_tree_the_target_speaks_alone() -> None:
    assert verify_greedy(no_tree(), torch.tensor([6])).bonus == 6


def test_of_equal_siblings_the_one_that_goes_on_wins() -> None:
    tree = DraftTree(torch.tensor([4, 4, 5]), torch.tensor([-1, -1, 1]), torch.zeros(3))
    assert verify_greedy(tree, torch.tensor([4, 5, 5, 8])).path == [1, 2]


def test_a_tree_without_chance_gives_the_tokens_of_plain_sampling_with_the_same_seed() -> None:
    tree = DraftTree(torch.tensor([1, 2, 0, 3]), torch.tensor([-1, -1, 0, 1]), torch.zeros(4))
    for seed in range(50):
        verdict = verify_sampling(
            tree, logits_for(tree), SOFTMAX, context=ROOT, generator=torch.Generator().manual_seed(seed)
        )
        generator = torch.Generator().manual_seed(seed)
        token, plain = 0, []
        for _ in range(len(verdict.path) + 1):
            token = draw(TARGET[token], generator)
            plain.append(token)
        assert [*tree.tokens[verdict.path].tolist(), verdict.bonus] == plain


GOOD = (TARGET.log() + 0.3 * torch.randn(V, V, generator=torch.Generator().manual_seed(3))).log_softmax(dim=-1)
BAD = torch.tensor([0.02, 0.02, 0.02, 0.02, 0.92]).log().expand(V, V)
DRAFTS = {"good": GOOD, "exact": TARGET.log(), "bad": BAD, "reduced": GOOD[:, [0, 2, 4]].log_softmax(dim=-1)}
GROWTHS = {
    "drawn chain": DrawnNodes(widths=(1, 1)),
    "drawn tree": DrawnNodes(widths=(3, 2)),
    "whole vocabulary drawn": DrawnNodes(widths=(5, 1)),
    "best chain": BestNodes(top_k=1, depth=2, size=2),
    "best tree": BestNodes(top_k=3, depth=2, size=6),
}


CASES = [(draft, growth, SOFTMAX) for draft in ("good", "bad", "reduced") for growth in GROWTHS] + [
    ("exact", "drawn tree", SOFTMAX),
    *(("good", growth, SHARP) for growth in GROWTHS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "growth", "settings"), CASES)
def test_two_tokens_are_distributed_as_by_plain_sampling(draft: str, growth: str, settings: SamplingSettings) -> None:
    """Chi-square over all pairs; where a verification gives one token, plain sampling adds the second."""
    token_ids = torch.tensor([0, 2, 4]) if draft == "reduced" else None
    generator = torch.Generator().manual_seed(1)
    trials, counts = 1500, torch.zeros(V, V)

    def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
        return DRAFTS[draft][[0 if node == -1 else int(tree.tokens[node]) for node in nodes]]

    plain = probabilities(TARGET.log(), None, settings)
    for _ in range(trials):
        tree = GROWTHS[growth](expand, Budget(99, 9), vocab_size=V, token_ids=token_ids, generator=generator)
        verdict = verify_sampling(tree, logits_for(tree), settings, context=ROOT, generator=generator)
        tokens = [*tree.tokens[verdict.path].tolist(), verdict.bonus]
        if len(tokens) == 1:
            tokens.append(int(torch.multinomial(plain[tokens[0]], 1, generator=generator)))
        counts[tokens[0], tokens[1]] += 1
    expected = trials * plain[0][:, None] * plain
    assert (counts[expected == 0] == 0).all()
    cells = expected > 0
    chi_square = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    degrees = int(cells.sum()) - 1
    # 4.3 standard deviations of a normal approximation (Wilson and Hilferty): one false alarm in 100 000.
    bound = degrees * (1 - 2 / (9 * degrees) + 4.3 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < bound, f"chi-square {chi_square:.1f} with {degrees} degrees of freedom"


def test_a_draft_that_equals_the_target_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tree = DrawnNodes(widths=(1, 1, 1))(
            lambda tree, nodes: TARGET.log()[[0 if n == -1 else int(tree.tokens[n]) for n in nodes]],
            Budget(9, 9), vocab_size=V, generator=generator,
        )  # fmt: skip
        assert len(verify_sampling(tree, logits_for(tree), SOFTMAX, context=ROOT, generator=generator).path) == 3
