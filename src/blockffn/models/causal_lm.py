"""The causal language model, as a Hugging Face `PreTrainedModel`, for BlockFFN and every baseline."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from blockffn.configuration import BlockFFNConfig
from blockffn.models.attention import make_attention
from blockffn.models.cache_name import CACHE_NAME, CACHE_NAMES, one_cache
from blockffn.models.experts import GatedFFN, RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.models.normalization import RMSNorm
from blockffn.models.packed_attention import NAME as PACKED_ATTENTION
from blockffn.models.packed_attention import document_offsets as offsets_of
from blockffn.models.rotary import RotaryEmbedding
from blockffn.models.routers import make_router
from blockffn.models.routers.relu import ExpertScale
from blockffn.routing import Routing


@dataclass
class BlockFFNModelOutput(BaseModelOutputWithPast):
    """Output of the decoder. `routings`, if asked for with `output_routing=True`: one per layer with experts."""

    routings: tuple[Routing, ...] | None = None


@dataclass
class BlockFFNCausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model: `loss` if labels were given, `logits [B, T, V]`, and the decoder's fields."""

    routings: tuple[Routing, ...] | None = None


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: `x + s·attention(norm(x))`, then `x + s·ffn(norm(x))`, with the config's residual scale `s`."""

    def __init__(self, config: BlockFFNConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = make_attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module
        if config.ffn_type == "dense" or layer_idx < config.first_k_dense_replace:
            self.mlp = GatedFFN(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = BlockFFN(
                config.hidden_size,
                config.num_experts,
                config.moe_intermediate_size,
                router=make_router(config),
                num_shared_experts=config.num_shared_experts,
                expert_gated=config.expert_gated,
                expert_activation=config.expert_activation,
                eps=config.rms_norm_eps,
                threshold=config.routing_threshold,
            )

    def forward(self, x: Tensor, **attention_kwargs: Any) -> tuple[Tensor, Tensor | None, Routing | None]:
        attended, attention = self.self_attn(self.input_layernorm(x), **attention_kwargs)
        x = x + self.residual_scale * attended
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + self.residual_scale * y, attention, routing


class BlockFFNPreTrainedModel(PreTrainedModel):
    config: BlockFFNConfig
    config_class = BlockFFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal initialisation, scaled with width as in the published recipe."""
        super()._init_weights(module)
        base = self.config.initializer_range
        std = base / self.config.width_multiplier**0.5
        if isinstance(module, nn.Linear):
            # Hugging Face initialises modules that own parameters, so a layer's special case is a mark on the module.
            own_std = getattr(module, "initializer_std", base if module is self.get_output_embeddings() else std)
            init.normal_(module.weight, std=own_std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=base)
        elif isinstance(module, RoutedExperts):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, std=std)
        elif isinstance(module, RMSNorm | ExpertScale):
            init.constant_(module.weight, module.initial)


class BlockFFNModel(BlockFFNPreTrainedModel):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        document_offsets: Tensor | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BlockFFNModelOutput | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds [B, T, D]`, which is scaled by `scale_emb` like embeddings.
            document_ids: `[B, T]` for packed rows: equal numbers are one document, -1 is padding. Attention stays
                within a document and positions restart at each. Excludes `attention_mask` and a cache.
            document_offsets: `packed_attention.document_offsets(document_ids)`, for the attention implementation
                `packed`, which otherwise waits for the device to find it.
            output_routing: return one `Routing` per layer with experts.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        cache = one_cache(past_key_values, cache)
        if document_ids is not None and (attention_mask is not None or cache is not None):
            raise ValueError("document_ids describes packed rows; it goes with neither attention_mask nor a cache")

        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and document_ids is None and not self.training:
            cache = DynamicCache(config=self.config)
        x = inputs_embeds * self.config.scale_emb
        if position_ids is None:
            position_ids = _positions(x, document_ids, cache)
        mask = self._attention_mask(x, attention_mask, position_ids, cache, document_ids)
        if self.config._attn_implementation == PACKED_ATTENTION:
            if document_ids is None:
                raise ValueError(
                    f"attention {PACKED_ATTENTION!r} is for packed rows: give document_ids, or choose another with "
                    "set_attn_implementation('sdpa')"
                )
            kwargs["document_offsets"] = offsets_of(document_ids) if document_offsets is None else document_offsets
        cos_sin = self.rotary_emb(x, position_ids=position_ids)

        states, attentions, routings = [], [], []
        for layer in self.layers:
            states.append(x)
            x, attention, routing = layer(
                x,
                position_embeddings=cos_sin,
                attention_mask=mask,
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
            attentions.append(attention)
            if routing is not None:
                routings.append(routing)
        x = self.norm(x)
        states.append(x)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attended = self.config.output_attentions if output_attentions is None else output_attentions
        output = BlockFFNModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if hidden else None,
            attentions=tuple(attentions) if attended else None,
            routings=tuple(routings) if output_routing and self.config.ffn_type != "dense" else None,
            **{CACHE_NAME: cache},
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _attention_mask(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        document_ids: Tensor | None,
    ) -> Any:
        and_mask = None
        if document_ids is not None:

            def and_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # fmt: skip
                return document_ids[b, q] == document_ids[b, k]

        return create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=None if document_ids is not None else position_ids,
            and_mask_function=and_mask,
            **{CACHE_NAME: cache},
        )


class BlockFFNForCausalLM(BlockFFNPreTrainedModel, GenerationMixin):
    """Decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # What opens folders that are not in our layout: named, not imported, because models know no file formats.
    foreign_loader = "blockffn.checkpoints.load"

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__(config)
        self.model = BlockFFNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_threshold(self, threshold: float) -> None:
        """Skip experts with `|weight| <= threshold` from now on, in every layer; 0 keeps all. Saved with the model.

        Raises:
            ValueError: a negative threshold, or a dense model, which has no experts to skip.
        """
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        if self.config.ffn_type == "dense":
            raise ValueError(f"a dense model has no experts to skip; leave the threshold ({threshold}) out")
        self.config.routing_threshold = threshold
        for module in self.modules():
            if isinstance(module, BlockFFN):
                module.threshold = threshold

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face; a local folder in another layout (published, training) is opened, too.

        For those, `dtype`, `device_map` (one device) and `quantization_config` are understood.
        """
        path = pretrained_model_name_or_path
        loader = importlib.import_module(cls.foreign_loader)
        if isinstance(path, (str, Path)) and loader.is_foreign(Path(path)):
            return loader.load_foreign(Path(path), **kwargs)
        return super().from_pretrained(path, *model_args, **kwargs)

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """Final hidden states `[..., D]` as the head wants them: divided by the width multiplier."""
        return hidden_states / self.config.width_multiplier

    def _get_candidate_generator(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        """What `generate(assistant_model=…)` asks for drafts: the assistant itself, if it can make them."""
        make = getattr(assistant_model, "make_candidates", None)
        if make is None:
            return cast(Any, super())._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)
        return make(kwargs["generation_config"], kwargs["model_kwargs"].get(CACHE_NAME))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BlockFFNCausalLMOutput | tuple[Any, ...]:
        """As `BlockFFNModel.forward`, then logits `[B, T, V]`.

        Args:
            labels: `[B, T]` token ids, not shifted; -100 is ignored. Adds `loss`, the mean cross entropy of tokens.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of the given indices.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            output_routing=output_routing,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.head_input(out.last_hidden_state[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = BlockFFNCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            routings=out.routings,
            **{CACHE_NAME: out.get(CACHE_NAME)},
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


def _wants_dict(config: BlockFFNConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _positions(x: Tensor, document_ids: Tensor | None, cache: Cache | None) -> Tensor:
    """Positions `[1 or B, T]`, going on from the cache, or restarting where the document changes."""
    index = torch.arange(x.shape[1], device=x.device)
    if document_ids is None:
        seen = cache.get_seq_length() if cache is not None else 0
        return (index + seen).unsqueeze(0)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


AutoModel.register(BlockFFNConfig, BlockFFNModel, exist_ok=True)
AutoModelForCausalLM.register(BlockFFNConfig, BlockFFNForCausalLM, exist_ok=True)
