"""The draft over packed rows, again and again, as it will run when it drafts several tokens ahead.

Pair `i` of a row is the embedding of token `i + 1` with the target's state of token `i`; the draft's output there
describes token `i + 2`. When it drafts `s` tokens ahead, pair `i` holds its own output for pair `i - 1` in place of the
target's state, and so do the `s - 1` pairs before; further back there are states of the target. Pass `s` is that
situation for every pair at once: it reads keys and values of the passes before (EAGLE-3's training-time test).
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.models.draft import DraftModel


class PassCache:
    """Keys and values of all passes so far, end to end; a mask says which of them a pair sees."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, K]` and `[B, H, T, W]`; returns all passes of the layer."""
        if layer_idx in self._layers:
            old_key, old_value = self._layers[layer_idx]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self._layers[layer_idx] = key, value
        return key, value


def run_passes(
    draft: DraftModel, embeddings: Tensor, hidden: Tensor, document_ids: Tensor, *, passes: int, mask_dtype: torch.dtype
) -> Tensor:
    """The draft's outputs `[S, B, T, D]` in each pass. Where `counted_pairs` is false they mean nothing.

    Args:
        embeddings: `[B, T, D]` of token `i + 1` at pair `i`. hidden: `[B, T, D]`, the target's states.
        document_ids: `[B, T]`, of token `i`; -1 is padding. Pairs see those of their own document.
        mask_dtype: that of the draft's queries.
    """
    cache, outputs, x = PassCache(), [], hidden
    for step in range(passes):
        mask = torch.zeros((), dtype=mask_dtype, device=x.device).masked_fill(
            ~visible_pairs(document_ids, step), -torch.inf
        )
        x = draft(embeddings, x, attention_mask=mask[:, None], cache=cache)
        outputs.append(x)
        x = x.roll(1, dims=1)
    return torch.stack(outputs)


def visible_pairs(document_ids: Tensor, step: int) -> Tensor:
    """What pair `i` sees in pass `step` (from 0): `[B, T, (step + 1) T]` bool.

    Of pass 0 the pairs up to `i - step` of its document, of pass `p > 0` the pair `i - (step - p)`; always itself.
    """
    T = document_ids.shape[1]
    index = torch.arange(T, device=document_ids.device)
    distance = index[:, None] - index
    same = document_ids[:, :, None] == document_ids[:, None, :]
    known = same & (distance >= step)
    own = [(distance == step - p).expand_as(same) for p in range(1, step + 1)]
    return torch.cat((known, *own), dim=-1)


def counted_pairs(document_ids: Tensor, step: int) -> Tensor:
    """Pairs `[B, T]` (bool) that teach in pass `step`: all that they lean on and token `i + 2` are of one document."""
    T = document_ids.shape[1]
    counted = torch.zeros_like(document_ids, dtype=torch.bool)
    if step + 3 > T:
        return counted
    now, first, last = document_ids[:, step : T - 2], document_ids[:, : T - 2 - step], document_ids[:, step + 2 :]
    counted[:, step : T - 2] = (now >= 0) & (now == first) & (now == last)
    return counted


def accepted_and_tried(hits: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """How often a chain of drafts, if the text were the target's, gets one token further: two counts `[S]`, float32.

    Args:
        hits: `[S, B, T]` bool, the draft's first choice is the target's. counted: `[S, B, T]` bool.

    `accepted / tried` is the rate at which the token of that depth is accepted where all before it are.
    """
    accepted, tried = [], []
    alive = torch.ones_like(counted[0])
    for hit, may in zip(hits, counted):
        reached = alive & may
        alive = reached & hit
        tried.append(reached.sum())
        accepted.append(alive.sum())
        alive = alive.roll(1, dims=1)
    return torch.stack(accepted).float(), torch.stack(tried).float()
