from __future__ import annotations

import ablation
import pytest
import quality

from blockffn.experiments.suite import NO_CHUNKS, NO_LOCALITY, Experiment
from blockffn.metrics.cost import parameter_counts
from blockffn.presets import METHODS, SIZES, preset_config
from blockffn.settings import parse_overrides
from blockffn.training.config import TrainSettings, train_settings


def settings_of(experiment: Experiment) -> TrainSettings:
    return train_settings(experiment.size, experiment.method, parse_overrides(experiment.overrides))


def test_the_quality_suite_has_every_method_with_two_seeds_or_more() -> None:
    runs = quality.experiments()
    assert {(e.method, e.seed) for e in runs} == {
        (m, s) for m in quality.METHODS for s in (1, 2, *quality.MORE_SEEDS.get(m, ()))
    }
    assert set(METHODS) <= set(quality.METHODS)
    assert len({(e.suite, e.name) for e in runs}) == len(runs)


@pytest.mark.parametrize("size", sorted(ablation.EXPERTS))
def test_every_ablation_has_valid_settings(size: str) -> None:
    for experiment in ablation.experiments(size):
        assert settings_of(experiment).seed == ablation.SEED


def test_the_ablation_changes_one_thing_of_its_standard_at_equal_steps() -> None:
    standard, *others = ablation.experiments("mini")
    whole = [f"seed={ablation.SEED}", f"steps={ablation.STEPS['mini']}"]
    assert standard.overrides == [*whole, ablation.CHUNKS, ablation.LOCALITY]
    for experiment in others:
        assert experiment.suite == "ablation"
        off = {ablation.LOCALITY: NO_LOCALITY, ablation.CHUNKS: NO_CHUNKS}
        shared = [change for change in standard.overrides if off.get(change) not in experiment.overrides]
        assert experiment.overrides[: len(shared)] == shared
        assert len(experiment.overrides) > len(shared)


def test_objectives_are_switched_off_and_replaced() -> None:
    terms = {e.label: settings_of(e).objectives.terms for e in ablation.experiments("mini")}
    lift = {"dead_experts"}
    assert set(terms["AL + CS (standard)"]) == {"activation_locality", "chunk_sparsification"} | lift
    assert set(terms["CS"]) == {"chunk_sparsification"} | lift
    assert set(terms["AL"]) == {"activation_locality"} | lift
    assert set(terms["none"]) == lift
    assert set(terms["AL + L1"]) == {"activation_locality", "l1"} | lift
    assert set(terms["entropy"]) == {"router_entropy"} | lift
    assert set(terms["AL + CS, dead experts not lifted"]) == {"activation_locality", "chunk_sparsification"}
    assert terms["AL + CS (standard)"]["activation_locality"]["kind"] == "constant"
    assert terms["L1"]["l1"]["target"] == 80
    assert terms["AL + CS + load balance 0.01"]["load_balancing"]["value"] == 0.01


@pytest.mark.parametrize("size", sorted(ablation.EXPERTS))
def test_architectures_have_equal_parameters(size: str) -> None:
    row = SIZES[size]
    assert ablation.EXPERTS[size] == (row["num_experts"], row["moe_intermediate_size"])
    standard = parameter_counts(preset_config(size)).experts
    for experiment in ablation.experiments(size):
        if {"architecture", "granularity"} & set(experiment.groups):
            counts = parameter_counts(preset_config(size, **settings_of(experiment).model))
            # a width is a whole number: two thirds of 16 is 11
            assert counts.experts == pytest.approx(standard, rel=0.04 if size == "nano" else 0.01), experiment.name


def test_a_size_without_a_row_is_an_error_that_says_what_to_add() -> None:
    with pytest.raises(ValueError, match="add a row to EXPERTS"):
        ablation.experiments("3b")
