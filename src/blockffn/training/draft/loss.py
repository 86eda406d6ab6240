"""Divergence of a draft's next-token distribution from its target's, through a head that does not learn.

As for the language model, logits of all tokens are never held at once; and those of the target, which all passes of the
draft are compared with, are made once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockffn.training.language_model_loss import MAX_LOGIT_BYTES, MAX_LOGIT_BYTES_CUDA

DivergenceAndGradient = Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor]]


def head_divergence(
    inputs_SND: Tensor,
    target_ND: Tensor,
    head_VD: Tensor,
    token_ids: Tensor | None,
    weights_SN: Tensor,
    *,
    divergence_and_gradient: DivergenceAndGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL divergence from the target's distribution to the draft's, of `N` tokens in `S` passes.

    Args:
        inputs_SND: the draft's head's input. target_ND: the target's, at the token that is described.
        head_VD: the head of both; it gets no gradient.
        token_ids: `[V']`, the draft's vocabulary: over these alone both distributions go; `None`: all.
        weights_SN: of each divergence in the sum; float32.

    Returns:
        the weighted sum, 0-d float32, with a gradient; the divergences `[S, N]`; and whether the draft's first choice
        is the target's (among all tokens), `[S, N]` bool.
    """
    function = divergence_and_gradient or divergence_and_gradient_of
    loss, divergences, hits = _HeadDivergence.apply(inputs_SND, target_ND, head_VD, token_ids, weights_SN, function)
    return loss, divergences, hits


def divergence_and_gradient_of(
    draft_SNV: Tensor, target_NV: Tensor, token_ids: Tensor | None, weights_SN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences `[S, N]`, hits `[S, N]`, and the gradient of the weighted sum, of the logits' shape and dtype.

    Args:
        draft_SNV: `[S, N, V']`. target_NV: `[N, V]`, of all tokens.
    """
    wanted = target_NV if token_ids is None else target_NV[:, token_ids]
    theirs = wanted.float().log_softmax(dim=-1)
    ours = draft_SNV.float().log_softmax(dim=-1)
    probabilities = theirs.exp()
    divergences = (probabilities * (theirs - ours)).sum(dim=-1)
    chosen = draft_SNV.argmax(dim=-1)
    hits = (chosen if token_ids is None else token_ids[chosen]) == target_NV.argmax(dim=-1)
    gradient = (ours.exp() - probabilities) * weights_SN.unsqueeze(-1)
    return divergences, hits, gradient.to(draft_SNV.dtype)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs_SND: Tensor,
        target_ND: Tensor,
        head_VD: Tensor,
        token_ids: Tensor | None,
        weights_SN: Tensor,
        function: DivergenceAndGradient,
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes, tokens, _ = inputs_SND.shape
        inputs = inputs_SND.to(head_VD.dtype)
        draft_head = head_VD if token_ids is None else head_VD[token_ids]
        limit = MAX_LOGIT_BYTES_CUDA if inputs.device.type == "cuda" else MAX_LOGIT_BYTES
        size = max(1, limit // (head_VD.element_size() * (passes * len(draft_head) + len(head_VD))))
        divergences = torch.empty(passes, tokens, dtype=torch.float32, device=inputs.device)
        hits = torch.empty(passes, tokens, dtype=torch.bool, device=inputs.device)
        grad_inputs = torch.empty_like(inputs)
        for start in range(0, tokens, size):
            piece = slice(start, start + size)
            divergences[:, piece], hits[:, piece], gradient = function(
                inputs[:, piece] @ draft_head.T,
                target_ND[piece].to(head_VD.dtype) @ head_VD.T,
                token_ids,
                weights_SN[:, piece],
            )
            grad_inputs[:, piece] = gradient @ draft_head
        ctx.save_for_backward(grad_inputs)
        ctx.dtype = inputs_SND.dtype
        ctx.mark_non_differentiable(divergences, hits)
        return (divergences * weights_SN).sum(), divergences, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_inputs,) = ctx.saved_tensors
        return (grad_inputs * grad_loss).to(ctx.dtype), None, None, None, None, None
