"""Settings: presets, dotted overrides, and errors that name the nearest valid word."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockffn.presets import RECIPES, SIZES
from blockffn.settings import load_yaml, parse_overrides, save_yaml, to_dict
from blockffn.training.config import ScheduleSettings, TrainSettings, changed_settings, train_settings
from blockffn.training.schedule import StepBudget, learning_rate_factor


def test_every_size_has_a_recipe_that_is_valid() -> None:
    assert set(RECIPES) == set(SIZES)
    for size in SIZES:
        for method in ("blockffn", "dense"):
            assert train_settings(size, method).size == size


def test_published_tokens_per_step() -> None:
    tokens = {size: s.batch_size * s.data.sequence_length for size in SIZES for s in [train_settings(size)]}
    assert tokens["0.1b"] == pytest.approx(1.57e6, rel=2e-3)
    assert tokens["0.5b"] == tokens["1.2b"] == tokens["3b"] == pytest.approx(3.15e6, rel=2e-3)
    assert tokens["0.8b"] == pytest.approx(2.36e6, rel=2e-3)


def test_overrides_reach_nested_settings() -> None:
    changes = parse_overrides(["steps=7", "optimizer.learning_rate=2e-3", "data.folders={a: 1}",
                               "objectives.terms.activation_locality.value=0.5", "model.num_experts=12"])  # fmt: skip
    settings = train_settings("nano", "blockffn", changes)
    assert settings.steps == 7
    assert settings.optimizer.learning_rate == 2e-3
    assert settings.objectives.terms["activation_locality"]["value"] == 0.5
    assert settings.model == {"num_experts": 12}


@pytest.mark.parametrize(("override", "message"), [
    ("stepz=3", "did you mean 'steps'"),
    ("optimizer.learnin_rate=1", "optimizer.learnin_rate.*did you mean 'learning_rate'"),
    ("steps=many", "'steps' must be int, got 'many'"),
    ("steps=0", "steps must be at least 1"),
    ("data.sequence_length=100", r"data.sequence_length \(100\).*chunk_length \(64\).*nearest: 64"),
    ("optimizer=3", "is a group of settings"),
    ("steps", "not of the form key=value"),
    ("precision=fp8", "precision must be one of"),
    ("steps=[", "is not a value"),
    ("objectives.terms.chunk_sparsificaton.value=1", "unknown objective.*did you mean 'chunk_sparsification'"),
    ("objectives.terms.chunk_sparsification=5", "a coefficient is a group of settings"),
    ("objectives.terms.activation_locality.value=abc", "'value' of a constant coefficient must not be 'abc'"),
    ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate must be a finite number of at least 0, got -1"),
    ("data.sequence_length=0", "data.sequence_length must be"),
])  # fmt: skip
def test_a_wrong_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_settings("nano", "blockffn", parse_overrides([override]))


def test_unknown_size_and_method_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'mini'"):
        train_settings("minni")
    with pytest.raises(ValueError, match="did you mean 'blockffn'"):
        train_settings("nano", "blokffn")


def test_settings_survive_the_file(tmp_path: Path) -> None:
    settings = train_settings("mini", "blockffn", {"model": {"num_experts": 12}, "data": {"folders": {"a": 0.5}}})
    save_yaml(settings, tmp_path / "config.yaml")
    assert load_yaml(TrainSettings, tmp_path / "config.yaml") == settings


def test_a_garbled_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"config.yaml is not valid YAML"):
        load_yaml(TrainSettings, tmp_path / "config.yaml")


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    schedule = ScheduleSettings(warmup_steps=4, decay_fraction=0.2, final_fraction=0.1)
    factors = [learning_rate_factor(s, steps=20, schedule=schedule) for s in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:16] == [1.0] * 12
    assert factors[16:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_without_decay_the_rate_stays() -> None:
    schedule = ScheduleSettings(warmup_steps=0, decay_fraction=0.0)
    assert learning_rate_factor(9, steps=10, schedule=schedule) == 1.0


def test_a_time_limit_shortens_the_run_to_what_fits() -> None:
    budget = StepBudget(1000, 100.0, first_step=0)
    seconds = [20.0 + 0.5 * step for step in range(1000)]  # 20 s to compile, then two steps a second
    totals = [budget.total(step + 1, seconds[step]) for step in range(150)]
    assert totals[:11] == [1000] * 11
    assert totals[12:] == [160] * 138
    assert StepBudget(50, 100.0, first_step=0).total(40, 30.0) == 50


def test_without_a_time_limit_all_steps_are_done() -> None:
    assert StepBudget(1000, None, first_step=0).total(500, 1e9) == 1000


def test_changed_settings_replace_a_coefficient_of_another_kind_and_drop_null() -> None:
    values = to_dict(train_settings("nano"))
    spec = {"kind": "constant", "value": 0.1}
    changes = {"objectives": {"terms": {"chunk_sparsification": spec, "activation_locality": None}}}
    assert changed_settings(values, changes).objectives.terms == {"chunk_sparsification": spec}
