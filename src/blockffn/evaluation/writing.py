"""Documents that a model writes: text for another to learn from, on which the first one's predictions are its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockffn.data.loader import iterate_split
from blockffn.models.causal_lm import BlockFFNForCausalLM


@torch.no_grad()
def write_documents(
    model: BlockFFNForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    openings: Tensor,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Continue every opening until the end of the document or `max_new_tokens`; yields opening and continuation.

    Args:
        openings: token ids `[N, T]`.

    Raises:
        ValueError: a number is out of range, or opening and continuation do not fit into the model's context.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature must be above 0 and top_p in 0…1, got {temperature} and {top_p}")
    context = model.config.max_position_embeddings
    if openings.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"openings of {openings.shape[1]} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{context}"
        )
    torch.manual_seed(seed)
    decoder: Any = model.eval()  # `generate` is annotated for a protocol that only transformers' own models declare
    end = tokenizer.eos_token_id
    for batch in openings.to(model.device).split(batch_size):
        rows = decoder.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=max_new_tokens, do_sample=True,
            temperature=temperature, top_p=top_p, top_k=0, eos_token_id=end,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )  # fmt: skip
        for row in rows.tolist():
            yield str(tokenizer.decode(row, skip_special_tokens=True))


def openings_of(folder: Path, *, count: int, length: int) -> Tensor:
    """The first `length` tokens of rows spread over a prepared folder's training text, `[count, length]`.

    Where there are fewer rows than `count`, they are taken again: a continuation is sampled anew each time.

    Raises:
        ValueError: there is no row that long.
    """
    batches = iterate_split(folder, "train", sequence_length=max(64, length), batch_size=1, align=1, max_rows=count)
    found = [b.input_ids[0, :length] for b in batches if int((b.document_ids[0, :length] == 0).sum()) == length]
    if not found:
        raise ValueError(f"{folder} has no rows of {length} tokens to begin documents with; prepare more text")
    repeats = -(-count // len(found))
    return torch.stack(found).repeat(repeats, 1)[:count]
