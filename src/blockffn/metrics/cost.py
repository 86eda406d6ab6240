"""What a model costs, from its configuration alone: parameters, floating-point operations and weight bytes per token.

Everything that depends on sparsity takes the token-level sparsity in percent; `None` means that all experts are
computed, as dense training does.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockffn.configuration import BlockFFNConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters by part.

    Attributes:
        embedding: the input table; with tied embeddings also the language-model head, whose own count is then 0.
        attention: projections, and the norms of MLA's latents.
        router: projections, and the router's norm or scale.
        experts: all experts of all layers.
        dense_ffn: the gated feed-forward networks of the dense control and of DECO's first layer.
        norms: layer norms, the final norm, and NormSiLU's.
        lm_head: the language-model head.
    """

    embedding: int
    attention: int
    router: int
    experts: int
    dense_ffn: int
    norms: int
    lm_head: int

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the language-model head: the count that papers quote."""
        return self.attention + self.router + self.experts + self.dense_ffn + self.norms

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding + self.lm_head


def parameter_counts(config: BlockFFNConfig) -> ParameterCounts:
    """Parameters of the model that `config` describes, to the unit."""
    d, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_experts
    moe_layers = config.num_moe_layers
    table = config.vocab_size * d
    routed = experts - config.num_shared_experts
    router = routed * d + (routed if config.router_type in ("relu_rmsnorm", "relu_scaled") else 0)
    expert_norm = config.moe_intermediate_size if config.expert_activation == "norm_silu" else 0
    matrices_per_expert = 3 if config.expert_gated else 2
    return ParameterCounts(
        embedding=table,
        attention=layers * _attention_parameters(config),
        router=moe_layers * router,
        experts=moe_layers * experts * matrices_per_expert * config.moe_intermediate_size * d,
        dense_ffn=(layers - moe_layers) * 3 * config.intermediate_size * d,
        norms=(2 * layers + 1) * d + moe_layers * expert_norm,
        lm_head=0 if config.tie_word_embeddings else table,
    )


def active_parameters(config: BlockFFNConfig, tls_percent: float) -> float:
    """Non-embedding parameters that one token uses on average: experts count by the share that is active.

    Raises:
        ValueError: sparsity outside 0 to 100 percent.
    """
    counts = parameter_counts(config)
    return counts.non_embedding - counts.experts * (1 - _active_share(tls_percent))


def flops_per_token(
    config: BlockFFNConfig, *, context: float, tls_percent: float | None = None, training: bool = False
) -> float:
    """Floating-point operations of matrix products for one token; a multiplication with its addition counts as 2.

    Norms, activations, softmax and the weighting of the experts are left out.

    Args:
        context: positions that the token attends to. Its mean over a causal sequence of T tokens is (T + 1) / 2.
        tls_percent: token-level sparsity in percent; `None`: all experts are computed.
        training: with the backward pass, which costs twice the forward pass.

    Raises:
        ValueError: negative context, or sparsity outside 0 to 100 percent.
    """
    if context < 0:
        raise ValueError(f"context must not be negative, got {context}")
    counts = parameter_counts(config)
    if config.attention_type == "mla":
        head_width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        assert config.head_dim is not None
        head_width = 2 * config.head_dim
    attention_products = config.num_hidden_layers * config.num_attention_heads * head_width * context
    weights = (
        _matrix_parameters(config)
        + counts.experts * _active_share(tls_percent)
        + config.vocab_size * config.hidden_size
    )
    return (3 if training else 1) * 2 * (weights + attention_products)


def weight_bytes_per_token(
    config: BlockFFNConfig, *, bits_per_weight: float = 16, tls_percent: float | None = None
) -> float:
    """Bytes of weights that decoding one token reads: all weights but the embedding table, of which it reads one row.

    Args:
        bits_per_weight: 16 for bf16; quantised formats with their scales, such as 4.5.
        tls_percent: token-level sparsity in percent; `None`: all experts are read.

    Raises:
        ValueError: bits not positive, or sparsity outside 0 to 100 percent.
    """
    if bits_per_weight <= 0:
        raise ValueError(f"bits_per_weight must be positive, got {bits_per_weight}")
    counts = parameter_counts(config)
    always = counts.non_embedding - counts.experts + (config.vocab_size + 1) * config.hidden_size
    return (always + counts.experts * _active_share(tls_percent)) * bits_per_weight / 8


def cost_summary(config: BlockFFNConfig, *, tls_percent: float | None) -> dict[str, float]:
    """What one decoded token costs, as plain numbers: parameters in all and active, FLOPs, bytes of bf16 weights.

    FLOPs leave out the products of attention with its context, which depend on the context's length.
    """
    return {
        "parameters": parameter_counts(config).total,
        "non_embedding_parameters": parameter_counts(config).non_embedding,
        "active_parameters": active_parameters(config, tls_percent or 0.0),
        "flops_per_token": flops_per_token(config, context=0, tls_percent=tls_percent),
        "weight_bytes_per_token": weight_bytes_per_token(config, tls_percent=tls_percent),
    }


def _attention_parameters(config: BlockFFNConfig) -> int:
    d, heads = config.hidden_size, config.num_attention_heads
    if config.attention_type == "mla":
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        queries = d * config.q_lora_rank + config.q_lora_rank * heads * (nope + rope)
        keys_values = d * (config.kv_lora_rank + rope) + config.kv_lora_rank * heads * (nope + value)
        return queries + keys_values + heads * value * d + _latent_norm_parameters(config)
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    return 2 * d * config.head_dim * (heads + config.num_key_value_heads)


def _latent_norm_parameters(config: BlockFFNConfig) -> int:
    return config.q_lora_rank + config.kv_lora_rank if config.attention_type == "mla" else 0


def _matrix_parameters(config: BlockFFNConfig) -> int:
    """Weights of all layers' matrices that every token multiplies with, experts excluded."""
    attention = _attention_parameters(config) - _latent_norm_parameters(config)
    router = (config.num_experts - config.num_shared_experts) * config.hidden_size
    dense_ffn = parameter_counts(config).dense_ffn
    return config.num_hidden_layers * attention + config.num_moe_layers * router + dense_ffn


def _active_share(tls_percent: float | None) -> float:
    if tls_percent is None:
        return 1.0
    if not 0 <= tls_percent <= 100:
        raise ValueError(f"token-level sparsity is in percent, between 0 and 100; got {tls_percent}")
    return 1 - tls_percent / 100
