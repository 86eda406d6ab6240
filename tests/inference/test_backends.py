"""Which target runs a model."""

from __future__ import annotations

import pytest

from blockffn.inference.backends import BACKENDS, make_target
from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_target import NativeTarget
from blockffn.ops import native
from tests.models.conftest import tiny_model

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")


def test_the_models_own_modules_run_on_request() -> None:
    target = make_target(tiny_model(), backend="model", capacity=32)
    assert isinstance(target, ModelTarget)
    assert target.capacity == 32


@needs_native
@pytest.mark.parametrize("method", ["blockffn", "dense", "remoe"])
def test_auto_is_native_on_the_cpu(method: str) -> None:
    target = make_target(tiny_model("mla", method), capacity=32)
    assert isinstance(target, NativeTarget)
    assert target.capacity == 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_gives_the_text_of_the_models_own_modules_or_says_why_not(backend: str) -> None:
    if backend == "native" and native.unavailable() is not None:
        pytest.skip("the native kernels are not built")
    if backend == "graph":
        with pytest.raises(ValueError, match="needs the model on a CUDA device"):
            make_target(tiny_model(), backend="graph")
        return
    model = tiny_model()
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0)
    expected = generate(ModelTarget(model), [5, 6], settings).token_ids
    assert generate(make_target(model, backend=backend, capacity=20), [5, 6], settings).token_ids == expected


@pytest.mark.parametrize(
    ("method", "reason"),
    [("topk", "no router of the type 'topk'"), ("grin", "'sparsemixer'"), ("deco", "no shared experts")],
)
def test_what_native_cannot_run_goes_to_the_model_and_is_named(method: str, reason: str) -> None:
    model = tiny_model("gqa", method)
    assert isinstance(make_target(model), ModelTarget)
    with pytest.raises(ValueError, match=f"backend 'native' cannot run this model: .*{reason}.*; use backend='model'"):
        make_target(model, backend="native")
    with pytest.raises(ValueError, match=f"not 'int8'; leave precision out .*{reason}"):
        make_target(model, precision="int8")


def test_wrong_choices_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="unknown backend 'natve'; choose from auto, model"):
        make_target(model, backend="natve")
    with pytest.raises(ValueError, match="unknown precision 'int3'; choose from auto, bf16"):
        make_target(model, precision="int3")
    with pytest.raises(ValueError, match="not 'int4'; leave precision out"):
        make_target(model, backend="model", precision="int4")
    for backend in ("auto", "model"):
        with pytest.raises(ValueError, match="the model's context of 64 tokens, got 65"):
            make_target(model, backend=backend, capacity=65)
