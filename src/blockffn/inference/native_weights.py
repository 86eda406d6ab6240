"""Packs a model's weights for the native step, and keeps what its description points to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockffn.inference.cached_attention import expansion_weight
from blockffn.models.attention import GroupedQueryAttention, LatentAttention
from blockffn.models.causal_lm import BlockFFNForCausalLM, DecoderLayer
from blockffn.models.draft import DraftLayer
from blockffn.models.experts import GatedFFN, RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.models.packed import PackedEmbedding, PackedLinear, PackedRoutedExperts
from blockffn.models.rotary import RotaryEmbedding
from blockffn.models.routers.relu import ReLURouter
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.ops import native
from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import (
    DEFAULT_GROUP_SIZE,
    MatrixLayout,
    PackedExperts,
    PackedMatrix,
    pack_experts,
    pack_linear,
    pack_matrix,
    unpack_matrix,
)

STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f32"}  # bf16 would round float16
CACHE_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class NativeWeights:
    """Packs modules one by one into what the C functions take, and owns the memory.

    Args:
        format: of plain weights: f32, bf16, int8 or int4; `None`: as each is stored. Router and norms keep theirs.
        head_format: of the language-model head; `None`: as `format`, but int8 for int4, as in
            `BlockFFNQuantizationConfig.preset`.
        group_size: weights that share a scale in int8 and int4.
    """

    def __init__(
        self, *, format: str | None = None, head_format: str | None = None, group_size: int = DEFAULT_GROUP_SIZE
    ) -> None:
        self.format, self.group_size = format, group_size
        self.head_format = head_format or ("int8" if format == "int4" else format)
        self._owned: list[Any] = []  # what the description points to
        self._packed_bytes = self._num_weights = 0

    @property
    def bits_per_weight(self) -> float:
        """Of the packed matrices in memory, on average."""
        return 8 * self._packed_bytes / self._num_weights

    def embedding(self, model: BlockFFNForCausalLM) -> tuple[native.Matrix, bool]:
        """The embedding table, and whether it is plain rows."""
        embedding = model.model.embed_tokens
        if isinstance(embedding, PackedEmbedding):
            return self.matrix(packed(embedding)), False
        return self._plain(embedding.weight), True

    def add_cache(self, description: native.Model) -> None:
        """An empty cache of the described size."""
        cache = native.empty_huge(native.function("cache_bytes")(description)).zero_()
        description.cache = self.address(cache)
        self.cache_bytes = cache.nbytes

    def layer(self, layer: DecoderLayer | DraftLayer) -> native.Layer:
        result = native.Layer(
            out_proj=self.matrix(self.pack([layer.self_attn.o_proj], self.format)),
            ffn_norm=self.vector(layer.post_attention_layernorm.weight),
        )
        if not isinstance(layer.input_layernorm, nn.Identity):
            result.attention_norm = self.vector(layer.input_layernorm.weight)
        attention = layer.self_attn
        if isinstance(attention, LatentAttention):
            result.in_proj = self.matrix(self.pack([attention.q_a_proj, attention.kv_a_proj_with_mqa], self.format))
            result.query_norm = self.vector(attention.q_a_layernorm.weight)
            result.latent_norm = self.vector(attention.kv_a_layernorm.weight)
            result.query_proj = self.matrix(self.pack([attention.q_b_proj], self.format))
            result.to_latent, result.to_values = self._absorbed(attention)
        else:
            assert isinstance(attention, GroupedQueryAttention)
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            result.in_proj = self.matrix(self.pack(parts, self.format))
        self._add_ffn(result, layer.mlp)
        return result

    def _absorbed(self, attention: LatentAttention) -> tuple[native.Matrix, native.Matrix]:
        """`kv_b_proj`, transposed for the keys, head by head. Packed ones stay in bf16: int8 would round them twice."""
        config = attention.config
        weight = expansion_weight(attention)
        format = self._format(attention.kv_b_proj, self.format)
        if isinstance(attention.kv_b_proj, PackedLinear):
            format = "bf16"
        keys, values = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        matrices = []
        for heads in (keys.transpose(1, 2), values):
            layout = MatrixLayout.choose(format, heads.shape[1], heads.shape[2], self.group_size)
            data = torch.cat([pack_matrix(head, layout) for head in heads])
            self._count(data[layout.num_bytes :], heads[1:].numel())  # the first one is counted with the matrix
            matrices.append(self.matrix(PackedMatrix(data, layout)))
        return matrices[0], matrices[1]

    def _add_ffn(self, result: native.Layer, ffn: nn.Module) -> None:
        if isinstance(ffn, GatedFFN):
            result.experts = self._experts(self._pack_dense(ffn))
            return
        assert isinstance(ffn, BlockFFN)
        router: Any = ffn.router
        experts = ffn.routed_experts
        if isinstance(experts, PackedRoutedExperts):
            chosen = experts.experts
        else:
            assert isinstance(experts, RoutedExperts)
            chosen = pack_experts(
                experts.up_proj, experts.down_proj, gate_proj_EFD=experts.gate_proj,
                format=self.format or STORED[experts.up_proj.dtype], group_size=self.group_size,
            )  # fmt: skip
        result.experts = self._experts(chosen)
        result.router = self.matrix(pack_linear(router.proj.weight, format=STORED[router.proj.weight.dtype]))
        if isinstance(router, ReLURMSNormRouter):
            result.router_scale, result.router_normalizes = self.vector(router.norm.weight), 1
            result.router_eps = router.norm.eps
        else:
            assert isinstance(router, ReLURouter)
            result.router_scale = None if router.scale is None else self.vector(router.scale.weight)

    def _pack_dense(self, ffn: GatedFFN) -> PackedExperts:
        """The dense FFN as one gated expert."""
        modules: list[Any] = [ffn.up_proj, ffn.gate_proj, ffn.down_proj]
        if all(isinstance(module, PackedLinear) for module in modules):
            data = torch.cat([module.packed for module in modules])
            return PackedExperts(data.unsqueeze(0), modules[0].layout, modules[2].layout, True)
        up, gate, down = (_weight(module) for module in modules)
        format = self._format(ffn.up_proj, self.format)
        return pack_experts(up[None], down.T[None], gate_proj_EFD=gate[None], format=format, group_size=self.group_size)

    def pack(self, modules: list[Any], format: str | None) -> PackedMatrix:
        """Linear maps of the same input as one matrix; each begins at a multiple of 32 outputs."""
        formats = {self._format(module, format) for module in modules}
        if all(isinstance(module, PackedLinear) for module in modules) and len(formats) == 1:
            matrices = [packed(module) for module in modules]
        else:
            # One matrix has one format; what is packed already in several is kept as it is by bf16.
            chosen = formats.pop() if len(formats) == 1 else "bf16"
            matrices = [pack_linear(_weight(m), format=chosen, group_size=self.group_size) for m in modules]
        if len(matrices) == 1:
            return matrices[0]
        layout = matrices[0].layout
        outputs = sum(matrix.layout.strips * 32 for matrix in matrices)
        joined = MatrixLayout(layout.format, outputs, layout.inputs, layout.group_size)
        data = native.empty_huge(joined.num_bytes)
        return PackedMatrix(torch.cat([matrix.data for matrix in matrices], out=data), joined)

    def _format(self, module: Any, format: str | None) -> str:
        if isinstance(module, PackedLinear):
            return module.format
        return format or STORED[module.weight.dtype]

    def matrix(self, weight: PackedMatrix) -> native.Matrix:
        layout = weight.layout
        self._count(weight.data, layout.outputs * layout.inputs)
        address = self.address(weight.data)
        return native.Matrix(address, layout.outputs, layout.inputs, FORMATS[layout.format], layout.group_size)

    def _experts(self, experts: PackedExperts) -> native.Experts:
        up, down = experts.up, experts.down
        self._count(experts.data, experts.num_experts * up.outputs * up.inputs * (3 if experts.gated else 2))
        return native.Experts(
            self.address(experts.data), experts.data.shape[1], experts.num_experts, up.outputs, up.inputs,
            FORMATS[up.format], experts.gated, up.group_size, down.group_size,
        )  # fmt: skip

    def _count(self, data: Tensor, num_weights: int) -> None:
        self._packed_bytes += data.nbytes
        self._num_weights += num_weights

    def _plain(self, weight: Tensor) -> native.Matrix:
        """Rows where they lie, in float32 or bfloat16."""
        rows = weight.detach() if weight.dtype in CACHE_DTYPES else weight.detach().float()
        rows = rows.contiguous()
        return native.Matrix(self.address(rows), *rows.shape, FORMATS[CACHE_DTYPES[rows.dtype]], 0)

    def vector(self, weight: Tensor) -> int:
        return self.address(weight.detach().float().contiguous())

    def address(self, tensor: Tensor) -> int:
        self._owned.append(tensor)
        return tensor.data_ptr()


def packed(module: PackedLinear | PackedEmbedding) -> PackedMatrix:
    return PackedMatrix(module.packed.detach(), module.layout)


def _weight(module: nn.Linear | PackedLinear) -> Tensor:
    if isinstance(module, PackedLinear):
        return unpack_matrix(module.packed, module.layout)
    return module.weight.detach()


def rotary_table(rotary: RotaryEmbedding, capacity: int) -> Tensor:
    """Cosines and sines `[capacity, 2, R / 2]` of all positions."""
    cos, sin = rotary(torch.empty(0), position_ids=torch.arange(capacity).unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1).float().contiguous()
