"""The native draft against the PyTorch draft: one network, two plans of running it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.drafts import make_drafter, trained_drafter
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_draft import NativeDraft
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.drafters.eagle import EagleDrafter, eagle_drafter
from blockffn.inference.speculative.drafters.native_eagle import NativeEagleDrafter
from blockffn.inference.speculative.growth import BestNodes, Budget, DrawnNodes, Growth
from blockffn.inference.speculative.tree import DraftTree
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.models.moe import BlockFFN
from blockffn.ops import native
from tests.models.conftest import ATTENTION, tiny_model

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")

SIZES = {"vocab_size": 333, "hidden_size": 64, "scale_emb": 3.0, "dim_model_base": 16, "max_position_embeddings": 256}
CLOSE = {"atol": 5e-3, "rtol": 5e-3}  # float32 in another order, through several steps of steep networks
REDUCED = torch.randperm(333, generator=torch.Generator().manual_seed(5))[:150]
TREES = [BestNodes(), BestNodes(top_k=8, depth=5, size=31), BestNodes(top_k=1, depth=9, size=9)]


def a_model(attention: str = "gqa", **options: Any) -> BlockFFNForCausalLM:
    return tiny_model(attention, **(SIZES | options))


def a_draft(model: BlockFFNForCausalLM, *, token_ids: Tensor | None = None, layers: int = 1) -> DraftModel:
    """A random draft that is sure of some tokens, so that its tree is deep."""
    sizes = {"num_hidden_layers": layers, "attention_type": "gqa", "ffn_type": "dense", "head_dim": 16}
    config = type(model.config).from_dict(model.config.to_dict() | sizes)
    config._attn_implementation = "eager"
    draft = DraftModel(config, token_ids=token_ids).eval()
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, std=0.3)
    return draft


def both(draft: DraftModel, model: BlockFFNForCausalLM, growth: Growth, **options: Any) -> list[Any]:
    target = NativeTarget(model, **options)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    network = NativeDraft(draft, model, target.weights, capacity=target.capacity)
    return [
        NativeEagleDrafter(network, growth=growth, generator=generators[0]),
        eagle_drafter(draft, model, growth=growth, generator=generators[1]),
    ]


def propose(drafters: list[Any], rounds: list[int]) -> list[list[DraftTree]]:
    """The trees of each drafter behind a random text that grows by so many tokens a round."""
    tokens, hidden = torch.randint(0, 333, (sum(rounds) + 1,)), torch.randn(sum(rounds), 64)
    found = []
    for drafter in drafters:
        drafter.start(tokens[: rounds[0]])
        trees, end = [], 0
        for new in rounds:
            drafter.observe(tokens[end : end + new], hidden[end : end + new])
            end += new
            trees.append(drafter.propose(tokens[: end + 1], Budget(63, 16)))
        found.append(trees)
    return found


def assert_same_trees(ours: DraftTree, theirs: DraftTree) -> None:
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.parent_list == theirs.parent_list
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, **CLOSE)


@pytest.mark.parametrize("token_ids", [None, REDUCED], ids=["all tokens", "reduced vocabulary"])
@pytest.mark.parametrize("growth", TREES, ids=["published", "wide", "chain"])
def test_trees_equal_those_of_the_pytorch_draft(growth: Growth, token_ids: Tensor | None) -> None:
    torch.manual_seed(1)
    model = a_model()
    found = propose(both(a_draft(model, token_ids=token_ids), model, growth), [7, 1, 3, 2, 70, 1])
    for ours, theirs in zip(*found):
        assert len(ours) > 8
        assert_same_trees(ours, theirs)


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_a_draft_of_two_layers_behind_a_long_prompt_and_any_target(attention: str) -> None:
    torch.manual_seed(2)
    model = a_model(attention)
    found = propose(both(a_draft(model, layers=2, token_ids=REDUCED), model, BestNodes()), [130, 4])
    for ours, theirs in zip(*found):
        assert_same_trees(ours, theirs)


def test_all_logits_where_nodes_are_drawn() -> None:
    torch.manual_seed(3)
    model = a_model()
    found = propose(both(a_draft(model, token_ids=REDUCED), model, DrawnNodes()), [5, 2])
    for ours, theirs in zip(*found):
        assert_same_trees(ours, theirs)
        assert ours.distributions is not None
        assert theirs.distributions is not None
        torch.testing.assert_close(ours.distributions, theirs.distributions, **CLOSE)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_packed_formats_come_close(format: str) -> None:
    torch.manual_seed(4)
    model = a_model()
    draft = copying_draft(model, token_ids=REDUCED)  # errors of random networks this small grow large
    target = NativeTarget(model, format=format)
    network = NativeDraft(draft, model, target.weights, capacity=99)
    exact = NativeDraft(draft, model, NativeTarget(model, format="f32").weights, capacity=99)
    tokens, states = torch.randint(0, 333, (9,)), torch.randn(9, 64)
    results = [each.run(tokens, states, length=0, num_logits=9) for each in (network, exact)]
    assert error(results[0][0], results[1][0]) < {"bf16": 0.02, "int8": 0.05, "int4": 0.25}[format]
    assert error(results[0][1], results[1][1]) < {"bf16": 0.03, "int8": 0.06, "int4": 0.3}[format]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_the_best_tokens_are_those_of_all_logits() -> None:
    torch.manual_seed(5)
    model = a_model(vocab_size=9001)
    target = NativeTarget(model)
    network = NativeDraft(a_draft(model), model, target.weights, capacity=50)
    tokens, states = torch.randint(0, 333, (6,)), torch.randn(6, 64)
    logits = network.run(tokens, states, length=0, num_logits=4)[1].clone()
    _, values, indices = network.run(tokens, states, length=0, num_logits=4, num_best=64)
    expected = logits.log_softmax(dim=-1).topk(64)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_states_that_are_no_numbers_give_no_tree() -> None:
    model = a_model()
    drafter = both(a_draft(model), model, BestNodes())[0]
    drafter.start(torch.arange(3))
    drafter.observe(torch.arange(3), torch.full((3, 64), torch.nan))
    assert len(drafter.propose(torch.arange(4), Budget(9, 9))) == 0


def test_it_runs_beside_a_native_target_alone() -> None:
    model = a_model()
    draft = a_draft(model)
    assert isinstance(make_drafter(model, draft, size=9, target=NativeTarget(model)), NativeEagleDrafter)
    assert isinstance(make_drafter(model, draft, size=9, target=ModelTarget(model)), EagleDrafter)
    assert isinstance(make_drafter(model, draft, size=9), EagleDrafter)


def test_its_precision_is_the_targets() -> None:
    model = a_model()
    drafter = trained_drafter(a_draft(model), model, NativeTarget(model, format="int4"))
    assert isinstance(drafter, NativeEagleDrafter)
    description = drafter.draft.description
    assert (description.fusion.format, description.head.format) == (native.FORMATS["int4"], native.FORMATS["int4"])
    assert description.cache_format == native.FORMATS["bf16"]


@pytest.mark.parametrize("least", [0.0, 0.3, 1.0])
def test_a_chain_in_one_call_is_that_of_its_levels(least: float) -> None:
    torch.manual_seed(6)
    model = a_model()
    ours, theirs = both(a_draft(model, token_ids=REDUCED), model, BestNodes(top_k=1, depth=6, size=6))
    tokens, hidden = torch.randint(0, 333, (90,)), torch.randn(89, 64)
    found = []
    for drafter in (ours, theirs):
        drafter.start(tokens[:89])
        drafter.observe(tokens[:89], hidden)
        found.append(drafter.propose(tokens, Budget(nodes=5, depth=9, least=least)))
    assert_same_trees(*found)
    assert found[0].parent_list == list(range(-1, len(found[0]) - 1))
    assert ours.draft.runs == 1 + len(found[0])  # the context takes two steps


def test_misuse_is_refused() -> None:
    model = a_model()
    network = NativeDraft(a_draft(model), model, NativeTarget(model).weights, capacity=20)
    drafter = NativeEagleDrafter(network, growth=BestNodes(top_k=20, depth=6, size=63))
    with pytest.raises(ValueError, match="needs the states of 3, got 0"):
        drafter.propose(torch.arange(4), Budget(9, 9))
    drafter.observe(torch.arange(3), torch.randn(3, 64))
    with pytest.raises(ValueError, match="trees of 64"):
        drafter.propose(torch.arange(4), Budget(63, 9))
    states = torch.zeros(1, 64)
    for wrong in ({"tokens": torch.tensor([333])}, {"length": 84}, {"num_best": 65}):
        arguments: dict[str, Any] = {"tokens": torch.tensor([1]), "length": 0, "num_logits": 1} | wrong
        with pytest.raises(ValueError, match="cannot run 1 tokens"):
            network.run(arguments.pop("tokens"), states, **arguments)
    for count, length in ((0, 0), (6, 79)):
        with pytest.raises(ValueError, match=f"behind {length} and {count} drafts"):
            network.run_chain(torch.tensor([1]), states, length=length, count=count)
    assert len(network.run_chain(torch.tensor([1]), states, length=79, count=5)[0]) == 5


@pytest.mark.parametrize("seed", range(24))
def test_native_speculation_says_what_plain_decoding_says(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = a_model(rng.choice(sorted(ATTENTION)), initializer_range=0.5)
    token_ids = rng.choice([None, REDUCED])
    draft = rng.choice([a_draft, copying_draft])(model, token_ids=token_ids)
    prompt = [rng.randrange(333) for _ in range(rng.choice([1, 5, 80]))]
    settings = GenerationSettings(
        max_new_tokens=rng.choice([1, 2, 25]), temperature=rng.choice([0.0, 0.0, 0.8]), top_k=rng.choice([0, 4]),
        repetition_penalty=rng.choice([1.0, 1.2]), seed=seed, eos_token_ids=rng.choice([(), (7, 8, 9)]),
    )  # fmt: skip
    # No room beyond the text: trees shrink at its end.
    target = NativeTarget(model, capacity=len(prompt) + settings.max_new_tokens - 1 + rng.choice([0, 9]))
    size, branches = rng.choice([1, 6, 31, 63]), rng.choice([8, 8, 1])
    speculation = Speculation(make_drafter(model, draft, size=size, branches=branches, target=target))
    plain = generate(target, prompt, settings)
    for _ in range(2):
        decoded = speculative_generate(target, speculation, prompt, settings)
        assert (decoded.token_ids, decoded.finish_reason) == (plain.token_ids, plain.finish_reason)


def copying_draft(model: BlockFFNForCausalLM, *, token_ids: Tensor | None) -> DraftModel:
    """A draft that passes the target's states on: it guesses that the last token comes again."""
    draft = a_draft(model, token_ids=token_ids)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(0.05 if parameter.dim() > 1 else 1.0)
        draft.fc.weight[:, 64:] += torch.eye(64)
    return draft


def test_thresholds_of_the_target_do_not_matter_to_its_draft() -> None:
    model = a_model()
    drafters = both(a_draft(model), model, BestNodes())
    for module in model.modules():
        if isinstance(module, BlockFFN):
            module.threshold = 9.0
    ours, theirs = propose(drafters, [5])
    assert_same_trees(ours[0], theirs[0])
