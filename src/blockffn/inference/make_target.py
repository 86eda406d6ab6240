"""`make_target`: which way of running a model serves a request."""

from __future__ import annotations

from blockffn.inference.model_target import ModelTarget
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM

BACKENDS = ("auto", "native", "model")
PRECISIONS = ("auto", "bf16", "int8", "int4", "f32")


def make_target(
    model: BlockFFNForCausalLM, *, backend: str = "auto", precision: str = "auto", capacity: int | None = None
) -> Target:
    """A target that decodes with `model`.

    Args:
        backend: `native` runs a step as one call of the CPU kernels, over weights that it packs; `model` runs the
            model's own modules, on any device; `auto` is `native` where it can run the model, else `model`.
        precision: of the packed weights; `auto`: as the model stores them. Other values need `native`.
        capacity: tokens that the cache holds; default: the model's context.

    Raises:
        ValueError: an unknown backend or precision, one that cannot run this model, or a capacity beyond its context.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} for decoding; choose one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    reason = why_not_native(model)
    if backend == "native" and reason is not None:
        raise ValueError(f"backend 'native' cannot run this model: {reason}")
    if precision != "auto":
        raise ValueError(f"precision {precision!r} needs the backend native: {reason or 'you asked for model'}")
    return ModelTarget(model, capacity=capacity)


def why_not_native(model: BlockFFNForCausalLM) -> str | None:
    """Why the native step cannot run this model, and what can; `None` when it can."""
    return "it is not part of this version; use backend='model'"
