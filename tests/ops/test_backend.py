"""Dispatch: explicit names are obeyed or refused with a reason; `auto` takes the first that can and pays."""

from __future__ import annotations

import pytest
import torch

from blockffn.ops import native
from blockffn.ops.backend import Backend, choose_backend
from blockffn.ops.sparse_ffn import BACKENDS, sparse_ffn

from .layers import Layer


def table(**backends: Backend) -> dict[str, Backend]:
    return backends


def compute(x: int) -> int:
    return x


def test_auto_takes_the_first_backend_that_accepts_and_pays() -> None:
    backends = table(
        fast=Backend(compute, refuses=lambda x: "too large" if x > 9 else None),
        niche=Backend(compute, pays=lambda x: x == 100),
        slow=Backend(compute),
    )
    assert choose_backend("op", backends, "auto", 1) == "fast"
    assert choose_backend("op", backends, "auto", 10) == "slow"
    assert choose_backend("op", backends, "auto", 100) == "niche"


def test_auto_takes_the_last_usable_backend_when_none_pays() -> None:
    backends = table(only=Backend(compute, pays=lambda x: False))
    assert choose_backend("op", backends, "auto", 1) == "only"


def test_explicit_name_is_never_replaced() -> None:
    backends = table(fast=Backend(compute, refuses=lambda x: "it is Monday"), slow=Backend(compute))
    with pytest.raises(ValueError, match="'fast' cannot compute this op: it is Monday"):
        choose_backend("op", backends, "fast", 1)


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'quick' for op; choose one of \['slow'\] or 'auto'"):
        choose_backend("op", table(slow=Backend(compute)), "quick", 1)


def test_no_usable_backend_gives_every_reason() -> None:
    backends = table(a=Backend(compute, refuses=lambda x: "no gpu", batch_invariant=True), b=Backend(compute))
    with pytest.raises(ValueError, match="a: no gpu; b: it rounds differently"):
        choose_backend("op", backends, "auto", 1, batch_invariant=True)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_threshold_means_the_same_on_every_backend(backend: str) -> None:
    layer = Layer.random(4, 5, 32, 64, active_share=1.0)
    arguments = (layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD)
    if BACKENDS[backend].refuses(*arguments, layer.weights_TE) is not None:
        pytest.skip(f"{backend} cannot run here")
    kept = torch.where(layer.weights_TE.abs() <= 0.7, 0, layer.weights_TE)
    y = sparse_ffn(*arguments, layer.weights_TE, threshold=0.7, backend=backend)
    torch.testing.assert_close(y, sparse_ffn(*arguments, kept, backend="reference"))


def test_negative_threshold_is_refused() -> None:
    layer = Layer.random(1, 2, 32, 64)
    with pytest.raises(ValueError, match="-1"):
        sparse_ffn(layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE, threshold=-1.0)


@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")
@pytest.mark.parametrize(
    ("T", "share", "expected"), [(1, 0.2, "cpu"), (64, 0.2, "cpu"), (64, 1.0, "dense"), (600, 0.1, "dense")]
)
def test_auto_takes_the_dense_product_where_sparsity_does_not_pay(T: int, share: float, expected: str) -> None:
    layer = Layer.random(T, 16, 8, 16, active_share=share)
    arguments = (layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE)
    assert choose_backend("sparse_ffn", BACKENDS, "auto", *arguments) == expected


def test_many_tokens_of_gated_experts_off_the_cpu_take_the_dense_product() -> None:
    up, x, weights = (torch.empty(shape, device="meta") for shape in ((4, 16, 32), (65, 32), (65, 4)))
    arguments, gate = (x, up, up, weights), {"gate_proj_EFD": up}
    assert choose_backend("sparse_ffn", BACKENDS, "auto", *arguments, **gate) == "dense"
