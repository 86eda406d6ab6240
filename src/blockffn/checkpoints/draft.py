"""Opens an EAGLE draft (SparseLLM/BlockFFN-3B-SFT-EAGLE, or one trained here) beside its target, and writes one."""

from __future__ import annotations

import json
import math
import pickle
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blockffn.checkpoints.files import CheckpointError, open_tensors, read_frequencies, read_json
from blockffn.checkpoints.layouts import is_draft
from blockffn.checkpoints.load import model_folder
from blockffn.checkpoints.recognise import CONFIGURATION_ERRORS
from blockffn.configuration import BlockFFNConfig
from blockffn.models.draft import DraftModel
from blockffn.models.rotary import RotaryEmbedding

MODEL_TYPE = "blockffn-draft"
CARD = "draft.json"  # what a draft that was trained here is worth
# May be in the file, but is not read: the draft uses the target's embeddings, and its first layer has no input norm.
IGNORED = ("embed_tokens.weight", "layers.0.input_layernorm.weight")


def is_draft_folder(path: Path) -> bool:
    """Whether a folder, or the run in it, holds a draft. Raises `CheckpointError` if it holds no model at all."""
    return is_draft(open_tensors(model_folder(path)))


def load_draft(
    path: str | Path, target: BlockFFNConfig, *, dtype: torch.dtype | None = None, vocabulary: int | None = None
) -> DraftModel:
    """The draft in a folder, in evaluation mode.

    Args:
        path: folder of a draft or of its training run.
        target: configuration of the model that it drafts for: width, norm epsilon, rotary frequencies, vocabulary.
        dtype: default: as stored.
        vocabulary: propose only so many of the most frequent tokens, listed in the folder's `freq_{vocabulary}.pt` or
            `.pkl`; default: as config.json says in `draft_vocab_size`, else as the file there lists, else all.

    Raises:
        CheckpointError: there is no draft, a file is damaged, or it belongs to another target.
    """
    path = model_folder(Path(path))
    tensors = open_tensors(path)
    if not is_draft(tensors):
        raise CheckpointError(f"{path} holds no draft: it lacks fc.weight, input_norm1.weight or input_norm2.weight")
    settings = read_json(path / "config.json")
    config = _read_config(path, settings, target)
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
    surplus = [name for name in tensors if name not in expected and name not in IGNORED]
    if surplus:
        raise CheckpointError(f"{tensors[surplus[0]].file} holds {surplus[0]!r}, which a draft does not have")
    for name in expected:
        module, _, attribute = name.rpartition(".")
        weights = tensors[name].read()
        setattr(model.get_submodule(module), attribute, nn.Parameter(weights if dtype is None else weights.to(dtype)))
    model.rotary_emb = RotaryEmbedding(config)
    if vocabulary is None:
        vocabulary = _own_vocabulary(path, settings, target)
    model.token_ids = None if vocabulary is None else _frequent_tokens(path, vocabulary, target.vocab_size)
    return model.eval()


def read_calibration(path: Path) -> dict[str, list[list[float]]] | None:
    """How often the tokens of the draft in a folder were accepted, as its card says; `None` where it does not.

    Raises:
        CheckpointError: the card says something else there.
    """
    card = model_folder(path) / CARD
    decoding = read_json(card).get("decoding") if card.is_file() else None
    found = decoding.get("calibration") if isinstance(decoding, dict) else decoding
    if found is None:
        return None
    try:
        rows = {kind: [[float(value) for value in row] for row in found[kind]] for kind in ("first", "later")}
        every = [row for kind in rows.values() for row in kind]
        proper = all(0 <= p <= 1 and 0 <= rate <= 1 and 0 <= n < math.inf for p, rate, n in every)
    except (TypeError, ValueError, KeyError):
        proper = False
    if not proper:
        raise CheckpointError(
            f"{card}: the calibration of the draft's decoding must have rows of a probability, a rate and a number "
            f"under 'first' and 'later', got {reprlib.repr(found)}; take it out, and acceptance is learnt while "
            "decoding"
        )
    return rows


def save_draft(
    folder: Path,
    draft: DraftModel,
    *,
    dtype: torch.dtype,
    about: Mapping[str, Any] | None = None,
    published: bool = False,
) -> None:
    """Write a draft to an existing folder, as `load_draft` reads it.

    Args:
        dtype: of the weights in the file.
        about: more fields of config.json, such as the target's name.
        published: configuration and frequency file as in the published repository, whose engine reads them.
    """
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in draft.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config, ids = draft.config, None if draft.token_ids is None else draft.token_ids.tolist()
    names = ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"]  # fmt: skip
    name_of_dtype = str(dtype).removeprefix("torch.")
    if published:
        content: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": name_of_dtype,
        }
    else:
        names += ["rope_parameters", "scale_emb", "dim_model_base"]
        content = {"model_type": MODEL_TYPE, "draft_vocab_size": ids and len(ids), "dtype": name_of_dtype}
    content |= {name: getattr(config, name) for name in names} | dict(about or {})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if ids is not None and published:
        (folder / f"freq_{len(ids)}.pkl").write_bytes(pickle.dumps(ids))
    elif ids is not None:
        torch.save(ids, folder / f"freq_{len(ids)}.pt")


def draft_config(sizes: Mapping[str, int], target: BlockFFNConfig) -> BlockFFNConfig:
    """The configuration of a draft with these `SIZES` for a target; its attention is written out (`eager`).

    Raises:
        ValueError, or another of `CONFIGURATION_ERRORS`: the sizes make no model.
    """
    config = target.to_dict() | dict(sizes)
    config |= {"attention_type": "gqa", "ffn_type": "dense", "model_type": target.model_type}
    for surplus in ("quantization_config", "architectures", "dtype"):
        config.pop(surplus, None)
    made = BlockFFNConfig.from_dict(config)
    made._attn_implementation = "eager"
    return made


def _read_config(path: Path, settings: dict[str, Any], target: BlockFFNConfig) -> BlockFFNConfig:
    sizes = {}
    for name, default in (("num_hidden_layers", 1), ("intermediate_size", None), ("num_attention_heads", None),
                          ("num_key_value_heads", None)):  # fmt: skip
        value = settings.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise CheckpointError(f"{path / 'config.json'} says {name} {value!r}; a draft needs a whole number there")
        sizes[name] = value
    sizes["head_dim"] = settings.get("head_dim") or target.hidden_size // sizes["num_attention_heads"]
    try:
        return draft_config(sizes, target)
    except CONFIGURATION_ERRORS as error:
        raise CheckpointError(f"{path / 'config.json'} does not describe a draft: {error}") from error


def frequency_file_size(path: Path) -> int | None:
    """Tokens in the largest frequency file of a published draft; `None` where there is none."""
    names = (re.fullmatch(r"freq_(\d{1,9})\.(?:pt|pkl)", file.name) for file in path.glob("freq_*"))
    return max((int(match[1]) for match in names if match), default=None)


def _own_vocabulary(path: Path, settings: dict[str, Any], target: BlockFFNConfig) -> int | None:
    """How many tokens a draft of ours was trained to propose; `None`: all."""
    if settings.get("model_type") != MODEL_TYPE:
        return frequency_file_size(path)
    if settings.get("vocab_size") != target.vocab_size:
        raise CheckpointError(
            f"{path / 'config.json'} says vocab_size {settings.get('vocab_size')!r}, the target has "
            f"{target.vocab_size}: the draft belongs to another target"
        )
    size = settings.get("draft_vocab_size")
    if size is not None and (type(size) is not int or size < 1):
        raise CheckpointError(f"{path / 'config.json'} says draft_vocab_size {size!r}; it must be a whole number")
    return size


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
