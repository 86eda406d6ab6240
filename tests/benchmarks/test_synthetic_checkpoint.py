"""A synthetic model is a model that loads, with the sparsity asked for, and does not talk in circles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from synthetic_checkpoint import CONVERTED, config_of, make_sample, summary, write_checkpoint  # noqa: E402
from synthetic_routing import local_router, locality  # noqa: E402

from blockffn.checkpoints.load import load  # noqa: E402
from blockffn.configuration import BlockFFNConfig  # noqa: E402
from blockffn.inference.decode import GenerationSettings, generate  # noqa: E402
from blockffn.inference.model_target import ModelTarget  # noqa: E402
from blockffn.metrics.cost import parameter_counts  # noqa: E402

WIDTH, VOCABULARY = 384, 600
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_experts": 24,
    "moe_intermediate_size": 8, "intermediate_size": 136, "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MLA = {"attention_type": "mla", "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
       "qk_rope_head_dim": 16, "v_head_dim": 16}  # fmt: skip
GQA = {"attention_type": "gqa", "num_key_value_heads": 1, "head_dim": 32}
GATED = GQA | {"expert_gated": True, "intermediate_size": 24 * 8}  # of the twin: all experts together


def text(length: int = 12_000) -> torch.Tensor:
    """Ids with the frequencies of a text: few common, many rare."""
    ranks = torch.arange(1, 501).float().reciprocal()
    return torch.multinomial(ranks, length, replacement=True, generator=torch.Generator().manual_seed(1))


def states(*, rows: int = 40, length: int = 64) -> torch.Tensor:
    """A common part, one that changes slowly in some directions, and noise."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(rows, length, WIDTH, generator=generator)
    steps = torch.randn(rows, length + 32, 8, generator=generator).cumsum(dim=1)
    slow = (steps[:, 32:] - steps[:, :-32]) / 32**0.5 @ torch.randn(8, WIDTH, generator=generator)
    return 8 * torch.ones(WIDTH) + 0.4 * slow + noise


def router(x: torch.Tensor, *, tls: float = 80, cls8: float = 60) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    return local_router(x[::2], x[1::2], num_experts=32, tls=tls, cls8=cls8, generator=generator)


def test_a_router_has_the_sparsity_asked_for_also_on_states_that_it_was_not_made_from() -> None:
    x = states(rows=60)
    weight, _ = router(x[:40])
    achieved = locality(x[1:40:2], weight)
    assert achieved["tls"] == pytest.approx(80, abs=0.5)
    assert achieved["cls8"] == pytest.approx(60, abs=0.5)
    assert achieved["cls32"] < 60
    others = locality(x[40:], weight)
    assert others["tls"] == pytest.approx(80, abs=5)
    assert others["cls8"] == pytest.approx(60, abs=8)


def test_more_is_shared_by_neighbours_where_more_is_asked_for() -> None:
    x = states()
    routers = [router(x, cls8=cls8) for cls8 in (50, 57, 64)]
    assert [round(locality(x[1::2], weight)["cls8"]) for weight, _ in routers] == [50, 57, 64]
    assert routers[0][1] < routers[1][1] < routers[2][1]


@pytest.mark.parametrize(("tls", "cls8"), [(80, 85), (100, 70), (80, 0)])
def test_sparsity_that_no_routing_has_is_refused(tls: float, cls8: float) -> None:
    with pytest.raises(ValueError, match="CLS8 <= TLS"):
        router(states(rows=4), tls=tls, cls8=cls8)


def test_states_without_a_common_direction_are_refused() -> None:
    with pytest.raises(ValueError, match="no common direction"):
        router(torch.randn(4, 64, 8))


def test_every_token_has_one_successor_and_the_text_is_one_round_of_its_tokens() -> None:
    ids = text()
    sample = make_sample(ids, VOCABULARY, rows=4, length=64, generator=torch.Generator().manual_seed(0))
    assert sample.successor.sort().values.equal(torch.arange(VOCABULARY))
    first = list(dict.fromkeys(ids.tolist()))
    assert [int(sample.successor[token]) for token in first] == first[1:] + first[:1]
    assert sample.ids.shape == (4, 64)
    assert sample.ids[:, sample.text :].equal(sample.successor[sample.ids[:, sample.text - 1 : -1]])
    with pytest.raises(ValueError, match="tokens of text"):
        make_sample(ids[:100], VOCABULARY, rows=4, length=64, generator=torch.Generator())


@pytest.mark.parametrize("size", sorted(CONVERTED))
def test_experts_of_a_dense_models_shape_are_its_ffn_in_parts(size: str) -> None:
    sparse, dense = (config_of(size, method, context=512) for method in ("blockffn", "dense"))
    assert sparse.expert_gated
    assert sparse.num_experts * sparse.moe_intermediate_size == dense.intermediate_size
    routers = sparse.num_hidden_layers * sparse.num_experts * (sparse.hidden_size + 1)
    assert parameter_counts(sparse).total == parameter_counts(dense).total + routers


@pytest.mark.parametrize("attention", [MLA, GQA, GATED], ids=["mla", "gqa", "gated"])
def test_a_written_model_loads_with_its_sparsity_and_says_what_its_dense_twin_says(
    attention: dict[str, object], tmp_path: Path
) -> None:
    said, counts = [], []
    for method in ("moe", "dense"):
        config = BlockFFNConfig(**SIZES | attention, ffn_type=method)  # type: ignore[arg-type]
        reports = list(write_checkpoint(tmp_path / method, config, text(), tls=75, cls8=50, rows=32, length=96))
        model = load(tmp_path / method)
        counts.append(parameter_counts(model.config).total)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        generation = generate(ModelTarget(model), text()[60:120].tolist(), GenerationSettings(max_new_tokens=60))
        said.append(generation.token_ids)
        if method == "moe":
            achieved = summary(reports)
            assert achieved["written_tls"] == pytest.approx(75, abs=6)
            assert achieved["written_cls8"] == pytest.approx(50, abs=10)
            statistics = generation.statistics.of_model(model.config, bits_per_weight=16)
            assert statistics.tls == pytest.approx(75, abs=15)
    assert said[0] == said[1]
    assert len(set(said[0])) == 60
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
