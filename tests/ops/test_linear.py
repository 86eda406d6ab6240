"""The packed linear map agrees with its definition and rounds alike for any number of tokens."""

from __future__ import annotations

import pytest
import torch

from blockffn.ops import native
from blockffn.ops.linear import linear
from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import pack_linear

from .layers import TOLERANCE, assert_close

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")


def tokens(T: int, K: int) -> torch.Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(T))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 32, 64), (1, 3000, 100), (2, 33, 31), (9, 100, 257), (40, 64, 128)])
def test_linear_agrees_with_reference(T: int, N: int, K: int, format: str, dtype: torch.dtype) -> None:
    weight = pack_linear(tokens(N, K) / K**0.5, format=format)
    x = tokens(T, K).to(dtype)
    y = linear(x, weight, backend="cpu")
    assert y.dtype == dtype
    tolerance = max(TOLERANCE[format], 5e-3 if dtype == torch.bfloat16 else 0)
    assert_close("y", y, linear(x.float(), weight, backend="reference"), tolerance)


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_one_token_and_many_tokens_round_alike(format: str) -> None:
    weight, x = pack_linear(tokens(96, 160), format=format), tokens(13, 160)
    together = linear(x, weight, batch_invariant=True)
    assert torch.equal(torch.cat([linear(row, weight, batch_invariant=True) for row in x.split(1)]), together)


@needs_native
def test_op_passes_opcheck() -> None:
    weight = pack_linear(tokens(40, 64), format="int8")
    torch.library.opcheck(torch.ops.blockffn.linear_packed, (tokens(3, 64), weight.data, 2, 40, 64))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 63\), the weight takes \[T, 64\]"):
        linear(tokens(2, 63), pack_linear(tokens(32, 64)))


def test_reference_is_not_batch_invariant_and_says_so() -> None:
    with pytest.raises(ValueError, match="rounds differently"):
        linear(tokens(2, 64), pack_linear(tokens(32, 64)), backend="reference", batch_invariant=True)
