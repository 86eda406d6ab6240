"""Modules that hold packed int8 or int4 weights instead of matrices, for inference.

On the CPU they run the native kernels on the packed bytes. Elsewhere, and for gradients with respect to their input,
they unpack at every call: correct and slow, so unpack the model once instead (`model.dequantize()`). Packed weights
themselves have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockffn.models.experts import RoutedExperts
from blockffn.ops.linear import linear
from blockffn.ops.quantization import (
    MatrixLayout,
    PackedExperts,
    PackedMatrix,
    checked_storage,
    pack_experts,
    pack_linear,
    unpack_matrix,
    unpack_rows,
)
from blockffn.ops.sparse_ffn import sparse_ffn_packed


class PackedModule(nn.Module):
    """A module whose only parameter is `packed`, uint8 in the layout of `blockffn.ops.quantization`.

    Subclasses are made empty from the module that they stand for (its shapes, not its weights), filled by
    `fill(module)`, and turned back by `unpack(dtype)` into such a module with the values that the kernels multiply
    with.
    """

    packed: nn.Parameter

    def __init__(self, format: str, group_size: int) -> None:
        super().__init__()
        self.format, self.group_size = format, group_size

    def fill(self, module: Any) -> None:
        """Pack the weights of `module`. Raises `ValueError` when one is NaN or infinite."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        raise NotImplementedError

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """Of the weights that `packed` stands for; for experts `[matrices, E, F, D]`."""
        raise NotImplementedError

    @property
    def padding_bytes(self) -> int:
        """Bytes of `packed` that are neither a weight nor a scale of one."""
        raise NotImplementedError

    def _allocate(self, *shape: int) -> None:
        self.packed = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)

    def settle(self) -> None:
        """Check the loaded bytes and move them to an address that the kernels can read fast.

        Raises:
            ValueError: the bytes do not fit the layout.
        """
        if self.packed.device.type == "cpu":
            self.packed.data = checked_storage(self.packed.data, tuple(self.packed.shape))


class PackedLinear(PackedModule):
    """`y = W x` without bias; `packed [bytes]`."""

    def __init__(self, module: nn.Linear, format: str, group_size: int) -> None:
        super().__init__(format, group_size)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.layout = MatrixLayout.choose(format, self.out_features, self.in_features, group_size)
        self._allocate(self.layout.num_bytes)

    def fill(self, module: nn.Linear) -> None:
        self.packed.data = pack_linear(module.weight, format=self.format, group_size=self.group_size).data

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @property
    def padding_bytes(self) -> int:
        return self.layout.padding_bytes

    def forward(self, x: Tensor) -> Tensor:
        y_TN = linear(x.reshape(-1, self.in_features), PackedMatrix(self.packed, self.layout))
        return y_TN.view(*x.shape[:-1], self.out_features)

    def unpack(self, dtype: torch.dtype) -> nn.Linear:
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        module.weight = nn.Parameter(unpack_matrix(self.packed, self.layout).to(dtype))
        return module

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


class PackedEmbedding(PackedModule):
    """A table of `[num_embeddings, embedding_dim]`; `packed [bytes]`, which a tied `PackedLinear` may share."""

    precision: Tensor

    def __init__(self, module: nn.Embedding, format: str, group_size: int) -> None:
        super().__init__(format, group_size)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.layout = MatrixLayout.choose(format, self.num_embeddings, self.embedding_dim, group_size)
        self._allocate(self.layout.num_bytes)
        # Holds nothing but the dtype of the output, so that `model.to(dtype)` changes it as it does a plain table's.
        self.register_buffer("precision", torch.empty(0, dtype=module.weight.dtype), persistent=False)

    def fill(self, module: nn.Embedding) -> None:
        self.packed.data = pack_linear(module.weight, format=self.format, group_size=self.group_size).data

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    @property
    def padding_bytes(self) -> int:
        return self.layout.padding_bytes

    def forward(self, ids: Tensor) -> Tensor:
        return unpack_rows(self.packed, self.layout, ids).to(self.precision.dtype)

    def unpack(self, dtype: torch.dtype) -> nn.Embedding:
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        module.weight = nn.Parameter(unpack_matrix(self.packed, self.layout).to(dtype))
        return module

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


class PackedRoutedExperts(PackedModule):
    """`RoutedExperts` with `packed [E, bytes]`: the up, (gate) and down matrix of each expert in a row."""

    def __init__(self, module: RoutedExperts, format: str, group_size: int) -> None:
        super().__init__(format, group_size)
        num_experts, width, hidden_size = module.up_proj.shape
        self.up = MatrixLayout.choose(format, width, hidden_size, group_size)
        self.down = MatrixLayout.choose(format, hidden_size, width, group_size)
        self.gated = module.gate_proj is not None
        self.backend = "auto"
        self._allocate(num_experts, self.up.num_bytes * (2 if self.gated else 1) + self.down.num_bytes)

    @property
    def experts(self) -> PackedExperts:
        """The packed experts, as `blockffn.ops` takes them."""
        return PackedExperts(self.packed, self.up, self.down, self.gated)

    def fill(self, module: RoutedExperts) -> None:
        packed = pack_experts(
            module.up_proj,
            module.down_proj,
            gate_proj_EFD=module.gate_proj,
            format=self.format,
            group_size=self.group_size,
        )
        self.packed.data = packed.data

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        return 3 if self.gated else 2, self.packed.shape[0], self.up.outputs, self.up.inputs

    @property
    def padding_bytes(self) -> int:
        return self.experts.padding_bytes

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[..., D]` and routing weights `[..., E]` to `[..., D]`."""
        y_TD = sparse_ffn_packed(
            x.reshape(-1, x.shape[-1]),
            self.experts,
            weights.reshape(-1, weights.shape[-1]),
            backend=self.backend,
        )
        return y_TD.view(x.shape)

    def unpack(self, dtype: torch.dtype) -> RoutedExperts:
        with torch.device("meta"):
            module = RoutedExperts(self.up.inputs, self.packed.shape[0], self.up.outputs, gated=self.gated)
        up, down, gate = self.experts.unpack()
        module.up_proj, module.down_proj = nn.Parameter(up.to(dtype)), nn.Parameter(down.to(dtype))
        module.gate_proj = None if gate is None else nn.Parameter(gate.to(dtype))
        return module

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.packed.shape[0]}, width={self.up.outputs}, hidden_size={self.up.inputs}, "
            f"gated={self.gated}, format={self.format}"
        )
