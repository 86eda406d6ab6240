"""A model as the native step wants it: packed weights, and the description that points to them.

The step (`native/decode_step.cpp`) is an execution plan of `BlockFFNForCausalLM`, not another definition of it: this
module reads everything from the model's own modules, and tests hold the results equal.
"""

from __future__ import annotations

import torch
from torch import nn

from blockffn.configuration import BlockFFNConfig
from blockffn.inference.head_screen import HeadScreen
from blockffn.inference.native_weights import CACHE_DTYPES, NativeWeights, rotary_table
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.moe import BlockFFN
from blockffn.models.routers.projection import RouterProjection
from blockffn.ops import native
from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import DEFAULT_GROUP_SIZE


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


class NativeModel(NativeWeights):
    """The packed weights of `model` with an empty cache.

    Weights that the model already holds packed are used where they lie; plain ones are packed once, so later changes of
    the model do not show. Exceptions are the embedding table, of which a step reads single rows and which stays where
    it is, and thresholds, which `refresh_thresholds` takes over.

    Args:
        format, head_format, group_size: see `NativeWeights`.
        cache_dtype: float32 or bfloat16.
        screen_head: format of a coarse copy of the head, see `HeadScreen`; `None`: none.

    Attributes:
        description: what the C functions take.
        layers_with_experts: their numbers.
        head: the packed head. screen: its coarse copy, or `None`.

    Raises:
        ValueError: the model is not supported (`why_not_native`), a weight cannot be quantised, or the head cannot be
            screened in this format.
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
        screen_head: str | None = None,
    ) -> None:
        reason = why_not_native(model)
        if reason is not None:
            raise ValueError(f"the native step cannot run this model: {reason}")
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"the cache is float32 or bfloat16, got {cache_dtype}")
        super().__init__(format=format, head_format=head_format, group_size=group_size)
        self._modules = list(model.model.layers)
        self.layers_with_experts = [i for i, layer in enumerate(self._modules) if isinstance(layer.mlp, BlockFFN)]
        with torch.no_grad():
            self._layers = (native.Layer * len(self._modules))(*(self.layer(layer) for layer in self._modules))
            self.head = self.pack([model.lm_head], self.head_format)
            self.screen = (
                None if screen_head is None else HeadScreen.of(self.head, screen_head, group_size=self.group_size)
            )
            self.description = self._description(model, capacity, cache_dtype)
        self.refresh_thresholds()
        self.add_cache(self.description)
        self.most_experts = max(layer.experts.num_experts for layer in self._layers)

    def refresh_thresholds(self) -> None:
        """Take over the thresholds that the model's layers have now."""
        for description, module in zip(self._layers, self._modules):
            description.threshold = getattr(module.mlp, "threshold", 0.0)

    def _description(self, model: BlockFFNForCausalLM, capacity: int, cache_dtype: torch.dtype) -> native.Model:
        config, decoder = model.config, model.model
        is_latent = config.attention_type == "mla"
        embedding, is_plain = self.embedding(model)
        description = native.Model(
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
            rotary=self.address(rotary_table(decoder.rotary_emb, capacity)),
            embedding=embedding,
            embedding_is_plain=is_plain,
            final_norm=self.vector(decoder.norm.weight),
            head=self.matrix(self.head),
            layers=self._layers,
        )
        if self.screen is not None:
            # Beside the head it is no weight of the model's, so it does not count among these.
            layout, data = self.screen.matrix.layout, self.address(self.screen.matrix.data)
            format = FORMATS[layout.format]
            description.screen = native.Matrix(data, layout.outputs, layout.inputs, format, layout.group_size)
            description.screen_errors = self.address(self.screen.errors)
        return description
