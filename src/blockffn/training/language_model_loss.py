"""Next-token cross entropy of a linear head that never holds the logits of all tokens at once.

The gradient of a summed cross entropy needs nothing from the backward pass but one number, so it is made together with
the loss: a piece of the logits is computed once, turned into its own gradient and multiplied back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
MAX_LOGIT_BYTES = 1 << 28
MAX_LOGIT_BYTES_CUDA = 1 << 31  # every piece adds to the head's gradient, [V, D] in float32: on a GPU, few large pieces

ALIGNMENT = 64

LossAndGradient = Callable[[Tensor, Any, int], tuple[Tensor, Tensor]]


def language_model_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    *,
    loss_and_gradient: LossAndGradient | None = None,
) -> Tensor:
    """Sum (not mean) of cross entropies of `labels[:, t + 1]` given `hidden[:, t]`; 0-d, at least float32.

    Products run in the autocast dtype, if autocast is on; softmax and sums in float32.

    Args:
        hidden_BTD: the head's input, already scaled.
        head_VD: weight of the language-model head.
        labels_BT: not shifted, as Hugging Face has them; -100 is ignored.
        loss_and_gradient: `cross_entropy_and_gradient` (the default), or the same compiled.
    """
    hidden = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    targets = next_tokens(labels_BT).reshape(-1)
    return linear_loss(hidden, head_VD, targets, loss_and_gradient or cross_entropy_and_gradient)


def next_tokens(labels_BT: Tensor) -> Tensor:
    """What each position shall predict, `[B, T]`; -100 at a row's end.

    The targets move, not the hidden states: no copy of those, and pieces of equal size.
    """
    return torch.cat((labels_BT[:, 1:], labels_BT.new_full((labels_BT.shape[0], 1), IGNORE)), dim=1)


def linear_loss(hidden_TD: Tensor, head_VD: Tensor, targets: Any, loss_and_gradient: LossAndGradient) -> Tensor:
    """A loss of the logits `hidden @ head.T` that is a sum over tokens.

    Args:
        targets: anything of which `targets[a:b]` are the targets of tokens a to b.
        loss_and_gradient: takes logits, targets and vocabulary size of a piece (columns beyond it are padding) and
            returns losses, 0-d or `[n]`, with the gradient of the first of them; the others are for the log.

    Returns:
        The losses, at least float32.
    """
    loss: Tensor = _LinearLoss.apply(hidden_TD, head_VD, targets, loss_and_gradient)
    return loss


def cross_entropy_and_gradient(logits_TV: Tensor, targets_T: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, and its gradient `softmax(logits) - one_hot(target)` in the dtype of the logits.

    Rows whose target is -100 add nothing to either, and neither do columns from `vocab_size` on.
    """
    tokens = torch.arange(logits_TV.shape[-1], device=logits_TV.device)
    logits = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    logits = torch.where(tokens < vocab_size, logits, float("-inf"))
    counted = targets_T != IGNORE
    targets = torch.where(counted, targets_T, 0).unsqueeze(-1)
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    losses = (log_total - logits.gather(-1, targets)).squeeze(-1)
    gradient = (logits - log_total).exp() - (tokens == targets).to(logits.dtype)
    gradient = torch.where(counted.unsqueeze(-1), gradient, 0)
    return torch.where(counted, losses, 0).sum(), gradient.to(logits_TV.dtype)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets: Any, loss_and_gradient: LossAndGradient
    ) -> Tensor:
        device = hidden_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        hidden, vocab_size = hidden_TD.to(dtype), head_VD.shape[0]
        # Fast matrix products want aligned rows: an odd vocabulary makes them several times slower on a GPU.
        head = F.pad(head_VD.to(dtype), (0, 0, 0, -vocab_size % ALIGNMENT))
        limit = MAX_LOGIT_BYTES_CUDA if device == "cuda" else MAX_LOGIT_BYTES
        rows = max(1, limit // (dtype.itemsize * head.shape[0]))
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=total.dtype)
        for start in range(0, hidden.shape[0], rows):
            piece = slice(start, start + rows)
            loss, gradient = loss_and_gradient(hidden[piece] @ head.T, targets[piece], vocab_size)
            total = total + loss
            grad_hidden[piece] = gradient @ head
            grad_head += gradient.T @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_head[:vocab_size])
        ctx.dtypes = hidden_TD.dtype, head_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        grad_loss = grad_loss if grad_loss.ndim == 0 else grad_loss[0]
        hidden_dtype, head_dtype = ctx.dtypes
        return (grad_hidden * grad_loss).to(hidden_dtype), (grad_head * grad_loss).to(head_dtype), None, None
