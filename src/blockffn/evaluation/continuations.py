"""Log-likelihoods of many short continuations under any causal language model with logits.

Follows the conventions of EleutherAI's lm-evaluation-harness, so that the numbers are the same. A text without context
is encoded without special tokens and stands behind the tokenizer's BOS token (EOS where there is none). Otherwise
context and continuation are encoded together, with the special tokens that the tokenizer adds by itself, and cut where
the context alone ends; spaces at the end of a context belong to its continuation. What is too long loses its left end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
LOGIT_BYTES = {"cuda": 1 << 31, "cpu": 1 << 27}
MAX_BATCH_TOKENS = 1 << 15


@dataclass(frozen=True)
class Continuation:
    """Token ids, of which the last `scored` are to be predicted from all before them."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Scores:
    """Of each continuation: the sum of its tokens' log-likelihoods in nats, and whether all are the likeliest token."""

    loglikelihood: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def encode_continuations(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """Encode pairs of context (may be empty) and continuation.

    Raises:
        ValueError: the tokenizer has neither BOS nor EOS token, or a continuation has no token of its own.
    """
    first = prefix_token_id(tokenizer)
    moved = []
    for context, text in pairs:
        bare = context.rstrip()
        moved.append((bare, context[len(bare) :] + text) if bare else ("", context + text))
    without = [i for i, (context, _) in enumerate(moved) if not context]
    behind = [i for i, (context, _) in enumerate(moved) if context]
    encoded: list[Continuation | None] = [None] * len(pairs)
    for i, ids in zip(without, _encode(tokenizer, [moved[i][1] for i in without], special=False)):
        ids = ids if ids[:1] == [first] else [first, *ids]
        encoded[i] = Continuation(tuple(ids), len(ids) - 1)
    contexts = _encode(tokenizer, [moved[i][0] for i in behind], special=True)
    wholes = _encode(tokenizer, ["".join(moved[i]) for i in behind], special=True)
    for i, context_ids, ids in zip(behind, contexts, wholes):
        encoded[i] = Continuation(tuple(ids), len(ids) - len(context_ids))
    for pair, one in zip(pairs, encoded):
        if one is None or one.scored < 1:
            raise ValueError(f"the continuation {pair[1]!r} of {pair[0][-40:]!r} has no token of its own")
    return [one for one in encoded if one is not None]


def prefix_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text without context: BOS, or EOS where there is none."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(first, int):
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to put before a text; set one")
    return first


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    continuations: Sequence[Continuation],
    *,
    precision: str = "float32",
    batch_tokens: int | None = None,
) -> Scores:
    """Score continuations in batches of similar length, longest first; nothing waits for the device before the end.

    Rows are padded on the right and no mask is given: under causal attention no token sees the padding behind it.

    Args:
        precision: `float32` (the weights' own dtype) or `bfloat16` (autocast). Logits are compared in float32.
        batch_tokens: tokens of a batch with padding; default as many as memory for their logits allows.
    """
    device = next(model.parameters()).device
    if batch_tokens is None:
        vocabulary = int(model.get_input_embeddings().weight.size(0))  # type: ignore[operator]
        batch_tokens = min(MAX_BATCH_TOKENS, LOGIT_BYTES.get(device.type, 1 << 27) // (4 * vocabulary))
    limit = context_length(model)
    total = torch.zeros(len(continuations), dtype=torch.float64, device=device)
    greedy = torch.zeros(len(continuations), dtype=torch.bool, device=device)
    for rows in batches_by_length([len(one.ids) for one in continuations], batch_tokens):
        inputs, targets = _padded([continuations[i] for i in rows], limit)
        if device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        places = torch.tensor(rows, device=device)
        total[places] = -losses.double().sum(dim=1)
        greedy[places] = ((logits.argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=1)
    return Scores(total.cpu().numpy(), greedy.cpu().numpy())


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of the items, longest first, cut so that items × longest of a batch stays within `batch_tokens`."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, batch_tokens // lengths[i])
        batches[-1].append(i)
        room -= 1
    return batches


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model can read at once, 2048 if its configuration does not say."""
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((int(getattr(model.config, name)) for name in names if getattr(model.config, name, None)), 2048)


def _padded(rows: Sequence[Continuation], limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `[N, T]` and targets `[N, T]`, which are ignored in the context and at padding; on the CPU."""
    cut = [one.ids[-(limit + 1) :] for one in rows]
    shape = (len(rows), max(map(len, cut)) - 1)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for i, (one, ids) in enumerate(zip(rows, cut)):
        end = len(ids) - 1
        begin = max(end - one.scored, 0)
        inputs[i, :end] = ids[:-1]
        targets[i, begin:end] = ids[begin + 1 :]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return list(tokenizer(texts, add_special_tokens=special, **options)["input_ids"])
