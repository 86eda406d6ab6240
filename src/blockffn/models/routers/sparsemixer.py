"""GRIN's router: SparseMixer-v2 (arXiv 2409.12136), top-k by sampling with an estimate of the gradient of the choice.

k experts are picked one after the other, each from the softmax over those not yet picked whose logit lies close enough
to the largest one left. Training samples, evaluation takes the largest. An expert's weight is its probability at its
pick; the weights of a token do not sum to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockffn.models.routers.projection import RouterProjection
from blockffn.routing import Routing


class SparseMixerRouter(nn.Module):
    """Maps tokens `[..., D]` to a `Routing` of `[..., E]` in float32 with k active experts a token.

    Shares are the plain softmax over all experts, for load balancing.

    Args:
        num_experts_per_tok: k.
        jitter_noise: picks keep to logits within `2 · jitter_noise` of the largest, relative to the larger of that and
            their own size.
        dtype, initializer_range: of the projection, see `RouterProjection`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        jitter_noise: float = 0.1,
        dtype: str = "model",
        initializer_range: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok must lie in 1…{num_experts}, got {num_experts_per_tok}")
        self.num_experts_per_tok = num_experts_per_tok
        self.jitter_noise = jitter_noise
        self.proj = RouterProjection(hidden_size, num_experts, dtype=dtype, initializer_range=initializer_range)

    def forward(self, x: Tensor) -> Routing:
        logits = self.proj(x)
        left = torch.ones_like(logits, dtype=torch.bool)
        weights = torch.zeros_like(logits)
        for _ in range(self.num_experts_per_tok):
            chosen, weight = pick(logits, left, jitter_noise=self.jitter_noise, sample=self.training)
            weights = torch.where(chosen, weight, weights)
            left = left & ~chosen
        return Routing(logits=logits, shares=logits.softmax(dim=-1), weights=weights)


def pick(logits: Tensor, left: Tensor, *, jitter_noise: float, sample: bool) -> tuple[Tensor, Tensor]:
    """One expert a token, as bool `[..., E]`, and its weight `[..., 1]`.

    The weight is the expert's probability `p`. When sampling, an expert that is not the most likely one keeps it with
    probability 1/4 and otherwise gets a third of it, which makes the gradient Heun's third-order estimate
    (`f(p) - f(0) ≈ p·(f'(p) + 3 f'(p/3)) / 4`). The gradient to the logits is that of `p` in either case: the factor
    says where the network is evaluated, not how the probability depends on the logits.

    Args:
        logits: float `[..., E]`.
        left: bool `[..., E]`, experts not yet picked; at least one a token.

    Masks in place of indices keep all k picks elementwise, so that a compiler fuses them.
    """
    with torch.no_grad():
        available = logits.masked_fill(~left, -torch.inf)
        largest = available.max(dim=-1, keepdim=True).values
        near = (largest - logits) / torch.maximum(logits.abs(), largest) <= 2 * jitter_noise
        # The largest itself is always near; 0 / 0, where every logit is 0, would say otherwise.
        candidates = left & (near | (available == largest))
    scores = logits.masked_fill(~candidates, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    likeliest = scores.argmax(dim=-1, keepdim=True)
    experts = torch.arange(logits.shape[-1], device=logits.device)
    if not sample:
        chosen = experts == likeliest
        return chosen, (probabilities * chosen).sum(dim=-1, keepdim=True)
    # The largest of logits plus Gumbel noise is a sample from their softmax; the clamps keep a uniform 0 finite.
    exponential = -torch.rand_like(scores).clamp_min(1e-30).log()
    expert = (scores - exponential.clamp_min(1e-30).log()).argmax(dim=-1, keepdim=True)
    chosen = experts == expert
    probability = (probabilities * chosen).sum(dim=-1, keepdim=True)
    whole = (expert == likeliest) | (torch.rand_like(probability) < 0.25)
    evaluated_at = torch.where(whole, probability, probability / 3)
    return chosen, probability + (evaluated_at - probability).detach()
