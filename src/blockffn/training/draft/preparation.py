"""What a draft's run needs before its first step: its target, its own weights, rows of text of the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from blockffn.checkpoints.draft import draft_config
from blockffn.checkpoints.load import load
from blockffn.checkpoints.quantize import is_packed
from blockffn.data.frequencies import count_frequencies, most_frequent
from blockffn.data.loader import BatchLoader
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.training.distributed import World
from blockffn.training.draft.settings import DraftSizes, DraftTrainSettings
from blockffn.training.preparation import check_tokenizer

MLA_HEAD_DIM = 64
PUBLISHED_RATIO = 5760 / 2048  # width of the FFN to width of the published draft


def check_draft_settings(settings: DraftTrainSettings) -> None:
    """Raises `ValueError` if target or data are missing, or do not fit together."""
    if settings.target is None:
        raise ValueError("no target: give the folder of the model that the draft shall serve")
    if not settings.data.folders:
        raise ValueError("no data: give a folder that `blockffn prepare` made, as data.folders or with --data")
    check_tokenizer(settings.data.folders, settings.target)


def open_target(settings: DraftTrainSettings, device: torch.device) -> BlockFFNForCausalLM:
    """The frozen target on a device, in bfloat16 or float32 as `settings.precision` says; unpacked if it is quantised.

    Raises:
        ValueError: there is no model, its context is too short for the rows or texts, or its vocabulary for the draft.
    """
    assert settings.target is not None
    dtype = torch.bfloat16 if uses_bfloat16(settings, device) else torch.float32
    model = load(Path(settings.target), dtype=dtype, device=device)
    if is_packed(model):
        model.dequantize()
    config, length, vocabulary = model.config, settings.data.sequence_length, settings.draft_vocab_size
    if length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length ({length}) exceeds the context of {settings.target}, "
            f"{config.max_position_embeddings} tokens; set data.sequence_length={config.max_position_embeddings}"
        )
    written = settings.acceptance.prompt_tokens + settings.acceptance.new_tokens
    if written > config.max_position_embeddings:
        raise ValueError(
            f"acceptance.prompt_tokens and acceptance.new_tokens ({written} together) exceed the context of "
            f"{settings.target}, {config.max_position_embeddings} tokens"
        )
    if vocabulary is not None and vocabulary > config.vocab_size:
        raise ValueError(f"draft_vocab_size ({vocabulary}) exceeds the target's vocabulary of {config.vocab_size}")
    return model


def uses_bfloat16(settings: DraftTrainSettings, device: torch.device) -> bool:
    return settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")


def resolved_sizes(sizes: DraftSizes, target: BlockFFNForCausalLM) -> dict[str, int]:
    """The draft's sizes, with what is `None` taken from the target.

    Raises:
        ValueError: heads that do not divide.
    """
    config = target.config
    gqa = config.attention_type == "gqa"
    head_dim = sizes.head_dim or (config.head_dim if gqa else MLA_HEAD_DIM)
    assert head_dim is not None
    heads = sizes.num_attention_heads or (config.num_attention_heads if gqa else max(config.hidden_size // head_dim, 1))
    keys = sizes.num_key_value_heads or (config.num_key_value_heads if gqa else heads)
    assert keys is not None
    if heads % keys or head_dim % 2:
        raise ValueError(
            f"draft.num_attention_heads ({heads}) must be a multiple of draft.num_key_value_heads ({keys}), and "
            f"draft.head_dim ({head_dim}) even"
        )
    width = sizes.intermediate_size or 32 * max(round(config.hidden_size * PUBLISHED_RATIO / 32), 1)
    return {"num_hidden_layers": sizes.num_hidden_layers, "intermediate_size": width, "num_attention_heads": heads,
            "num_key_value_heads": keys, "head_dim": head_dim}  # fmt: skip


def make_draft(settings: DraftTrainSettings, target: BlockFFNForCausalLM) -> DraftModel:
    """A fresh draft in float32 on the target's device. Its start is drawn from torch's global generator.

    It begins as the target's state passed on: the linear map takes the state as it is, and the branches add nothing.
    """
    sizes = resolved_sizes(settings.draft, target)
    draft = DraftModel(draft_config(sizes, target.config), token_ids=draft_vocabulary(settings, target))
    draft.config._attn_implementation = "sdpa"
    width = target.config.hidden_size
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(
                    std=0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else parameter.shape[1] ** -0.5
                )
        draft.fc.bias.zero_()
        draft.fc.weight[:, width:] = torch.eye(width)
        draft.input_norm2.weight.fill_(target.model.norm.weight.float().square().mean().sqrt().item())
    return draft.to(target.device)


def draft_vocabulary(settings: DraftTrainSettings, target: BlockFFNForCausalLM) -> Tensor | None:
    """Ids of the most frequent tokens of the training data, `[V']`, the end of a text among them; `None`: all."""
    size, config = settings.draft_vocab_size, target.config
    if size is None or size == config.vocab_size:
        return None
    counts = torch.zeros(config.vocab_size, dtype=torch.int64)
    for folder in settings.data.folders:
        found = count_frequencies(folder)
        counts[: len(found)] += found
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return most_frequent(counts, size, always=tuple(end for end in ends if end is not None)[:size])


def make_draft_loader(settings: DraftTrainSettings, world: World) -> BatchLoader:
    return BatchLoader(
        {Path(folder): weight for folder, weight in settings.data.folders.items()},
        sequence_length=settings.data.sequence_length,
        global_batch_size=settings.batch_size,
        align=settings.data.align,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
    )
