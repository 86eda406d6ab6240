"""Next-token cross entropy in float32 that never holds the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
MAX_LOGIT_BYTES = 1 << 28


def language_model_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    *,
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum (not mean) of cross entropies of `labels[:, t + 1]` given `hidden[:, t]`.

    Args:
        hidden_BTD: the head's input, already scaled.
        head_VD: weight of the language-model head.
        labels_BT: not shifted, as Hugging Face has them; -100 is ignored.
        apply: computes the loss of a piece; default `cross_entropy_sum`, or the same compiled.

    Where the float32 logits would exceed 256 MiB they are made in pieces and made again in the backward pass.
    """
    hidden = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    targets = labels_BT[:, 1:].reshape(-1)
    apply = apply or cross_entropy_sum
    rows = max(1, MAX_LOGIT_BYTES // (4 * head_VD.shape[0]))
    if hidden.shape[0] <= rows:
        return apply(hidden, head_VD, targets)
    total = hidden.new_zeros((), dtype=hidden.dtype).float()
    for start in range(0, hidden.shape[0], rows):
        piece = slice(start, start + rows)
        total = total + checkpoint(apply, hidden[piece], head_VD, targets[piece], use_reentrant=False)
    return total


def cross_entropy_sum(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Summed cross entropy of tokens `[T, D]` under a head `[V, D]`."""
    logits = F.linear(hidden_TD, head_VD).float()
    return F.cross_entropy(logits, targets_T, ignore_index=IGNORE, reduction="sum")
