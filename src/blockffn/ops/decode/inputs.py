"""`StepInputs`: what changes from step to step, in one small tensor on the device. `Router`: what a layer routes by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class StepInputs:
    """Inputs of a step of up to `num_tokens` tokens: fixed memory, which a CUDA graph reads and one copy fills.

    Attributes, views of one int64 tensor:
        length: `[1]`, rows of the cache that are committed. Token `t` is cached in row `length + t`.
        count: `[1]`, how many tokens are real; the others are padding.
        tokens, positions: `[T]`.
        visible: `[T]`, bit `s` of number `t`: token `t` sees token `s` of the step. Each sees itself.

    And `counter`, int32, with which programs of a kernel find out who is last; 0 between kernels.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        T = num_tokens
        assert 1 <= T <= 64
        self.num_tokens = T
        self.data = torch.zeros(2 + 3 * T, dtype=torch.int64, device=device)
        self.length, self.count, self.tokens, self.positions, self.visible = self.data.split([1, 1, T, T, T])
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)

    def fill(self, length: int, tokens: list[int], parents: list[int] | None = None) -> None:
        """Set all by one copy, which the host does not wait for; padding has token 0 at position 0 and sees itself.

        Args:
            parents: index of each token's parent, smaller than its own, -1 for the last committed token; `None`: a
                chain.
        """
        positions, visible = list[int](), list[int]()
        for t, parent in enumerate(range(-1, len(tokens) - 1) if parents is None else parents):
            positions.append(length if parent < 0 else positions[parent] + 1)
            visible.append((visible[parent] if parent >= 0 else 0) | 1 << t)
        padding = range(len(tokens), self.num_tokens)
        visible += [1 << t for t in padding]
        signed = [bits - (1 << 64) if bits >> 63 else bits for bits in visible]
        zeros = [0] * len(padding)
        data = [length, len(tokens), *tokens, *zeros, *positions, *zeros, *signed]
        self.data.copy_(torch.tensor(data), non_blocking=True)

    def fill_on_device(self, length: int, tokens: Tensor, ancestors: Tensor) -> None:
        """As `fill`, from the device: `tokens [count]` and which of them each sees, `ancestors [count, count]` bool."""
        count = len(tokens)
        self.fill(length, [0] * count)
        self.tokens[:count] = tokens
        self.positions[:count] = length + ancestors.sum(dim=-1) - 1
        self.visible[:count] = visible_bits(ancestors)


@dataclass(frozen=True)
class Router:
    """BlockFFN's router.

    Attributes:
        weight, norm: `[E, D]` and `[E]`. eps: of the norm.
        float32: multiply in float32 and keep its bits; otherwise logits are rounded to the dtype of the tokens.
        threshold: weights up to it are 0.
    """

    weight: Tensor
    norm: Tensor
    eps: float
    float32: bool
    threshold: float


def visible_bits(ancestors: Tensor) -> Tensor:
    """`[T]` int64, bit `s` of number `t` set where `ancestors [T, T]` (bool) is."""
    bits = torch.ones(len(ancestors), dtype=torch.int64, device=ancestors.device) << torch.arange(
        len(ancestors), device=ancestors.device
    )
    return (ancestors.to(torch.int64) * bits).sum(dim=-1)
