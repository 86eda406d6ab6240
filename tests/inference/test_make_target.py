"""Which target serves a model."""

from __future__ import annotations

import pytest

from blockffn.inference.make_target import make_target
from blockffn.inference.model_target import ModelTarget
from tests.models.conftest import tiny_model


def test_the_models_own_modules_run_on_request() -> None:
    target = make_target(tiny_model(), backend="model", capacity=32)
    assert isinstance(target, ModelTarget)
    assert target.capacity == 32


def test_wrong_choices_are_errors() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"unknown backend 'fast' for decoding; choose one of auto, native, model"):
        make_target(model, backend="fast")
    with pytest.raises(ValueError, match=r"unknown precision 'int3'; choose one of auto, bf16"):
        make_target(model, precision="int3")
    with pytest.raises(ValueError, match="precision 'int8' needs the backend native"):
        make_target(model, backend="model", precision="int8")
