"""A simulated draft is right as often as it says, loses nothing, and costs what the head beside it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockffn.configuration import BlockFFNConfig
from blockffn.evaluation.decoding.oracle import BRANCHES, PASSAGE, OracleDrafter, PricedDrafter, random_eagle_head
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.drafters.eagle import eagle_drafter
from blockffn.inference.speculative.growth import BestNodes, Budget, Growth
from blockffn.inference.speculative.statistics import SpeculationStatistics
from blockffn.inference.speculative.tree import DraftTree
from blockffn.models.causal_lm import BlockFFNForCausalLM

VOCABULARY = 90
PROMPT = [5, 6, 7]


def text(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def oracle(rate: float, length: int = 3000, **growth: int) -> tuple[OracleDrafter, list[int]]:
    drafter = OracleDrafter(rate, vocab_size=VOCABULARY, growth=BestNodes(**growth))
    continuation = text(length)
    drafter.learn(PROMPT, continuation)
    drafter.start(torch.tensor(PROMPT))
    return drafter, [*PROMPT, *continuation]


def right_path(tree: DraftTree, following: list[int]) -> list[int]:
    """Nodes of the tree that are the text."""
    path, parent = [], -1
    for token in following:
        node = next((n for n in tree.children(parent) if int(tree.tokens[n]) == token), None)
        if node is None:
            return path
        path.append(node)
        parent = node
    return path


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_first_choice_is_right_at_the_rate_and_as_often_as_it_says(rate: float) -> None:
    drafter, whole = oracle(rate, 1500, top_k=1, depth=1, size=1)
    right, said = [], []
    for place in range(len(PROMPT), len(whole)):
        tree = drafter.propose(torch.tensor(whole[:place]), Budget(8, 8))
        right.append(float(int(tree.tokens[0]) == whole[place]))
        said.append(float(tree.log_probs[0].exp()))
    confident = [r for r, s in zip(right, said) if s > 0.7]
    assert sum(right) / len(right) == pytest.approx(rate, abs=0.04)
    assert sum(said) / len(said) == pytest.approx(rate, abs=0.04)
    assert sum(confident) / len(confident) == pytest.approx(sum(s for s in said if s > 0.7) / len(confident), abs=0.05)


def test_more_branches_hold_the_right_token_more_often() -> None:
    rates = []
    for branches in (1, 2, BRANCHES):
        drafter, whole = oracle(0.4, 400, top_k=branches, depth=1, size=branches)
        trees = [(drafter.propose(torch.tensor(whole[:place]), Budget(9, 9)), whole[place])
                 for place in range(3, len(whole))]  # fmt: skip
        rates.append(sum(token in tree.tokens.tolist() for tree, token in trees) / len(trees))
    assert rates[0] < rates[1] < rates[2]


def test_trees_keep_to_their_budget_and_nothing_right_hangs_below_a_wrong_node() -> None:
    drafter, whole = oracle(0.7, 400, top_k=4, depth=4, size=15)
    for place in range(3, 300):
        tree = drafter.propose(torch.tensor(whole[:place]), Budget(nodes=9, depth=3))
        assert len(tree) <= 9
        assert int(tree.depth.max()) <= 3
        siblings = {(p, t) for p, t in zip(tree.parent_list, tree.tokens.tolist())}
        on_path = set(right_path(tree, whole[place:]))
        wrong = [n for n, depth in enumerate(tree.depth.tolist())
                 if n not in on_path and int(tree.tokens[n]) == whole[place + depth - 1]]  # fmt: skip
        assert not wrong
        assert siblings


def test_equal_seeds_are_right_at_the_same_places_whatever_the_tree() -> None:
    small, whole = oracle(0.6, 300, top_k=1, depth=1, size=1)
    large, _ = oracle(0.6, 300, top_k=4, depth=4, size=20)
    for place in range(3, 200):
        context = torch.tensor(whole[:place])
        first = int(small.propose(context, Budget(1, 1)).tokens[0]) == whole[place]
        tree = large.propose(context, Budget(20, 4))
        assert first == (int(tree.tokens[tree.children(-1)[0]]) == whole[place])


def test_of_several_rates_each_is_that_of_a_passage_in_turn() -> None:
    drafter = OracleDrafter(0.9, 0.1, vocab_size=VOCABULARY, growth=BestNodes(top_k=1, depth=1, size=1))
    whole = [*PROMPT, *text(2000)]
    drafter.learn(PROMPT, whole[3:])
    drafter.start(torch.tensor(PROMPT))
    right: tuple[list[bool], list[bool]] = ([], [])
    for place in range(3, 1900):
        token = int(drafter.propose(torch.tensor(whole[:place]), Budget(1, 1)).tokens[0])
        right[place // PASSAGE % 2].append(token == whole[place])
    easy, hard = (sum(found) / len(found) for found in right)
    assert (easy, hard) == (pytest.approx(0.9, abs=0.05), pytest.approx(0.1, abs=0.05))


def test_what_is_priced_runs_on_the_levels_of_the_oracles_tree() -> None:
    calls: list[int] = []

    class Counting:
        """Grows as it is told and notes how many nodes it is asked to draft from."""

        deterministic = True

        def __init__(self, growth: Growth) -> None:
            self._growth = growth

        def start(self, prompt: Tensor) -> None: ...

        def observe(self, tokens: Tensor, hidden: Tensor) -> None: ...

        def propose(self, context: Tensor, budget: Budget) -> DraftTree:
            def expand(tree: DraftTree, nodes: list[int]) -> Tensor:
                calls.append(len(nodes))
                return torch.zeros(len(nodes), VOCABULARY).log_softmax(dim=-1)

            return self._growth(expand, budget, vocab_size=VOCABULARY)

    drafter, whole = oracle(0.8, 300, top_k=4, depth=4, size=20)
    priced = PricedDrafter(drafter, Counting)
    for place in range(3, 60):
        calls.clear()
        context = torch.tensor(whole[:place])
        tree = priced.propose(context, Budget(20, 4, least=0.3))
        assert tree.tokens.tolist() == drafter.propose(context, Budget(20, 4, least=0.3)).tokens.tolist()
        assert len(calls) >= int(tree.depth.max())
        assert sum(calls) >= len(set(tree.parent_list))


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_a_chain_in_one_call_is_that_of_its_levels_and_as_long_for_the_real_draft(least: float) -> None:
    class Network:
        def __init__(self) -> None:
            self.counts: list[int] = []

        def __call__(self, tree: DraftTree, nodes: list[int]) -> torch.Tensor:
            raise AssertionError("a chain is asked for at once")

        def chain(self, count: int, least: float) -> tuple[torch.Tensor, torch.Tensor]:
            self.counts.append(count)
            return torch.zeros(count, dtype=torch.int64), torch.zeros(count)

    oracle = OracleDrafter(0.6, vocab_size=50, growth=BestNodes(top_k=1, depth=5, size=5))
    oracle.learn([1, 2], list(range(3, 40)))
    oracle.start(torch.tensor([1, 2]))
    for length in range(2, 30):
        context, network, levels = torch.arange(1, length + 1), Network(), []
        ours = oracle.propose(context, Budget(9, 9, least), beside=network)

        def level(tree: DraftTree, nodes: list[int], levels: list[int] = levels) -> torch.Tensor:
            levels.append(len(nodes))
            return torch.zeros(len(nodes), 8)

        theirs = oracle.propose(context, Budget(9, 9, least), beside=level)
        assert (ours.tokens.tolist(), ours.parent_list) == (theirs.tokens.tolist(), theirs.parent_list)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        assert network.counts == [len(levels)]


def test_an_unknown_prompt_gets_trees_that_are_wrong() -> None:
    drafter, _ = oracle(0.9)
    drafter.start(torch.tensor([1, 2]))
    assert len(drafter.propose(torch.tensor([1, 2]), Budget(8, 4))) == 8
    assert len(drafter.propose(torch.tensor([1, 2]), Budget(0, 4))) == 0


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        OracleDrafter(rate, vocab_size=10)


def test_with_a_priced_oracle_the_text_is_the_plain_loops_and_the_acceptance_the_oracles() -> None:
    config = BlockFFNConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_experts=8, moe_intermediate_size=8,
        intermediate_size=64, num_attention_heads=2, attention_type="gqa", num_key_value_heads=1,
        max_position_embeddings=256,
    )  # fmt: skip
    model = BlockFFNForCausalLM(config).eval()
    target, settings = ModelTarget(model), GenerationSettings(max_new_tokens=60, temperature=0)
    plain = generate(target, PROMPT, settings).token_ids
    growth = BestNodes(top_k=4, depth=3, size=9)
    drafter = OracleDrafter(0.8, vocab_size=VOCABULARY, growth=growth)
    drafter.learn(PROMPT, plain)
    counts: list[SpeculationStatistics] = []
    head = random_eagle_head(config, dtype=torch.float32)
    for one in (drafter, PricedDrafter(drafter, lambda levels: eagle_drafter(head, model, growth=levels))):
        generation = speculative_generate(target, Speculation(one), PROMPT, settings)
        assert generation.token_ids == plain
        assert generation.statistics.speculation is not None
        counts.append(generation.statistics.speculation)
    assert counts[0] == counts[1]
    assert counts[0].verifications < 40
