"""A model as the native step wants it: packed weights, and the description that points to them.

The step (`native/decode_step.cpp`) is an execution plan of `BlockFFNForCausalLM`, not another definition of it: this
module reads everything from the model's own modules, and tests hold the results equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockffn.configuration import BlockFFNConfig
from blockffn.inference.cached_attention import expansion_weight
from blockffn.models.attention import GroupedQueryAttention, LatentAttention
from blockffn.models.causal_lm import BlockFFNForCausalLM, DecoderLayer
from blockffn.models.experts import GatedFFN, RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.models.packed import PackedEmbedding, PackedLinear, PackedRoutedExperts
from blockffn.models.routers.projection import RouterProjection
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


def why_not_native(model: BlockFFNForCausalLM) -> str | None:
    """Why the native step cannot run this model, or `None` when it can."""
    reason = _why_not_config(model.config)
    if reason is not None:
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, the native step runs on the CPU"
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and type(module) not in (
            nn.Linear,
            nn.Embedding,
            RouterProjection,
        ):
            return f"{name} is a {type(module).__name__}, whose weights it cannot read; merge adapters first"
        if hasattr(module, "base_layer"):
            return f"{name} carries an adapter; merge it first"
    return native.unavailable()


def _why_not_config(config: BlockFFNConfig) -> str | None:
    if config.ffn_type == "moe":
        if config.router_type not in ("relu_rmsnorm", "relu", "relu_scaled"):
            return f"it has no router of the type {config.router_type!r}"
        if config.num_shared_experts:
            return f"it has no shared experts, the model has {config.num_shared_experts}"
        if config.expert_activation != "silu":
            return f"it has no experts with the activation {config.expert_activation!r}"
    assert config.rope_parameters is not None
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return (
            f"rotary frequencies of the type {config.rope_parameters['rope_type']!r} depend on the length of the text"
        )
    return None


class NativeModel:
    """The packed weights of `model` with an empty cache.

    Weights that the model already holds packed are used where they lie; plain ones are packed once, so later changes of
    the model do not show. Exceptions are the embedding table, of which a step reads single rows and which stays where
    it is, and thresholds, which `refresh_thresholds` takes over.

    Args:
        format: of plain weights: f32, bf16, int8 or int4; `None`: as each is stored. Router and norms keep theirs.
        head_format: of the language-model head; `None`: as `format`, but int8 for int4, as in
            `BlockFFNQuantizationConfig.preset`.
        group_size: weights that share a scale in int8 and int4.
        cache_dtype: float32 or bfloat16.

    Attributes:
        description: what the C functions take.
        layers_with_experts: their numbers.
        bits_per_weight: of the packed matrices in memory, on average.

    Raises:
        ValueError: the model is not supported (`why_not_native`), or a weight cannot be quantised.
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        *,
        capacity: int,
        format: str | None = None,
        head_format: str | None = None,
        group_size: int = DEFAULT_GROUP_SIZE,
        cache_dtype: torch.dtype,
    ) -> None:
        reason = why_not_native(model)
        if reason is not None:
            raise ValueError(f"the native step cannot run this model: {reason}")
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"the cache is float32 or bfloat16, got {cache_dtype}")
        self.format, self.group_size = format, group_size
        self.head_format = head_format or ("int8" if format == "int4" else format)
        self._owned: list[Any] = []  # what the description points to
        self._packed_bytes = self._num_weights = 0
        self._modules = list(model.model.layers)
        self.layers_with_experts = [i for i, layer in enumerate(self._modules) if isinstance(layer.mlp, BlockFFN)]
        with torch.no_grad():
            self._layers = (native.Layer * len(self._modules))(*(self._layer(layer) for layer in self._modules))
            self.description = self._description(model, capacity, cache_dtype)
        self.bits_per_weight = 8 * self._packed_bytes / self._num_weights
        self.refresh_thresholds()
        cache = torch.zeros(native.function("cache_bytes")(self.description), dtype=torch.uint8)
        self.description.cache = self._address(cache)
        self.cache_bytes = cache.nbytes
        self.most_experts = max(layer.experts.num_experts for layer in self._layers)

    def refresh_thresholds(self) -> None:
        """Take over the thresholds that the model's layers have now."""
        for description, module in zip(self._layers, self._modules):
            description.threshold = getattr(module.mlp, "threshold", 0.0)

    def _description(self, model: BlockFFNForCausalLM, capacity: int, cache_dtype: torch.dtype) -> native.Model:
        config, decoder = model.config, model.model
        is_latent = config.attention_type == "mla"
        embedding = decoder.embed_tokens
        is_plain = not isinstance(embedding, PackedEmbedding)
        return native.Model(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_attention_heads,
            num_key_heads=1 if is_latent else config.num_key_value_heads,
            nope_width=config.qk_nope_head_dim if is_latent else 0,
            rope_width=config.qk_rope_head_dim if is_latent else config.head_dim,
            value_width=config.v_head_dim if is_latent else config.head_dim,
            query_latent_size=config.q_lora_rank if is_latent else 0,
            latent_size=config.kv_lora_rank if is_latent else 0,
            capacity=capacity,
            max_threads=torch.get_num_threads(),
            attention=native.ATTENTION[config.attention_type],
            cache_format=FORMATS[CACHE_DTYPES[cache_dtype]],
            norm_eps=config.rms_norm_eps,
            latent_norm_eps=config.lora_norm_eps,
            query_scale=self._modules[0].self_attn.scaling,
            embedding_scale=config.scale_emb,
            residual_scale=config.residual_scale,
            head_scale=1 / config.width_multiplier,
            rotary=self._address(_rotary_table(model, capacity)),
            embedding=self._plain(embedding.weight) if is_plain else self._matrix(_packed(embedding)),
            embedding_is_plain=is_plain,
            final_norm=self._vector(decoder.norm.weight),
            head=self._matrix(self._pack([model.lm_head], self.head_format)),
            layers=self._layers,
        )

    def _layer(self, layer: DecoderLayer) -> native.Layer:
        result = native.Layer(
            attention_norm=self._vector(layer.input_layernorm.weight),
            out_proj=self._matrix(self._pack([layer.self_attn.o_proj], self.format)),
            ffn_norm=self._vector(layer.post_attention_layernorm.weight),
        )
        attention = layer.self_attn
        if isinstance(attention, LatentAttention):
            result.in_proj = self._matrix(self._pack([attention.q_a_proj, attention.kv_a_proj_with_mqa], self.format))
            result.query_norm = self._vector(attention.q_a_layernorm.weight)
            result.latent_norm = self._vector(attention.kv_a_layernorm.weight)
            result.query_proj = self._matrix(self._pack([attention.q_b_proj], self.format))
            result.to_latent, result.to_values = self._absorbed(attention)
        else:
            assert isinstance(attention, GroupedQueryAttention)
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            result.in_proj = self._matrix(self._pack(parts, self.format))
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
            matrices.append(self._matrix(PackedMatrix(data, layout)))
        return matrices[0], matrices[1]

    def _add_ffn(self, result: native.Layer, ffn: nn.Module) -> None:
        if isinstance(ffn, GatedFFN):
            result.experts = self._experts(self._pack_dense(ffn))
            return
        assert isinstance(ffn, BlockFFN)
        router: Any = ffn.router
        experts = ffn.routed_experts
        if isinstance(experts, PackedRoutedExperts):
            packed = experts.experts
        else:
            assert isinstance(experts, RoutedExperts)
            packed = pack_experts(
                experts.up_proj, experts.down_proj, gate_proj_EFD=experts.gate_proj,
                format=self.format or STORED[experts.up_proj.dtype], group_size=self.group_size,
            )  # fmt: skip
        result.experts = self._experts(packed)
        result.router = self._matrix(pack_linear(router.proj.weight, format=STORED[router.proj.weight.dtype]))
        if isinstance(router, ReLURMSNormRouter):
            result.router_scale, result.router_normalizes = self._vector(router.norm.weight), 1
        else:
            assert isinstance(router, ReLURouter)
            result.router_scale = None if router.scale is None else self._vector(router.scale.weight)

    def _pack_dense(self, ffn: GatedFFN) -> PackedExperts:
        """The dense FFN as one gated expert."""
        modules: list[Any] = [ffn.up_proj, ffn.gate_proj, ffn.down_proj]
        if all(isinstance(module, PackedLinear) for module in modules):
            data = torch.cat([module.packed for module in modules])
            return PackedExperts(data.unsqueeze(0), modules[0].layout, modules[2].layout, True)
        up, gate, down = (_weight(module) for module in modules)
        format = self._format(ffn.up_proj, self.format)
        return pack_experts(up[None], down.T[None], gate_proj_EFD=gate[None], format=format, group_size=self.group_size)

    def _pack(self, modules: list[Any], format: str | None) -> PackedMatrix:
        """Linear maps of the same input as one matrix; each begins at a multiple of 32 outputs."""
        formats = {self._format(module, format) for module in modules}
        if all(isinstance(module, PackedLinear) for module in modules) and len(formats) == 1:
            matrices = [_packed(module) for module in modules]
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

    def _matrix(self, packed: PackedMatrix) -> native.Matrix:
        layout = packed.layout
        self._count(packed.data, layout.outputs * layout.inputs)
        address = self._address(packed.data)
        return native.Matrix(address, layout.outputs, layout.inputs, FORMATS[layout.format], layout.group_size)

    def _experts(self, packed: PackedExperts) -> native.Experts:
        up, down = packed.up, packed.down
        self._count(packed.data, packed.num_experts * up.outputs * up.inputs * (3 if packed.gated else 2))
        return native.Experts(
            self._address(packed.data), packed.data.shape[1], packed.num_experts, up.outputs, up.inputs,
            FORMATS[up.format], packed.gated, up.group_size, down.group_size,
        )  # fmt: skip

    def _count(self, data: Tensor, num_weights: int) -> None:
        self._packed_bytes += data.nbytes
        self._num_weights += num_weights

    def _plain(self, weight: Tensor) -> native.Matrix:
        """Rows where they lie, in float32 or bfloat16."""
        rows = weight.detach() if weight.dtype in CACHE_DTYPES else weight.detach().float()
        rows = rows.contiguous()
        return native.Matrix(self._address(rows), *rows.shape, FORMATS[CACHE_DTYPES[rows.dtype]], 0)

    def _vector(self, weight: Tensor) -> int:
        return self._address(weight.detach().float().contiguous())

    def _address(self, tensor: Tensor) -> int:
        self._owned.append(tensor)
        return tensor.data_ptr()


def _packed(module: PackedLinear | PackedEmbedding) -> PackedMatrix:
    return PackedMatrix(module.packed.detach(), module.layout)


def _weight(module: nn.Linear | PackedLinear) -> Tensor:
    if isinstance(module, PackedLinear):
        return unpack_matrix(module.packed, module.layout)
    return module.weight.detach()


def _rotary_table(model: BlockFFNForCausalLM, capacity: int) -> Tensor:
    """Cosines and sines `[capacity, 2, R / 2]` of all positions."""
    cos, sin = model.model.rotary_emb(torch.empty(0), position_ids=torch.arange(capacity).unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1).float().contiguous()
