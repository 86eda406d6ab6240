from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.sparsify.convert import EveryExpert, Regrouping, regroup
from blockffn.sparsify.dense import from_llama
from blockffn.sparsify.layer import Neurons, expert_outputs, fit_router, refit_down, ridge, routed
from blockffn.sparsify.passages import read_passages
from blockffn.sparsify.receipt import compare
from tests.sparsify.conftest import MakeLlama


def sparse(
    make_llama: MakeLlama, text: Path, **wanted: object
) -> tuple[BlockFFNForCausalLM, BlockFFNForCausalLM, list]:
    dense = from_llama(make_llama())
    calibration = read_passages(text, "train", length=64, num_tokens=1024)
    held_out = read_passages(text, "valid", length=64, num_tokens=256)
    return dense, *regroup(dense, Regrouping(**{"num_experts": 6, **wanted}), calibration, held_out)


@pytest.mark.parametrize("tied", [False, True])
def test_all_gated_experts_together_are_the_dense_model(make_llama: MakeLlama, text: Path, tied: bool) -> None:
    dense = from_llama(make_llama(tie_word_embeddings=tied))
    passages = read_passages(text, "train", length=64, num_tokens=512)
    model, stages = regroup(dense, Regrouping(6, gated=True), passages, passages)
    assert stages[0].name == "regrouped"
    assert stages[0].difference < 1e-5
    assert stages[0].divergence < 1e-6
    assert model.config.tie_word_embeddings == tied


def test_routing_starts_at_the_wanted_sparsity(make_llama: MakeLlama, text: Path) -> None:
    for tls in (30.0, 70.0):
        _, _, stages = sparse(make_llama, text, tls=tls)
        assert stages[1].tls == pytest.approx(tls, abs=6)


def test_less_sparsity_costs_less(make_llama: MakeLlama, text: Path) -> None:
    divergences = [sparse(make_llama, text, tls=tls)[2][1].divergence for tls in (20.0, 80.0)]
    assert 0 < divergences[0] < divergences[1]


def test_plain_experts_have_no_gates_and_come_close(make_llama: MakeLlama, text: Path) -> None:
    dense, model, stages = sparse(make_llama, text, gated=False)
    assert model.model.layers[0].mlp.routed_experts.gate_proj is None
    zeroed = BlockFFNForCausalLM(model.config).eval()
    zeroed.load_state_dict(model.state_dict())
    for layer in zeroed.model.layers:
        layer.mlp.router = EveryExpert(6)
        layer.mlp.routed_experts.down_proj.data.zero_()
    passages = read_passages(text, "valid", length=64, num_tokens=256)
    assert stages[0].difference < compare("zero", dense, zeroed, passages).difference


def test_the_dense_model_is_left_as_it_was(make_llama: MakeLlama, text: Path) -> None:
    dense, model, _ = sparse(make_llama, text)
    fresh = from_llama(make_llama())
    for (name, left), right in zip(dense.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(left, right), name
    assert model.lm_head.weight.data_ptr() != dense.lm_head.weight.data_ptr()


def test_a_width_that_does_not_divide_is_refused_with_numbers_that_do(make_llama: MakeLlama, text: Path) -> None:
    with pytest.raises(ValueError, match="48 neurons cannot be split into 7 equal experts; near are 3, 4, 6, 8"):
        sparse(make_llama, text, num_experts=7)


def test_a_sparsity_beyond_percent_is_refused(make_llama: MakeLlama, text: Path) -> None:
    with pytest.raises(ValueError, match="between 0 and 100, got 100"):
        sparse(make_llama, text, tls=100.0)


def test_parts_add_up_to_the_whole() -> None:
    neurons = Neurons(torch.randn(12, 5), torch.randn(12, 5), torch.randn(12, 5))
    x = torch.randn(7, 5)
    whole = neurons.activations(x) @ neurons.down_ND
    torch.testing.assert_close(expert_outputs(neurons, x, 3).sum(dim=1), whole, rtol=1e-5, atol=1e-5)


def test_refitted_rows_come_closer() -> None:
    neurons = Neurons(torch.randn(24, 8), torch.randn(24, 8), torch.randn(24, 8))
    x = torch.randn(200, 8) + 1
    target = neurons.activations(x) @ neurons.down_ND
    router = fit_router(neurons, x, 4, tls=50, eps=1e-5)
    weights = routed(x, router.proj_ED, 1e-5) * router.scale_E

    def error(down: torch.Tensor) -> float:
        activations = neurons.activations(x).unflatten(-1, (4, -1)) * weights.unsqueeze(-1)
        return float((activations.flatten(1) @ down - target).norm() / target.norm())

    assert error(refit_down(neurons, x, weights, target)) < 0.9 * error(neurons.down_ND)


def test_ridge_recovers_a_linear_map_and_stays_near_where_inputs_say_nothing() -> None:
    inputs, matrix = torch.randn(50, 3), torch.randn(3, 2)
    torch.testing.assert_close(ridge(inputs, inputs @ matrix, strength=1e-9), matrix, rtol=1e-4, atol=1e-4)
    start = torch.randn(3, 2)
    torch.testing.assert_close(ridge(torch.zeros(4, 3), torch.zeros(4, 2), near=start), start)
