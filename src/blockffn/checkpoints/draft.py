"""Opens the folder of an EAGLE draft (SparseLLM/BlockFFN-3B-SFT-EAGLE) beside its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockffn.checkpoints.files import CheckpointError, open_tensors, read_frequencies, read_json
from blockffn.checkpoints.recognise import CONFIGURATION_ERRORS
from blockffn.configuration import BlockFFNConfig
from blockffn.models.draft import DraftModel
from blockffn.models.rotary import RotaryEmbedding

# May be in the file, but is not read: the draft uses the target's embeddings, and its first layer has no input norm.
_IGNORED = ("embed_tokens.weight", "layers.0.input_layernorm.weight")


def is_draft(names: Any) -> bool:
    """Whether tensors of these names are a draft's."""
    return {"fc.weight", "input_norm1.weight", "input_norm2.weight"} <= set(names)


def load_draft(
    path: str | Path, target: BlockFFNConfig, *, dtype: torch.dtype | None = None, vocabulary: int | None = None
) -> DraftModel:
    """The draft in a folder, in evaluation mode.

    Args:
        target: configuration of the model that it drafts for: width, norm epsilon, rotary frequencies, vocabulary.
        dtype: default: as stored.
        vocabulary: propose only so many of the most frequent tokens, listed in the folder's `freq_{vocabulary}.pt` or
            `.pkl`; default: all tokens.

    Raises:
        CheckpointError: there is no draft, a file is damaged, or it belongs to another target.
    """
    path = Path(path)
    tensors = open_tensors(path)
    if not is_draft(tensors):
        raise CheckpointError(f"{path} holds no draft: it lacks fc.weight, input_norm1.weight or input_norm2.weight")
    settings = read_json(path / "config.json")
    config = _draft_config(path, settings, target)
    with torch.device("meta"):
        model = DraftModel(config)
    expected = dict(model.named_parameters())
    for name, parameter in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path} lacks tensor {name!r} of the draft; download the folder again")
        if tensors[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name!r} has shape {tensors[name].shape}, expected "
                f"{tuple(parameter.shape)}; the draft belongs to another target, or config.json to another draft"
            )
    surplus = [name for name in tensors if name not in expected and name not in _IGNORED]
    if surplus:
        raise CheckpointError(f"{tensors[surplus[0]].file} holds {surplus[0]!r}, which a draft does not have")
    for name in expected:
        module, _, attribute = name.rpartition(".")
        weights = tensors[name].read()
        setattr(model.get_submodule(module), attribute, nn.Parameter(weights if dtype is None else weights.to(dtype)))
    model.rotary_emb = RotaryEmbedding(config)
    model.token_ids = None if vocabulary is None else _frequent_tokens(path, vocabulary, target.vocab_size)
    return model.eval()


def _draft_config(path: Path, settings: dict[str, Any], target: BlockFFNConfig) -> BlockFFNConfig:
    sizes = {}
    for name, default in (("num_hidden_layers", 1), ("intermediate_size", None), ("num_attention_heads", None),
                          ("num_key_value_heads", None)):  # fmt: skip
        value = settings.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise CheckpointError(f"{path / 'config.json'} says {name} {value!r}; a draft needs a whole number there")
        sizes[name] = value
    config = target.to_dict() | sizes | {"attention_type": "gqa", "ffn_type": "dense", "model_type": target.model_type}
    config["head_dim"] = settings.get("head_dim") or target.hidden_size // sizes["num_attention_heads"]
    for surplus in ("quantization_config", "architectures", "dtype"):
        config.pop(surplus, None)
    try:
        made = BlockFFNConfig.from_dict(config)
    except CONFIGURATION_ERRORS as error:
        raise CheckpointError(f"{path / 'config.json'} does not describe a draft: {error}") from error
    made._attn_implementation = "eager"
    return made


def _frequent_tokens(path: Path, vocabulary: int, vocab_size: int) -> Tensor | None:
    """Ids of the most frequent tokens, most frequent first; `None` when that is the whole vocabulary."""
    if vocabulary >= vocab_size:
        return None
    candidates = [path / f"freq_{vocabulary}{suffix}" for suffix in (".pt", ".pkl")]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{candidates[0]} is missing; leave vocabulary out to propose all {vocab_size:,} tokens")
    ids = read_frequencies(file)
    if len(ids) < vocabulary or len(set(ids)) != len(ids) or not all(0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"{file} does not list {vocabulary:,} different tokens below {vocab_size:,}")
    return torch.tensor(ids[:vocabulary])
