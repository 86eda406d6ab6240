"""`DecodePlan`: a model's pass over a few tokens as a list of fused operations, without any wait for the device.

A plan is derived from a model and computes what its modules compute; tests hold them equal. Shapes depend on the number
of tokens alone: how many rows of the cache are valid is read on the device. A step can therefore be captured in a CUDA
graph. The plan shares the model's weights; only the projections to queries, keys and values are copied, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockffn.inference.cached_attention import expansion_weight
from blockffn.inference.kv_cache import KVCache
from blockffn.models.attention import LatentAttention
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import GatedFFN, RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.models.routers.projection import RouterProjection
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.ops.decode import kernels
from blockffn.ops.decode.inputs import Router, StepInputs
from blockffn.ops.sparse_ffn import apply_threshold

PLAIN = (nn.Linear, nn.Embedding, RouterProjection)


@dataclass(frozen=True)
class StepOutputs:
    """What a step of `T` tokens leaves, padding included, in memory that the next step overwrites.

    Attributes:
        logits: `[T, V]` float32.
        hidden: `[T, D]`, after the last norm.
        counts: `[L, 1 + T]` int64: experts of the step together, then of each token; `None` for dense models.
    """

    logits: Tensor
    hidden: Tensor
    counts: Tensor | None


class DecodePlan:
    """Steps of up to 64 tokens of `model` over `cache` (batch 1).

    A step is `embed`, then `attend` and `feed_forward` for each layer, then `head`. Between them go the residual stream
    `x [T, D]` and the last `branch [T, D]`, which is not yet added to it.

    Args:
        backend: of `blockffn.ops.decode`.

    Raises:
        ValueError: the model has what a plan cannot run (`refuses_plan`).
    """

    def __init__(self, model: BlockFFNForCausalLM, cache: KVCache, *, backend: str = "auto") -> None:
        reason = refuses_plan(model)
        if reason is not None:
            raise ValueError(f"this model cannot be decoded by a plan: {reason}; use backend='model'")
        self.model, self.cache, self.config = model, cache, model.config
        decoder, self.scale = model.model, model.config.residual_scale
        norm = decoder.norm.weight
        self.ops = kernels(norm.device, backend)
        with torch.no_grad():
            self._projections = [_input_projection(layer.self_attn) for layer in decoder.layers]
            self._expansions = [
                expansion_weight(layer.self_attn).to(norm.dtype)
                for layer in decoder.layers
                if isinstance(layer.self_attn, LatentAttention)
            ]
            positions = torch.arange(min(cache.capacity, self.config.max_position_embeddings), device=norm.device)
            self._cos, self._sin = (
                table[0].contiguous() for table in decoder.rotary_emb(norm, position_ids=positions.unsqueeze(0))
            )

    @torch.no_grad()
    def step(self, inputs: StepInputs) -> StepOutputs:
        """Run the tokens of `inputs` and write them to the cache behind its committed rows."""
        x, branch, weights_LTE = self.embed(inputs), None, self.routing_weights(inputs.num_tokens)
        own_weights = iter(() if weights_LTE is None else weights_LTE)
        for i, layer in enumerate(self.model.model.layers):
            x, branch = self.attend(i, x, branch, inputs)
            out = next(own_weights) if isinstance(layer.mlp, BlockFFN) else None
            x, branch = self.feed_forward(i, x, branch, inputs, out)
        logits, hidden = self.head(x, branch)
        counts = None if weights_LTE is None else self.ops.count_active(weights_LTE)
        return StepOutputs(logits, hidden, counts)

    def routing_weights(self, num_tokens: int) -> Tensor | None:
        """Fresh memory `[L, T, E]` for the routing weights of a step; `None` for a dense model."""
        config = self.config
        if not config.num_moe_layers:
            return None
        like = self.model.model.norm.weight
        return like.new_empty(config.num_moe_layers, num_tokens, config.num_experts)

    def embed(self, inputs: StepInputs) -> Tensor:
        """The residual stream `[T, D]` before the first layer."""
        return F.embedding(inputs.tokens, self.model.model.embed_tokens.weight) * self.config.scale_emb

    def attend(self, index: int, x: Tensor, branch: Tensor | None, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Attention of a layer: `(x + scale * branch, the new branch)`."""
        layer = self.model.model.layers[index]
        module, norm = layer.self_attn, layer.input_layernorm
        projected, x = self.ops.norm_linear(
            x, self._projections[index], norm=norm.weight, eps=norm.eps, branch=branch, scale=self.scale
        )
        cache = self.cache.read(index, self.cache.capacity)[0]
        if isinstance(module, LatentAttention):
            out = self._latent(index, module, projected, cache, inputs)
        else:
            out = self.ops.grouped_attention(
                projected, cache, self._cos, self._sin, inputs, heads=module.num_heads, scaling=module.scaling
            )
        return x, self.ops.linear(out, module.o_proj.weight)

    def _latent(
        self, index: int, module: LatentAttention, projected: Tensor, cache: Tensor, inputs: StepInputs
    ) -> Tensor:
        config, T = self.config, len(projected)
        q_norm, kv_norm = module.q_a_layernorm, module.kv_a_layernorm
        q_latent, latents = projected.split([config.q_lora_rank, projected.shape[-1] - config.q_lora_rank], dim=-1)
        q, _ = self.ops.norm_linear(q_latent, module.q_b_proj.weight, norm=q_norm.weight, eps=q_norm.eps)
        q = q.view(T, module.num_heads, -1)
        to_keys, to_values = self._expansions[index].split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        absorbed = torch.bmm(q[..., : config.qk_nope_head_dim].transpose(0, 1), to_keys)
        mean = self.ops.latent_attention(
            absorbed, q, latents, cache, self._cos, self._sin, inputs,
            norm=kv_norm.weight, eps=kv_norm.eps, scaling=module.scaling,
        )  # fmt: skip
        return torch.bmm(mean.transpose(0, 1), to_values.transpose(1, 2)).transpose(0, 1).reshape(T, -1)

    def feed_forward(
        self, index: int, x: Tensor, branch: Tensor, inputs: StepInputs, weights_out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Feed-forward network of a layer: `(x + scale * branch, the new branch)`.

        Args:
            weights_out: `[T, E]`, receives the routing weights of a layer with experts.
        """
        layer = self.model.model.layers[index]
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        residual = {"norm": norm.weight, "eps": norm.eps, "branch": branch, "scale": self.scale}
        if isinstance(mlp, GatedFFN):
            hidden, x = self.ops.norm_linear(x, mlp.gate_proj.weight, up=mlp.up_proj.weight, **residual)
            return x, self.ops.linear(hidden, mlp.down_proj.weight)
        assert weights_out is not None
        router, experts = mlp.router, mlp.routed_experts
        if isinstance(router, ReLURMSNormRouter) and not mlp.num_shared_experts:
            in_float32 = router.proj.router_dtype == "float32"
            by = Router(router.proj.weight, router.norm.weight, router.norm.eps, in_float32, mlp.threshold)
            if _are_plain(experts):
                return self.ops.norm_route_experts(
                    x, by, **residual, inputs=inputs, out=weights_out,
                    up_proj=experts.up_proj, down_proj=experts.down_proj, backend=experts.backend,
                )  # fmt: skip
            x, normed = self.ops.norm_route(x, by, **residual, inputs=inputs, out=weights_out)
        else:
            x, normed = self.ops.add_norm(x, **residual)
            self._route(mlp, normed, inputs, weights_out)
        return x, experts(normed, weights_out)

    def _route(self, mlp: BlockFFN, normed: Tensor, inputs: StepInputs, weights_out: Tensor) -> None:
        """Any router, by its own module; padding activates nothing."""
        routed = weights_out[:, mlp.num_shared_experts :]
        routed.copy_(apply_threshold(mlp.router(normed).weights, mlp.threshold))
        weights_out[:, : mlp.num_shared_experts] = 1
        tokens = torch.arange(inputs.num_tokens, device=normed.device)
        weights_out.masked_fill_((tokens >= inputs.count).unsqueeze(-1), 0)

    def head(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `[T, V]` in float32 and the hidden states after the last norm `[T, D]`."""
        norm = self.model.model.norm
        _, hidden = self.ops.add_norm(x, norm.weight, eps=norm.eps, branch=branch, scale=self.scale)
        logits = self.ops.linear(self.model.head_input(hidden), self.model.lm_head.weight, float_output=True)
        return logits, hidden


def refuses_plan(model: BlockFFNForCausalLM) -> str | None:
    """Why a plan cannot run this model, or `None`."""
    assert model.config.rope_parameters is not None
    if model.config.rope_parameters["rope_type"] == "longrope":
        return "its rotary frequencies (longrope) change with the length of the text"
    for name, module in model.named_modules():
        is_projection = name.endswith(("_proj", "_proj_with_mqa", "router.proj", "lm_head", "embed_tokens"))
        if is_projection and type(module) not in PLAIN:
            return f"{name} is a {type(module).__name__}, not plain weights; dequantize or merge it first"
    return None


def _are_plain(experts: nn.Module) -> bool:
    """Whether these are `sum_e weight * down_e(silu(up_e(x)))` over weights that are not packed or adapted."""
    return type(experts) is RoutedExperts and experts.gate_proj is None and experts.activation_norm is None


def _input_projection(module: nn.Module) -> Tensor:
    """The projections that take a layer's input, side by side: `[O, D]`."""
    latent = ("q_a_proj", "kv_a_proj_with_mqa")
    names = latent if isinstance(module, LatentAttention) else ("q_proj", "k_proj", "v_proj")
    return torch.cat([module.get_parameter(f"{name}.weight") for name in names])
