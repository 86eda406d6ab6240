"""What a folder holds: our configuration for it, derived from the shapes of its tensors and checked against its own.

Published configurations carry fields left over from the model that theirs was copied from (`intermediate_size`,
`num_key_value_heads`, `ffn_gated`). Shapes are the truth; a field that contradicts them is an error where it would
change the model, and otherwise a remark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from blockffn.checkpoints.files import CheckpointError, StoredTensor, open_tensors, read_json
from blockffn.checkpoints.layouts import Experts, is_draft, our_name, recognise_layout
from blockffn.configuration import BlockFFNConfig
from blockffn.wording import counted

MAX_LAYERS = 1000
# What constructing a configuration from wrong values raises.
CONFIGURATION_ERRORS = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# What the published code assumes where a configuration does not say.
_DEFAULTS = {"rms_norm_eps": 1e-5, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256,
             "max_position_embeddings": 4096}  # fmt: skip
# Fields of training configurations -> ours.
_ALIASES = {"dim_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads", "dim_head": "head_dim", "eps": "rms_norm_eps",
            "orig_max_length": "max_position_embeddings", "max_length": "max_position_embeddings",
            "expert_size": "moe_intermediate_size", "qk_nope_dim": "qk_nope_head_dim",
            "tie_lm_head": "tie_word_embeddings"}  # fmt: skip
_CARRIED = ("max_position_embeddings", "rms_norm_eps", "scale_emb", "scale_depth", "dim_model_base", "bos_token_id",
            "eos_token_id", "pad_token_id")  # fmt: skip
_CHECKED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size",
            "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "attention_type")  # fmt: skip
# Values that the published code knows and this package computes otherwise or not at all.
_FIXED = {"router_act": ("relu",), "router_activate_fn": ("relu",), "norm_after_router": ("rms",),
          "hidden_act": ("silu",), "norm_scale": (1, 1.0), "qk_norm": (False,), "attention_bias": (False,)}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A recognised model folder.

    Attributes:
        layout: of `blockffn.checkpoints.layouts.LAYOUTS`.
        tensors: by our names.
        their_names: our name -> name in the file.
        quantization: the `quantization_config`, where weights are packed.
        oddities: remarks for a person: what was ignored or assumed.
    """

    path: Path
    layout: str
    config: BlockFFNConfig
    tensors: dict[str, StoredTensor]
    their_names: dict[str, str]
    quantization: dict[str, Any] | None = None
    oddities: list[str] = field(default_factory=list)

    @property
    def experts(self) -> Experts:
        return Experts(self.config.num_experts, self.config.moe_intermediate_size, self.config.hidden_size)


def recognise(path: Path) -> Folder:
    """Read the headers of a folder and say what it is.

    Raises:
        CheckpointError: there are no weights, they are another model's, or configuration and shapes contradict.
    """
    tensors = open_tensors(path)
    layout = recognise_layout(tensors)
    config_file = path / "config.json"
    theirs = read_json(config_file) if config_file.is_file() else None
    if layout is None and is_draft(tensors):
        raise CheckpointError(
            f"{path} is an EAGLE draft; open it beside its target: generate MODEL --speculative {path}"
        )
    if layout is None or (theirs is None and layout != "training"):
        names = ", ".join(list(tensors)[:3])
        missing = "config.json is missing" if theirs is None else f"its tensors are called {names} …"
        raise CheckpointError(f"{path} is no BlockFFN model that is known here: {missing}")
    if layout == "ours":
        config, quantization = _own_config(config_file, theirs or {})
        if config.num_hidden_layers != (found := _num_layers(path, tensors)):
            raise CheckpointError(
                f"{config_file} says num_hidden_layers {config.num_hidden_layers}, the weights have {found}; "
                "one of them belongs to another model"
            )
        folder = Folder(path, layout, config, tensors, {name: name for name in tensors}, quantization)
        return _without_tied_head(folder)
    renamed: dict[str, StoredTensor] = {}
    their_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        ours = our_name(name, layout)
        if ours in renamed:
            raise CheckpointError(f"{tensor.file} holds both {name!r} and {their_names[ours]!r}, which are one tensor")
        renamed[ours], their_names[ours] = tensor, name
    config, oddities = _derive(path, {_ALIASES.get(k, k): v for k, v in (theirs or {}).items()}, renamed)
    if theirs is None:
        oddities.append("there is no config.json: epsilon, scales and context are those of the published recipe")
    return _without_tied_head(Folder(path, layout, config, renamed, their_names, None, oddities))


def _without_tied_head(folder: Folder) -> Folder:
    if folder.config.tie_word_embeddings and folder.tensors.pop("lm_head.weight", None) is not None:
        folder.oddities.append("lm_head.weight is stored although it is tied: the embeddings are used")
    return folder


def _own_config(file: Path, content: dict[str, Any]) -> tuple[BlockFFNConfig, dict[str, Any] | None]:
    if content.get("model_type") != BlockFFNConfig.model_type:
        raise CheckpointError(f"{file} has model_type {content.get('model_type')!r}, not {BlockFFNConfig.model_type!r}")
    quantization = content.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{file} has a quantization_config that is no object")
    try:
        config = BlockFFNConfig.from_dict(content)
    except CONFIGURATION_ERRORS as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{file} has a wrong setting: {reason}") from error
    return config, quantization


def _derive(
    path: Path, theirs: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[BlockFFNConfig, list[str]]:
    """Our configuration of a published or training checkpoint, and what is odd about theirs."""
    where = path / "config.json"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fields = _fields_from_shapes(path, shapes, theirs)
    for name in _CHECKED:
        said, found = theirs.get(name), fields.get(name)
        if name == "attention_type" and said == "vanilla":
            said = "gqa"  # the training code's word
        if said is not None and found is not None and said != found:
            raise CheckpointError(
                f"{where} says {name} {said!r}, the weights have {found!r}; one of them belongs to another model"
            )
    for name, known in _FIXED.items():
        if name in theirs and theirs[name] is not None and theirs[name] not in known:
            raise CheckpointError(f"{where} says {name} {theirs[name]!r}; only {known[0]!r} is known here")
    for name in (*_DEFAULTS, "rope_theta"):
        value = theirs.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e12):
            raise CheckpointError(f"{where} says {name} {value!r}, which is no positive number")
    oddities = []
    E, F = fields["num_experts"], fields["moe_intermediate_size"]
    if theirs.get("intermediate_size") not in (None, E * F):
        oddities.append(f"intermediate_size {theirs['intermediate_size']} is ignored: the experts have {E} × {F}")
    if theirs.get("ffn_gated"):
        oddities.append("ffn_gated is ignored: the experts are stored without a gate")
    kv_heads, attention = theirs.get("num_key_value_heads"), fields["attention_type"]
    if attention == "mla" and kv_heads not in (None, fields["num_attention_heads"]):
        oddities.append(f"num_key_value_heads {kv_heads} is ignored: attention is latent (MLA)")
    elif attention == "gqa" and kv_heads not in (None, fields["num_key_value_heads"]):
        raise CheckpointError(
            f"{where} says num_key_value_heads {kv_heads}, the weights have {fields['num_key_value_heads']}; "
            "one of them belongs to another model"
        )
    carried = {name: theirs[name] for name in _CARRIED if theirs.get(name) is not None}
    tied = "lm_head.weight" not in shapes or bool(theirs.get("tie_word_embeddings", False))
    if tied and theirs.get("tie_word_embeddings") is False:
        oddities.append("tie_word_embeddings is false, but there is no lm_head.weight: the head is tied")
    try:
        config = BlockFFNConfig(
            **{**_DEFAULTS, **carried, **fields},
            tie_word_embeddings=tied,
            rope_parameters=_rope_parameters(where, theirs),
            intermediate_size=E * F,
        )
    except CONFIGURATION_ERRORS as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{where} has a wrong setting: {reason}") from error
    return config, oddities


def _rope_parameters(where: Path, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in Hugging Face's present form, from that or from the older `rope_theta` and `rope_scaling`."""
    scaling = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where} says rope_scaling {scaling!r}, which is no object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    others = {name: value for name, value in scaling.items() if name != "type"}
    return {"rope_theta": float(theirs.get("rope_theta") or 10000.0), **others, "rope_type": kind}


def _fields_from_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], theirs: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Sizes of the model that tensors of these shapes make."""

    def shape(name: str, ndim: int = 2) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"{path} lacks tensor {name!r}; download the missing files or copy them again")
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shapes[name]}, expected {ndim} dimensions")
        return shapes[name]

    V, D = shape("model.embed_tokens.weight")
    first = "model.layers.0."
    router = shape(first + "mlp.router.proj.weight")
    E = router[1] if router[0] == D != router[1] else router[0]
    up = shapes.get(first + "mlp.routed_experts.up_proj", ())
    weights = 1
    for n in up:
        weights *= n
    if len(up) not in (2, 3) or not weights or weights % (E * D):
        raise CheckpointError(f"{path}: the experts' up-projection has shape {up}, which {E} experts do not have")
    return {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": _num_layers(path, shapes),
        "num_experts": E,
        "moe_intermediate_size": weights // (E * D),
        "router_type": "relu_rmsnorm" if first + "mlp.router.norm.weight" in shapes else "relu",
        **_attention_fields(path, shapes, shape, theirs),
    }


def _attention_fields(
    path: Path, shapes: Mapping[str, tuple[int, ...]], shape: Any, theirs: Mapping[str, Any]
) -> dict[str, Any]:
    attention = "model.layers.0.self_attn."
    if attention + "kv_b_proj.weight" in shapes:
        q_out, q_rank = shape(attention + "q_b_proj.weight")
        kv_out, kv_rank = shape(attention + "kv_b_proj.weight")
        rope = shape(attention + "kv_a_proj_with_mqa.weight")[0] - kv_rank
        out = shape(attention + "o_proj.weight")[1]
        # q_out = H (nope + rope), kv_out = H (nope + value), out = H value: three equations for H, nope and value.
        heads = (q_out - kv_out + out) // rope if rope > 0 else 0
        if heads < 1 or (q_out - kv_out + out) != heads * rope or out % heads or kv_out % heads:
            raise CheckpointError(f"{path}: the shapes of {attention}* fit no number of heads; are files mixed up?")
        return {"attention_type": "mla", "num_attention_heads": heads, "q_lora_rank": q_rank, "kv_lora_rank": kv_rank,
                "qk_rope_head_dim": rope, "v_head_dim": out // heads,
                "qk_nope_head_dim": (kv_out - out) // heads}  # fmt: skip
    q, k = shape(attention + "q_proj.weight")[0], shape(attention + "k_proj.weight")[0]
    heads, head_dim = theirs.get("num_attention_heads"), theirs.get("head_dim")
    if heads is None and head_dim is None:
        raise CheckpointError(f"{path / 'config.json'} must say num_attention_heads: shapes alone do not tell it")
    if heads is None and isinstance(head_dim, int) and head_dim > 0:
        heads = q // head_dim
    if not isinstance(heads, int) or heads < 1 or q % heads or k % (q // heads) or head_dim not in (None, q // heads):
        raise CheckpointError(
            f"{path}: {heads} heads (head_dim {head_dim}) do not fit queries of {q} and keys of {k} in {attention}*"
        )
    return {"attention_type": "gqa", "num_attention_heads": heads, "num_key_value_heads": k // (q // heads),
            "head_dim": q // heads}  # fmt: skip


def _num_layers(path: Path, names: Iterable[str]) -> int:
    """Layers that tensors of these names make; bounded by their number, whatever a name claims."""
    found = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d{1,4})\.", name))}
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if not found or missing < len(found) or len(found) > MAX_LAYERS:
        raise CheckpointError(
            f"{path} has tensors of {counted(len(found), 'layer')}, but none of layer {missing}; is a file missing?"
        )
    return len(found)
