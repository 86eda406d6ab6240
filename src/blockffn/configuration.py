"""The one Hugging Face configuration for BlockFFN and every baseline.

A method is a value of `ffn_type` and `router_type`; everything else is shared. Sizes and methods of the paper are in
`blockffn.presets`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

ATTENTION_TYPES = ("mla", "gqa")
FFN_TYPES = ("moe", "dense")
ROUTER_TYPES = ("relu_rmsnorm", "relu", "relu_scaled", "topk", "sparsemixer")
TOP_K_ROUTER_TYPES = ("topk", "sparsemixer")
ROUTER_DTYPES = ("model", "float32")
MISSPELT = 0.85  # so alike are the names of a field and its misspelling
EXPERT_ACTIVATIONS = ("silu", "norm_silu")


@strict
class BlockFFNConfig(PreTrainedConfig):
    """Architecture of a causal language model with a sparse (or dense) feed-forward network.

    Attributes:
        ffn_type: `moe` (router and experts) or `dense` (gated SiLU of width `intermediate_size`, the control).
        router_type: `relu_rmsnorm` (the paper's `RMSNorm(ReLU(W x))`), `relu` (the same without the norm; ReMoE's),
            `relu_scaled` (a learned factor per expert instead of the norm; DECO's), `topk` (softmax, then the k
            largest) or `sparsemixer` (GRIN's sampled top-k).
        router_dtype: in which the router multiplies with its projection: `model` (that of the model, bfloat16 under
            autocast) or `float32`. Everything after the product is float32 either way.
        router_initializer_range: standard deviation of the router's projection; `None`: as the other matrices.
        router_scale_initializer: start of the learned factors of `relu_rmsnorm` (its norm's scale) and `relu_scaled`.
        router_norm_eps: epsilon of the norm of `relu_rmsnorm`; `None`: `rms_norm_eps`, as published. One as large as
            the mean square of the activations lets a token that excites its experts little also take little from them.
        router_jitter_noise: `sparsemixer` samples among logits within twice this of the largest, relative to their
            size.
        routing_threshold: experts whose routing weight is at most this in magnitude are skipped; 0 keeps all. A
            choice at run time (`BlockFFNForCausalLM.set_threshold`), not of training.
        num_experts, moe_intermediate_size: number and width of the experts, shared ones included.
        num_experts_per_tok: experts that a token uses with a top-k router, shared ones included. Other routers choose
            their own number; ReMoE's penalty aims at this one.
        num_shared_experts: the first so many experts are active for every token and not routed to.
        first_k_dense_replace: so many first layers have a dense FFN of `intermediate_size` instead of experts.
        expert_activation: `silu`, or `norm_silu` (DECO's; see `blockffn.ops.sparse_ffn.norm_silu`).
        expert_gated: experts are `silu(gate x) * (up x)`; an ablation, the paper's experts are not gated.
        attention_type: `mla` (latent attention: `q_lora_rank`, `kv_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim`,
            `v_head_dim`) or `gqa` (grouped queries: `num_key_value_heads`, `head_dim`).
        lora_norm_eps: epsilon of the norms of MLA's two latents; 1e-6 in the published models.
        scale_emb: factor on embeddings. scale_depth: residual branches are scaled by `scale_depth / sqrt(layers)`;
            `None` leaves them alone. dim_model_base: hidden states are divided by `hidden_size / dim_model_base` before
            the language-model head; `None` leaves them alone.
        initializer_range: standard deviation at `dim_model_base`; matrices get it over the square root of
            `hidden_size / dim_model_base`.
        kv_b_initializer_range: standard deviation of MLA's `kv_b_proj`, which the published recipe draws unscaled.
    """

    model_type = "blockffn"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "routings"]  # noqa: RUF012

    vocab_size: int = 122753
    hidden_size: int = 768
    num_hidden_layers: int = 16
    rms_norm_eps: float = 1e-5

    ffn_type: str = "moe"
    router_type: str = "relu_rmsnorm"
    router_dtype: str = "model"
    router_initializer_range: float | None = None
    router_scale_initializer: float = 1.0
    router_norm_eps: float | None = None
    router_jitter_noise: float = 0.1
    routing_threshold: float = 0.0
    num_experts: int = 48
    num_experts_per_tok: int = 10
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    moe_intermediate_size: int = 64
    expert_gated: bool = False
    expert_activation: str = "silu"
    intermediate_size: int = 2064

    attention_type: str = "mla"
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    q_lora_rank: int = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    lora_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None

    scale_emb: float = 12.0
    scale_depth: float | None = 1.4
    dim_model_base: int | None = 256
    initializer_range: float = 0.1
    kv_b_initializer_range: float = 0.02

    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:  # fields of no name known here; Hugging Face keeps them, whatever they are
            if meant := get_close_matches(name, type(self).__annotations__, 1, MISSPELT):
                raise ValueError(f"unknown field {name!r}; did you mean {meant[0]!r}?")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_type == "mla":
            self.head_dim = self.qk_rope_head_dim  # what Hugging Face's rotary embedding reads
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict` after every construction. Raises `ValueError` naming the field that is wrong."""
        _check_choice("attention_type", self.attention_type, ATTENTION_TYPES)
        _check_choice("ffn_type", self.ffn_type, FFN_TYPES)
        _check_choice("router_type", self.router_type, ROUTER_TYPES)
        _check_choice("router_dtype", self.router_dtype, ROUTER_DTYPES)
        _check_choice("expert_activation", self.expert_activation, EXPERT_ACTIVATIONS)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts",
                     "moe_intermediate_size", "intermediate_size"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.routing_threshold >= 0:
            raise ValueError(f"routing_threshold must be at least 0, got {self.routing_threshold}")
        if self.ffn_type == "moe":
            self._validate_experts()
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head dimension, got {self.head_dim}")

    def _validate_experts(self) -> None:
        if not 0 <= self.num_shared_experts < self.num_experts:
            raise ValueError(
                f"num_shared_experts must be at least 0 and leave experts to route to; got {self.num_shared_experts} "
                f"of num_experts {self.num_experts}"
            )
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace must be at least 0 and leave a layer with experts; got "
                f"{self.first_k_dense_replace} of num_hidden_layers {self.num_hidden_layers}"
            )
        if self.router_type in TOP_K_ROUTER_TYPES and not (
            self.num_shared_experts < self.num_experts_per_tok <= self.num_experts
        ):
            raise ValueError(
                f"num_experts_per_tok must be above num_shared_experts ({self.num_shared_experts}) and at most "
                f"num_experts ({self.num_experts}), got {self.num_experts_per_tok}"
            )
        scale = self.router_scale_initializer
        if not 0 < scale < float("inf"):
            raise ValueError(f"router_scale_initializer must be finite and positive, got {scale}")
        if self.router_norm_eps is not None and not 0 < self.router_norm_eps < float("inf"):
            raise ValueError(f"router_norm_eps must be finite and positive, or null; got {self.router_norm_eps}")
        if not 0 <= self.router_jitter_noise < float("inf"):
            raise ValueError(f"router_jitter_noise must be finite and at least 0, got {self.router_jitter_noise}")
        if self.expert_gated and self.expert_activation != "silu":
            raise ValueError(f"gated experts have the activation silu, got {self.expert_activation!r}")

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts, and therefore a `Routing`: all but the first `first_k_dense_replace`."""
        return 0 if self.ffn_type == "dense" else self.num_hidden_layers - self.first_k_dense_replace

    @property
    def residual_scale(self) -> float:
        """Factor on each residual branch."""
        return 1.0 if self.scale_depth is None else self.scale_depth / self.num_hidden_layers**0.5

    @property
    def width_multiplier(self) -> float:
        """`hidden_size / dim_model_base`: divides the head's input and the learning rate of matrices (muP)."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


AutoConfig.register(BlockFFNConfig.model_type, BlockFFNConfig, exist_ok=True)
