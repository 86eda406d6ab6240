"""The plain loop and batches against Hugging Face's `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockffn.inference.batch import decode_batch
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from tests.models.conftest import ATTENTION, tiny_model

GREEDY = GenerationSettings(max_new_tokens=24, temperature=0.0)


@pytest.mark.parametrize("method", ["blockffn", "dense", "topk", "remoe", "deco"])
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_greedy_text_is_that_of_hugging_face(attention: str, method: str) -> None:
    model: Any = tiny_model(attention, method)
    target = ModelTarget(model, chunk_size=4)
    for length in (1, 9):
        prompt = torch.randint(3, 61, (length,)).tolist()
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=24,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        generation = generate(target, prompt, GREEDY)
        assert prompt + generation.token_ids == expected[0].tolist()
        assert generation.finish_reason == "length"


def test_text_ends_with_an_end_token_or_when_the_receiver_wants_no_more() -> None:
    target = ModelTarget(tiny_model())
    free = generate(target, [5, 6], GREEDY).token_ids
    third = free[2]
    until = free[: free.index(third) + 1]
    ended = generate(target, [5, 6], GenerationSettings(max_new_tokens=24, temperature=0.0, eos_token_ids=(third,)))
    assert (ended.token_ids, ended.finish_reason) == (until, "eos")
    seen: list[int] = []

    def take(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    stopped = generate(target, [5, 6], GREEDY, on_token=take)
    assert (stopped.token_ids, stopped.finish_reason) == (free[:4], "stop")
    assert seen == free[:4]


def test_a_sample_is_decided_by_its_seed() -> None:
    target = ModelTarget(tiny_model())
    texts = [
        generate(target, [5], GenerationSettings(max_new_tokens=12, temperature=1.0, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("prompt", "new", "message"), [
    ([], 4, "the prompt has no tokens"),
    ([5, 61], 4, "token 61 of the prompt is outside the vocabulary of 61"),
    ([5] * 10, 56, "10 prompt tokens and 56 new ones exceed the cache's capacity of 64; ask for at most 55"),
    ([5], 0, "max_new_tokens must be at least 1"),
])  # fmt: skip
def test_a_request_that_cannot_be_served_is_refused_before_any_work(prompt: list[int], new: int, message: str) -> None:
    target = ModelTarget(tiny_model())
    target.extend(torch.tensor([1]))
    with pytest.raises(ValueError, match=message):
        generate(target, prompt, GenerationSettings(max_new_tokens=new))
    with pytest.raises(ValueError, match=message):
        decode_batch(target.forward, [[5], prompt], GenerationSettings(max_new_tokens=new), capacity=64)
    target.commit(torch.arange(1))  # still pending: nothing has touched the cache


def test_a_diverged_model_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's output is not a number"):
        generate(ModelTarget(model), [5], GREEDY)


@torch.no_grad()
def test_statistics_count_what_the_steps_used() -> None:
    model = tiny_model(num_experts=9)
    generation = generate(ModelTarget(model), [5, 6, 7], GREEDY)
    statistics = generation.statistics
    assert (statistics.prompt_tokens, statistics.new_tokens, statistics.steps) == (3, 24, 23)
    ids = torch.tensor([[5, 6, 7, *generation.token_ids]])
    active = torch.stack([(r.weights[0, 3:-1] != 0).sum(-1) for r in model(ids, output_routing=True).routings])
    assert statistics.active_experts == pytest.approx(active.double().mean().item())
    assert statistics.union_experts == statistics.active_experts
    of_model = statistics.of_model(model.config, bits_per_weight=32)
    assert of_model.tls == pytest.approx(100 * (1 - active.double().mean().item() / 9))
    assert of_model.weight_bytes_per_token is not None
    assert 0 < of_model.weight_bytes_per_token < sum(p.nbytes for p in model.parameters())
    assert statistics.seconds > 0


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GenerationSettings(max_new_tokens=9, temperature=1.0, seed=3),
        GenerationSettings(
            max_new_tokens=20, temperature=0.0, repetition_penalty=1.3, eos_token_ids=(1, 2, 3, 4, 5, 6, 7)
        ),
    ],
)
@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_a_batch_gives_each_prompt_what_it_gets_alone(attention: str, settings: GenerationSettings) -> None:
    model = tiny_model(attention)
    target = ModelTarget(model)
    prompts = [torch.randint(8, 61, (length,)).tolist() for length in (9, 1, 14, 5)]
    batch = decode_batch(target.forward, prompts, settings, capacity=64)
    for i, (prompt, generation) in enumerate(zip(prompts, batch, strict=True)):
        own = GenerationSettings(**{**vars(settings), "seed": settings.seed + i})
        alone = generate(target, prompt, own)
        assert generation.token_ids == alone.token_ids
        assert generation.finish_reason == alone.finish_reason


def test_a_sequence_of_a_batch_can_be_stopped_alone() -> None:
    target = ModelTarget(tiny_model())
    count = [0, 0]

    def take(number: int, token: int) -> bool:
        count[number] += 1
        return number == 0 and count[0] == 3

    first, second = decode_batch(target.forward, [[5], [6, 7]], GREEDY, capacity=64, on_token=take)
    assert (len(first.token_ids), first.finish_reason) == (3, "stop")
    assert (len(second.token_ids), second.finish_reason) == (24, "length")
    assert second.statistics.sequences == pytest.approx((2 * 2 + 21) / 23)
