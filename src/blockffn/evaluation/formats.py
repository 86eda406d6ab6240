"""Which weights of a model a packed format quantises, and what it costs in accuracy.

Quantised are the matrices that decoding streams: experts, attention projections and the language-model head. Embedding,
routers and norms are not: of the table one row is read a token, and a router that rounds chooses other experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.ops.native import FORMATS
from blockffn.ops.quantization import (
    DEFAULT_GROUP_SIZE,
    StoredWeight,
    pack_experts,
    pack_linear,
    relative_error,
)
from blockffn.ops.sparse_ffn import sparse_ffn, sparse_ffn_packed

PLAIN = "bf16"  # of what is not quantised


@dataclass(frozen=True)
class FormatError:
    """Mean relative error of a sparse FFN's output, and bits of one of its weights: scales included, padding not."""

    format: str
    bits_per_weight: float
    output_error: float


def stored_weights(
    model: BlockFFNForCausalLM, format: str, *, group_size: int = DEFAULT_GROUP_SIZE
) -> list[StoredWeight]:
    """Every parameter with the format that it gets, its size and its error.

    Raises:
        ValueError: unknown format or group size.
    """
    owners = {f"{name}.{own}": module for name, module in model.named_modules() for own in module._parameters}
    rows = []
    for name, weight in model.named_parameters():
        owner, matrix = owners[name], weight.detach().float()
        if isinstance(owner, RoutedExperts):
            matrix = matrix.transpose(1, 2) if name.endswith("down_proj") else matrix
        elif not isinstance(owner, nn.Linear) or ".router." in name:
            error = relative_error(matrix, matrix.to(torch.bfloat16).float())
            rows.append(StoredWeight(name, tuple(weight.shape), PLAIN, 2 * weight.numel(), error))
            continue
        # Experts are packed one by one, each padded to whole strips and groups.
        packed = [
            pack_linear(one, format=format, group_size=group_size) for one in matrix.reshape(-1, *matrix.shape[-2:])
        ]
        error = relative_error(matrix.flatten(0, -2), torch.cat([one.unpack() for one in packed]))
        num_bytes = sum(one.layout.num_bytes for one in packed)
        padding = sum(one.layout.padding_bytes for one in packed)
        rows.append(StoredWeight(name, tuple(weight.shape), format, num_bytes, error, padding))
    return rows


@torch.no_grad()
def format_errors(
    model: BlockFFNForCausalLM, *, group_size: int = DEFAULT_GROUP_SIZE, num_tokens: int = 64, seed: int = 0
) -> list[FormatError]:
    """The error of each format on the outputs of the sparse FFNs, for random normal tokens that the model routes.

    Raises:
        ValueError: a dense model, or experts with another activation than SiLU.
    """
    blocks = [module for module in model.modules() if isinstance(module, BlockFFN)]
    if not blocks or any(block.routed_experts.activation_norm is not None for block in blocks):
        raise ValueError("packed formats are for models with experts whose activation is silu")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, model.config.hidden_size, generator=generator)
    return [
        FormatError(format, *_mean([_output_error(block, x.to(model.device), format, group_size) for block in blocks]))
        for format in FORMATS
    ]


def _output_error(block: BlockFFN, x: Tensor, format: str, group_size: int) -> tuple[float, float]:
    experts, weights = block.routed_experts, block(x)[1].weights
    up, down, gate = experts.up_proj, experts.down_proj, experts.gate_proj
    packed = pack_experts(up, down, gate_proj_EFD=gate, format=format, group_size=group_size)
    expected = sparse_ffn(x, up, down, weights.to(x.dtype), gate_proj_EFD=gate, backend="reference")
    y = sparse_ffn_packed(x.cpu(), packed, weights.cpu())
    count = sum(tensor.numel() for tensor in (up, down, gate) if tensor is not None)
    num_bytes = packed.data.numel() - packed.padding_bytes
    return num_bytes * 8 / count, relative_error(expected.cpu(), y)


def _mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
