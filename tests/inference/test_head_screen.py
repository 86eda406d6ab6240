"""A head that is screened gives the largest logits, and so the tokens, of the head read whole; bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn.inference.backends import make_target
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.head_screen import REST, SCREENS, HeadScreen, Screening
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.speculative.decode import Speculation, speculative_generate
from blockffn.inference.speculative.drafters.ngram import NgramDrafter
from blockffn.inference.target import Step, ask_best, prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops import native
from blockffn.ops.quantization import pack_linear, unpack_matrix
from tests.models.conftest import tiny_model

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")

VOCAB = 4500  # several stretches of strips for each thread, and no multiple of 32
PAIRS = [(head, screen) for head, screens in SCREENS.items() for screen in screens]
TREE = torch.tensor([-1, 0, 0, 1, 3])


def tiny(width: int = 64) -> BlockFFNForCausalLM:
    return tiny_model(
        "gqa", hidden_size=width, head_dim=16, vocab_size=VOCAB, tie_word_embeddings=False, max_position_embeddings=128
    )


def with_head(model: BlockFFNForCausalLM, head: Tensor) -> BlockFFNForCausalLM:
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    return model


def peaked(ids: Tensor, *, copies: int = 1) -> BlockFFNForCausalLM:
    """With a random head of rows that answer the states behind these tokens, as a trained one has; in copies."""
    model = tiny()
    head = torch.randn(VOCAB, 64)
    hidden = prefill(NativeTarget(model), ids).hidden.float()
    head[torch.randperm(VOCAB)[: len(ids)]] += 8 * hidden / hidden.norm(dim=-1, keepdim=True)
    head[torch.randperm(VOCAB)] = head[torch.arange(VOCAB) // copies * copies].clone()
    return with_head(model, head)


def steps(target: NativeTarget, ids: Tensor, best: int | None) -> tuple[Step, Step]:
    """One token, then a tree, behind a prompt."""
    target.reset()
    ask_best(target, best)
    prefill(target, ids[:-6])
    one = target.extend(ids[-6:-5])
    target.commit(torch.arange(1))
    tree = target.extend(ids[-5:], TREE)
    target.commit(torch.arange(1))
    return one, tree


def assert_exact(screened: Tensor, whole: Tensor, best: int) -> None:
    """The largest are there with their bits; all others are as ever or absent."""
    least = whole.topk(best, dim=-1).values[:, -1:]
    assert torch.equal(screened[whole >= least], whole[whole >= least])
    present = screened > -torch.inf
    assert torch.equal(screened[present], whole[present])


@pytest.mark.parametrize("best", [1, 3, 64])
@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_the_largest_logits_are_those_of_the_whole_head(format: str, screen: str, best: int) -> None:
    ids = torch.randint(0, VOCAB, (16,))
    target = NativeTarget(peaked(ids), format=format, head_format=format, screen_head=screen)
    for screened, whole in zip(steps(target, ids, best), steps(target, ids, None)):
        assert_exact(screened.logits, whole.logits, best)
        assert torch.equal(screened.hidden, whole.hidden)
        assert whole.head_share == 1.0
        assert screened.head_share is not None
        assert screened.head_share <= 1


@pytest.mark.parametrize(("format", "screen"), [pair for pair in PAIRS if pair[1] == "int4"])
def test_a_peaked_head_is_hardly_read(format: str, screen: str) -> None:
    ids = torch.randint(0, VOCAB, (16,))
    target = NativeTarget(peaked(ids), format=format, head_format=format, screen_head=screen)
    one, _ = steps(target, ids, 1)
    assert one.head_share is not None
    assert one.head_share < 0.2


@pytest.mark.parametrize("best", [1, 5])
@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_what_the_screen_cannot_tell_apart_is_decided_exactly(format: str, screen: str, best: int) -> None:
    """Rows differ by less than the screen's rounding, in the direction of the state."""
    model = tiny()
    ids = torch.randint(0, VOCAB, (16,))
    hidden = prefill(NativeTarget(model), ids[:-5]).hidden[-1].float()
    codes = torch.randint(-7, 8, (1, 64)).float()
    codes[0, 0] = -8  # the scale is 1
    nudge = torch.rand(VOCAB, 1) * hidden.sign()
    nudge[:, 0] = 0
    head = codes + (0.4 if screen == "int4" else 0.02) * nudge
    target = NativeTarget(with_head(model, head), format=format, head_format=format, screen_head=screen)
    for screened, whole in zip(steps(target, ids, best), steps(target, ids, None)):
        assert_exact(screened.logits, whole.logits, best)


@pytest.mark.parametrize("outlier", [0, 70, 159])
@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_what_rounding_the_state_hides_is_decided_exactly(format: str, screen: str, outlier: int) -> None:
    """The screen has the head's own rows, but beside an outlier its products hardly see the rest of the state."""
    model = tiny(160)  # groups of 64, the last of them half empty
    with torch.no_grad():
        model.model.norm.weight[outlier] = 3000.0
    ids = torch.randint(0, VOCAB, (16,))
    head = torch.randint(-7, 8, (VOCAB, 160)).float()
    head[:, ::64] = -8  # the scale is 1
    head[:, outlier] = 0 if outlier % 64 else -8
    target = NativeTarget(with_head(model, head), format=format, head_format=format, screen_head=screen)
    for screened, whole in zip(steps(target, ids, 1), steps(target, ids, None)):
        assert_exact(screened.logits, whole.logits, 1)


@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_of_a_state_of_several_groups_nothing_but_the_answers_strip_is_read(format: str, screen: str) -> None:
    """The answers lie in the last strip; an outlier makes the scales of groups differ."""
    model = tiny(160)
    with torch.no_grad():
        model.model.norm.weight[70] = 20.0
    ids = torch.randint(0, VOCAB, (16,))
    hidden = prefill(NativeTarget(model), ids).hidden.float()
    head = torch.randn(VOCAB, 160)
    head[:, 70] = 0
    head[-16:] = 8 * hidden / hidden.norm(dim=-1, keepdim=True)
    target = NativeTarget(with_head(model, head), format=format, head_format=format, screen_head=screen)
    one, _ = steps(target, ids, 1)
    assert one.head_share == pytest.approx(32 / (-(-VOCAB // 32) * 32))


@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_equal_rows_all_stay(format: str, screen: str) -> None:
    ids = torch.randint(0, VOCAB, (16,))
    target = NativeTarget(peaked(ids, copies=9), format=format, head_format=format, screen_head=screen)
    for screened, whole in zip(steps(target, ids, 4), steps(target, ids, None)):
        assert_exact(screened.logits, whole.logits, 4)


@pytest.mark.parametrize("extreme", [0.0, 1e-30, 1e4])
def test_heads_of_any_scale_are_exact(extreme: float) -> None:
    ids = torch.randint(0, VOCAB, (16,))
    model = with_head(tiny(), extreme * torch.randn(VOCAB, 64))
    target = NativeTarget(model, format="bf16", head_format="bf16", screen_head="int4")
    for screened, whole in zip(steps(target, ids, 1), steps(target, ids, None)):
        assert_exact(screened.logits, whole.logits, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 3.0, "top_k": 40, "top_p": 0.6, "min_p": 0.01},
        {"temperature": 0.9, "top_k": 100},
        {"temperature": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize(("format", "screen"), [("bf16", "int4"), ("bf16", "int8"), ("int8", "int4")])
def test_tokens_are_those_of_an_unscreened_target(format: str, screen: str, settings: dict[str, Any]) -> None:
    ids = torch.randint(0, VOCAB, (16,))
    model = peaked(ids)
    asked = GenerationSettings(max_new_tokens=24, **settings)
    plain = generate(NativeTarget(model, format=format, head_format=format), ids.tolist(), asked)
    screened_target = NativeTarget(model, format=format, head_format=format, screen_head=screen)
    screened = generate(screened_target, ids.tolist(), asked)
    assert screened.token_ids == plain.token_ids
    speculated = speculative_generate(screened_target, Speculation(NgramDrafter()), ids.tolist(), asked)
    assert speculated.token_ids == plain.token_ids
    assert plain.statistics.head_share is None
    decides = settings.get("repetition_penalty", 1) == 1 and (
        settings["temperature"] == 0 or 0 < settings.get("top_k", 0) <= native.MAX_BEST
    )
    assert screened.statistics.head_share is not None
    assert decides or screened.statistics.whole_heads == screened.statistics.steps


@pytest.mark.parametrize("structure", ["random", "ties", "all equal"])
@pytest.mark.parametrize("screen", [None, "int4"])
def test_choices_are_the_first_largest_logits(screen: str | None, structure: str) -> None:
    ids = torch.randint(0, VOCAB, (9,))
    head = torch.randn(VOCAB, 64) if structure == "random" else torch.randn(3, 64).repeat(-(-VOCAB // 3), 1)[:VOCAB]
    target = NativeTarget(with_head(tiny(), torch.ones(VOCAB, 64) if structure == "all equal" else head),
                          format="bf16", head_format="bf16", screen_head=screen)  # fmt: skip
    for asked in (1, 2, None):
        target.reset()
        target.ask_best(asked)
        step = target.extend(ids)
        assert (step.choices is None) == (asked != 1)
        if step.choices is not None:
            assert step.choices == step.logits.argmax(dim=-1).tolist()


def test_a_head_without_structure_is_read_whole_after_a_few_steps() -> None:
    ids = torch.randint(0, VOCAB, (8,)).tolist()
    model = with_head(tiny(), torch.ones(VOCAB, 64))
    target = NativeTarget(model, format="bf16", head_format="bf16", screen_head="int4")
    asked = GenerationSettings(max_new_tokens=REST, temperature=0.0)
    statistics = generate(target, ids, asked).statistics
    assert statistics.whole_heads > REST // 2


def test_screening_rests_where_it_does_not_pay_and_is_tried_again() -> None:
    screening = Screening(0.3)
    screening.ask(1)
    for _ in range(100):
        assert screening.num_exact() == 1
        screening.observe(0.1)
    while screening.num_exact():
        screening.observe(1.0)
    assert [screening.num_exact() for _ in range(REST - 1)] == [0] * (REST - 1)
    assert screening.num_exact() == 1
    screening.observe(0.9)
    assert screening.num_exact() == 0


def test_all_logits_are_there_unless_few_are_asked_for() -> None:
    target = NativeTarget(tiny(), format="bf16", head_format="bf16", screen_head="int8")
    assert target.extend(torch.tensor([5])).logits.isfinite().all()
    for best in (None, native.MAX_BEST + 1):
        target.reset()
        target.ask_best(best)
        assert target.extend(torch.tensor([5])).logits.isfinite().all()


@pytest.mark.parametrize(("format", "screen"), PAIRS)
def test_the_errors_of_a_screen_are_those_of_its_rows(format: str, screen: str) -> None:
    head = pack_linear(torch.randn(4200, 50), format=format)
    copy = HeadScreen.of(head, screen, group_size=64)
    difference = head.unpack() - unpack_matrix(copy.matrix.data, copy.matrix.layout)
    norms = copy.errors.transpose(0, 1).flatten(1)
    for actual, expected in zip(norms, (difference.norm(dim=-1), head.unpack().norm(dim=-1))):
        torch.testing.assert_close(actual[:4200], expected)
        assert not actual[4200:].any()


@pytest.mark.parametrize(("format", "screen"), [("int4", "int4"), ("int4", "int8"), ("int8", "int8"), ("bf16", "bf16")])
def test_a_screen_no_smaller_than_the_head_is_refused(format: str, screen: str) -> None:
    with pytest.raises(ValueError, match=f"a head in {format} cannot be screened in '{screen}'"):
        NativeTarget(tiny(), format=format, head_format=format, screen_head=screen)


def test_backends_without_a_screen_refuse_it() -> None:
    with pytest.raises(ValueError, match="only the native backend screens its head"):
        make_target(tiny(), backend="model", screen_head="int8")
