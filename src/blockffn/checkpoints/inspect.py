"""Says what a model folder is, from headers and configuration alone: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockffn.checkpoints.draft import CARD, IGNORED, frequency_file_size
from blockffn.checkpoints.files import WEIGHT_SUFFIXES, StoredTensor, open_tensors, read_json
from blockffn.checkpoints.layouts import is_draft
from blockffn.checkpoints.load import check_folder, model_folder
from blockffn.checkpoints.recognise import Folder, recognise
from blockffn.checkpoints.tokenizer import has_tokenizer
from blockffn.metrics.cost import active_parameters, parameter_counts, weight_bytes_per_token

_CONVERSIONS = {
    "ours": "nothing: this is our layout",
    "published": "names, and the order of axes of the experts' down-projections",
    "training": "names, and the order of axes of the experts' down-projections (of the router, too, where transposed)",
}


def inspect(path: Path, *, tls_percent: float) -> dict[str, Any]:
    """What `path` holds, as plain data.

    Args:
        tls_percent: token-level sparsity to reckon active parameters and bytes with.

    Raises:
        CheckpointError: it holds no model that is known here, or a file is damaged; `load` would say the same.
    """
    folder_path = model_folder(path)
    tensors = open_tensors(folder_path)
    if is_draft(tensors):
        return {"kind": "draft", "path": str(folder_path), **_draft(folder_path, tensors), **_storage(tensors)}
    folder = recognise(folder_path)
    check_folder(folder)
    config = folder.config
    counts = parameter_counts(config)
    storage = _storage(folder.tensors)
    bits = 8 * storage["bytes"] / counts.total
    return {
        "kind": "model",
        "path": str(folder_path),
        "layout": folder.layout,
        "conversion": _CONVERSIONS[folder.layout],
        "architecture": _architecture(folder),
        "parameters": {**asdict(counts), "non_embedding": counts.non_embedding, "total": counts.total},
        "tls_percent": tls_percent,
        "active_parameters": round(active_parameters(config, tls_percent)),
        "bits_per_weight": bits,
        "bytes_per_token": round(weight_bytes_per_token(config, bits_per_weight=bits, tls_percent=tls_percent)),
        "quantization": folder.quantization,
        **storage,
        "oddities": folder.oddities + _file_oddities(folder),
    }


def _draft(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Sizes of a draft, as its configuration says them, and its card, if it was trained here."""
    settings = read_json(path / "config.json")
    names = ("target", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size")  # fmt: skip
    own = [tensor for name, tensor in tensors.items() if name not in IGNORED]
    card = path / CARD
    unread = [name for name in tensors if name in IGNORED]
    proposes = settings.get("draft_vocab_size") or frequency_file_size(path)
    oddities = [f"{name} is stored, but not read" for name in unread] + _programs(path)
    return {
        "architecture": {name: settings.get(name) for name in names} | {"draft_vocab_size": proposes},
        "parameters": sum(math.prod(tensor.shape) for tensor in own),
        "card": read_json(card) if card.is_file() else None,
        "oddities": oddities,
    }


def _architecture(folder: Folder) -> dict[str, Any]:
    config = folder.config
    names = ["num_hidden_layers", "hidden_size", "vocab_size", "attention_type", "num_attention_heads", "ffn_type"]
    if config.attention_type == "mla":
        names += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "lora_norm_eps"]
    else:
        names += ["num_key_value_heads", "head_dim"]
    moe = ["router_type", "num_experts", "moe_intermediate_size"]
    names += moe if config.ffn_type == "moe" else ["intermediate_size"]
    names += ["tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "scale_emb", "scale_depth",
              "dim_model_base"]  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _storage(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.num_bytes
    return {
        "files": sorted({tensor.file.name for tensor in tensors.values()}),
        "tensors": len(tensors),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dict(dtypes),
    }


def _programs(path: Path) -> list[str]:
    names = [file.name for file in sorted(path.glob("*.py"))]
    return [f"{', '.join(names)}: programs, which are never run"] if names else []


def _file_oddities(folder: Folder) -> list[str]:
    found = _programs(folder.path)
    used = {tensor.file.name for tensor in folder.tensors.values()}
    weights = [file.name for suffix in WEIGHT_SUFFIXES for file in sorted(folder.path.glob(f"*{suffix}"))]
    spare = [name for name in weights if name not in used]
    if spare:
        found.append(f"{', '.join(spare[:3])}: weights that are not used")
    if not has_tokenizer(folder.path):
        found.append("there is no tokenizer: text cannot be generated from this folder alone")
    return found
