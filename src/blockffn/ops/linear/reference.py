"""The definition of the packed linear map."""

from __future__ import annotations

from torch import Tensor

from blockffn.ops.quantization import PackedMatrix


def linear_reference(x_TK: Tensor, weight: PackedMatrix) -> Tensor:
    """Unpack, then multiply in float32."""
    return (x_TK.float() @ weight.unpack().T).to(x_TK.dtype)
