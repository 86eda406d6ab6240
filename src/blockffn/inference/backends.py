"""What runs a model for decoding, chosen by name."""

from __future__ import annotations

from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_model import why_not_native
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM

BACKENDS = ("auto", "model", "native")
PRECISIONS = ("auto", "bf16", "int8", "int4", "f32")


def make_target(
    model: BlockFFNForCausalLM, *, backend: str = "auto", precision: str = "auto", capacity: int | None = None
) -> Target:
    """A target that runs `model`.

    Args:
        backend: `native` runs a step as one call of the CPU kernels, over weights that it packs (`NativeTarget`);
            `model` runs the model's own modules, on any device (`ModelTarget`); `auto` is `native` where it can run the
            model (`why_not_native` gives the reason against), else `model`.
        precision: of the packed weights, the head's included (int8 for `int4`); `auto`: as the model stores them. Other
            values need the native backend. Weights that are stored packed keep their format.
        capacity: tokens that the cache holds; default: the model's context.

    Raises:
        ValueError: an unknown backend or precision, one that cannot run this model, or a capacity beyond its context.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    reason = None if backend == "model" else why_not_native(model)
    if backend != "model" and reason is None:
        return NativeTarget(model, capacity=capacity, format=None if precision == "auto" else precision)
    if backend == "native":
        raise ValueError(f"backend 'native' cannot run this model: {reason}; use backend='model'")
    if precision != "auto":
        because = "" if reason is None else f" (native cannot run this model: {reason})"
        raise ValueError(
            f"backend 'model' computes with the model's own dtype, not {precision!r}; leave precision out{because}"
        )
    return ModelTarget(model, capacity=capacity)
