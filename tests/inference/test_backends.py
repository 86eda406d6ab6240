from __future__ import annotations

import pytest
import torch

from blockffn.inference.backends import make_target
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from tests.models.conftest import tiny_model


@pytest.mark.parametrize("backend", ["auto", "model"])
def test_every_backend_gives_the_text_of_the_models_own_modules(backend: str) -> None:
    model = tiny_model()
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0)
    expected = generate(ModelTarget(model), [5, 6], settings).token_ids
    target = make_target(model, backend=backend, capacity=20)
    assert generate(target, [5, 6], settings).token_ids == expected
    assert target.capacity == 20


def test_what_is_not_there_is_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="unknown backend 'natve'; choose from auto, model"):
        make_target(model, backend="natve")
    with pytest.raises(ValueError, match="not 'int4'; leave precision out"):
        make_target(model, backend="model", precision="int4")
    with pytest.raises(ValueError, match="capacity must lie between 1 and"):
        make_target(model, capacity=torch.iinfo(torch.int32).max)
