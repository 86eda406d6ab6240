"""Text for calibration and for receipts: rows of a prepared folder, of which the first document counts.

Without the others, plain causal attention is exact, whatever model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blockffn.data.loader import iterate_split
from blockffn.data.manifest import load_manifest
from blockffn.data.tokenizer import tokenizer_hash
from blockffn.models.causal_lm import BlockFFNForCausalLM


def read_passages(folder: Path, split: str, *, length: int, num_tokens: int) -> list[Tensor]:
    """Token ids `[1, T]` of passages, `T <= length`, from rows spread over the split; in all at most `num_tokens`.

    Raises:
        ValueError: the split is missing or holds too little text.
    """
    rows = max(1, num_tokens // length)
    batches = iterate_split(folder, split, sequence_length=length, batch_size=1, align=1, max_rows=rows)
    firsts = [batch.input_ids[0][batch.document_ids[0] == 0] for batch in batches]
    passages = [tokens[None] for tokens in firsts if len(tokens) > 1]
    if not passages:
        raise ValueError(f"{folder} has no text in its split {split!r}; prepare more")
    return passages


@torch.no_grad()
def ffn_inputs(model: BlockFFNForCausalLM, passages: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the FFN of each layer gets, `[T, D]` on the CPU, over all passages; a layer at a time once all have run."""
    layers = model.model.layers
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0].float().cpu()))
        for layer, kept in zip(layers, seen)
    ]
    try:
        for passage in passages:
            model.model(passage.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for kept in seen:
        yield torch.cat(kept)
        kept.clear()


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` if a prepared folder was made with another tokenizer."""
    if load_manifest(folder).tokenizer_hash != tokenizer_hash(cast(PreTrainedTokenizerFast, tokenizer)):
        raise ValueError(
            f"{folder} was prepared with another tokenizer than the model's; prepare the text anew with the model's: "
            "blockffn prepare … --tokenizer MODEL"
        )
