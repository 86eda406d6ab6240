"""`y = W x` for a packed matrix: the dense projections of a CPU engine (attention, language-model head).

Contract, equal for every backend:

    x_TK     [T, K]            tokens, float32 or bfloat16
    weight   `PackedMatrix`    of N outputs and K inputs (`blockffn.ops.quantization.pack_linear`)
    returns  [T, N]            in the dtype of `x_TK`

Backends, in the order in which `auto` tries them:
    cpu        native kernels; batch-invariant
    reference  unpacks the matrix and multiplies in float32
"""

from __future__ import annotations

from torch import Tensor

from blockffn.ops.backend import Backend, choose_backend
from blockffn.ops.linear.cpu import linear_cpu, refuses
from blockffn.ops.linear.reference import linear_reference
from blockffn.ops.quantization import PackedMatrix

BACKENDS: dict[str, Backend] = {
    "cpu": Backend(linear_cpu, refuses, batch_invariant=True),
    "reference": Backend(linear_reference),
}


def linear(x_TK: Tensor, weight: PackedMatrix, *, batch_invariant: bool = False, backend: str = "auto") -> Tensor:
    """Multiply tokens by a packed matrix. Shapes as in the module docstring.

    Raises:
        ValueError: shapes disagree, or `backend` is unknown or cannot take the arguments.
    """
    if x_TK.ndim != 2 or x_TK.shape[1] != weight.layout.inputs:
        raise ValueError(f"linear: x has shape {tuple(x_TK.shape)}, the weight takes [T, {weight.layout.inputs}]")
    name = choose_backend("linear", BACKENDS, backend, x_TK, weight, batch_invariant=batch_invariant)
    result: Tensor = BACKENDS[name].run(x_TK, weight)
    return result
