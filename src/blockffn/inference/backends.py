"""What runs a model for decoding, chosen by name."""

from __future__ import annotations

from blockffn.inference.model_target import ModelTarget
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM

BACKENDS = ("auto", "model")


def make_target(
    model: BlockFFNForCausalLM, *, backend: str = "auto", precision: str = "auto", capacity: int | None = None
) -> Target:
    """A target that runs `model`.

    Args:
        backend: `model` runs the model's own modules, on any device; `auto` takes the fastest that can run this model.
        precision: of what a backend computes with; `auto` is the model's own, and the only one that `model` has.
        capacity: tokens that the cache holds; default: the model's context.

    Raises:
        ValueError: an unknown backend, a precision that it does not have, or a capacity beyond the model's context.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if precision != "auto":
        raise ValueError(f"backend 'model' computes with the model's own dtype, not {precision!r}; leave precision out")
    return ModelTarget(model, capacity=capacity)
