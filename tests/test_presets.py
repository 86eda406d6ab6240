"""Methods by name: the sparsity they aim at and what they penalise."""

from __future__ import annotations

import pytest

from blockffn.presets import METHODS, RECIPES, SIZES, objective_terms_of, preset_config
from blockffn.training.config import train_settings


@pytest.mark.parametrize(("size", "tls"), [("0.1b", 79.17), ("0.5b", 85.0), ("0.8b", 83.33), ("1.2b", 82.14),
                                           ("mini", 79.17), ("nano", 81.25), ("3b", 79.69)])  # fmt: skip
def test_experts_per_token_give_the_published_sparsity(size: str, tls: float) -> None:
    config = preset_config(size, "topk")
    assert 100 * (1 - config.num_experts_per_tok / config.num_experts) == pytest.approx(tls, abs=5e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_size_and_method_has_settings_with_the_method_s_terms(size: str, method: str) -> None:
    settings = train_settings(size, method)
    assert settings.objectives.terms == objective_terms_of(size, method)
    assert settings.steps == RECIPES[size]["steps"]


@pytest.mark.parametrize(("method", "names"), [
    ("blockffn", {"activation_locality", "chunk_sparsification", "dead_experts"}), ("dense", set()),
    ("topk", {"load_balancing"}), ("deepseek", {"load_balancing"}), ("grin", {"load_balancing"}),
    ("remoe", {"balanced_l1"}), ("deco", {"router_entropy"}),
])  # fmt: skip
def test_a_method_penalises_what_its_paper_does(method: str, names: set[str]) -> None:
    assert set(train_settings("mini", method).objectives.terms) == names


def test_remoe_aims_at_the_sparsity_of_top_k() -> None:
    spec = train_settings("0.8b", "remoe").objectives.terms["balanced_l1"]
    assert spec == {"kind": "multiplicative", "initial": 1e-8, "target": pytest.approx(100 * 40 / 48), "factor": 1.05}


def test_decos_coefficient_has_the_same_range_in_a_run_of_any_length() -> None:
    for size in ("nano", "mini", "1.2b"):
        factor = train_settings(size, "deco").objectives.terms["router_entropy"]["factor"]
        assert factor ** RECIPES[size]["steps"] == pytest.approx(1.0015**20_000)


def test_changing_the_settings_leaves_the_tables_alone() -> None:
    before = objective_terms_of("mini", "blockffn")
    changes = {"objectives": {"terms": {"activation_locality": {"value": 9.0}, "chunk_sparsification": None}}}
    assert train_settings("0.1b", "blockffn", changes).objectives.terms == {
        "activation_locality": {"kind": "constant", "value": 9.0}
    }
    assert objective_terms_of("mini", "blockffn") == before


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown method 'topp'; did you mean 'topk'"):
        objective_terms_of("nano", "topp")
    with pytest.raises(ValueError, match="unknown size 'minni'; did you mean 'mini'"):
        objective_terms_of("minni", "topk")
