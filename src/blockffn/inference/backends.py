"""What runs a model for decoding, chosen by name."""

from __future__ import annotations

from blockffn.inference.graph_target import graph_target, refuses_graphs
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_model import why_not_native
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.target import Target
from blockffn.models.causal_lm import BlockFFNForCausalLM

BACKENDS = ("auto", "model", "native", "graph")
PRECISIONS = ("auto", "bf16", "int8", "int4", "f32")


def check_backend(backend: str) -> None:
    """Raise `ValueError` unless a backend has this name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")


def make_target(
    model: BlockFFNForCausalLM, *, backend: str = "auto", precision: str = "auto", capacity: int | None = None,
    screen_head: str | None = None,
) -> Target:  # fmt: skip
    """A target that runs `model`.

    Args:
        backend: `native` runs a step as one call of the CPU kernels, over weights that it packs (`NativeTarget`);
            `graph` launches a step as one CUDA graph (`GraphTarget`); `model` runs the model's own modules, on any
            device (`ModelTarget`). `auto` is the first of them that can run the model where it lies (`why_not_native`
            and `refuses_graphs` give the reasons against).
        precision: of the packed weights, the head's included (int8 for `int4`); `auto`: as the model stores them. Other
            values need the native backend. Weights that are stored packed keep their format.
        capacity: tokens that the cache holds; default: the model's context.
        screen_head: int8 or int4: greedy decoding and sampling from the `top_k` read the native backend's head in this
            format first, and of the stored one only what may matter; tokens are the same. `None`: the whole head.

    Raises:
        ValueError: an unknown backend or precision, one that cannot run this model, a capacity beyond its context, or a
            head that cannot be screened so.
    """
    check_backend(backend)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    not_native = why_not_native(model) if backend in ("auto", "native") else None
    if backend == "native" and not_native is not None:
        raise ValueError(f"backend 'native' cannot run this model: {not_native}; use backend='model'")
    if backend in ("auto", "native") and not_native is None:
        format = None if precision == "auto" else precision
        return NativeTarget(model, capacity=capacity, format=format, screen_head=screen_head)
    if screen_head is not None:
        raise ValueError(
            f"only the native backend screens its head (screen_head={screen_head!r})"
            + ("" if not_native is None else f"; it cannot run this model: {not_native}")
        )
    if precision != "auto":
        because = "" if not_native is None else f" (native cannot run this model: {not_native})"
        raise ValueError(
            f"without the native backend a model is computed in its own dtype, not {precision!r}; leave precision out"
            f"{because}"
        )
    if backend == "graph" or (backend == "auto" and refuses_graphs(model) is None):
        return graph_target(model, capacity)
    return ModelTarget(model, capacity=capacity)
