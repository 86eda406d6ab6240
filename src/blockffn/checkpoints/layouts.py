"""How other layouts name and shape what this package stores, and the way back.

`ours` is this package's layout. `published` is that of the SparseLLM/BlockFFN repositories, `training` that of the
checkpoints written during their pre-training. Names map one to one; of the weights, only the experts' down-projection
(and, in some training checkpoints, the router) has another order of axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

LAYOUTS = ("ours", "published", "training")

_EXPERT_UP, _EXPERT_DOWN = "mlp.routed_experts.up_proj", "mlp.routed_experts.down_proj"
_ROUTER = "mlp.router.proj.weight"
_ATTENTION = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")

# Within a layer: their name -> ours. The first name for one of ours is the one that is written.
_PUBLISHED = {
    "mlp.router_proj.weight": _ROUTER,
    "mlp.router_norm.weight": "mlp.router.norm.weight",
    "mlp.up_proj": _EXPERT_UP,
    "mlp.down_proj": _EXPERT_DOWN,
    "mlp.up_proj.weight": _EXPERT_UP,
    "mlp.down_proj.weight": _EXPERT_DOWN,
    "mlp.experts.up_proj.weight": _EXPERT_UP,
    "mlp.experts.down_proj.weight": _EXPERT_DOWN,
    "mlp.mlp.up_proj": _EXPERT_UP,
    "mlp.mlp.down_proj": _EXPERT_DOWN,
}
_TRAINING = {
    "self_att.layernorm_before_attention.weight": "input_layernorm.weight",
    "ffn.layernorm_before_ffn.weight": "post_attention_layernorm.weight",
    "ffn.ffn.moe_router.w_gate": _ROUTER,
    "ffn.ffn.moe_router.w_gate.weight": _ROUTER,
    "ffn.ffn.router_norm.weight": "mlp.router.norm.weight",
    "ffn.ffn.moe_experts.moe_w_in": _EXPERT_UP,
    "ffn.ffn.moe_experts.moe_w_out": _EXPERT_DOWN,
    "ffn.ffn.moe_experts.moe_w_in.weight": _EXPERT_UP,
    "ffn.ffn.moe_experts.moe_w_out.weight": _EXPERT_DOWN,
    **{
        f"self_att.self_attention.{theirs}.weight": f"self_attn.{ours}.weight"
        for theirs, ours in zip(
            ("q_down_proj", "q_down_layernorm", "q_up_proj", "kv_down_proj", "kv_down_layernorm", "kv_up_proj",
             "o_proj", "project_q", "project_k", "project_v", "attention_out"),
            (*_ATTENTION, "q_proj", "k_proj", "v_proj", "o_proj"),
        )
    },
}  # fmt: skip
_TRAINING_TOP = {
    "input_embedding.weight": "model.embed_tokens.weight",
    "encoder.output_layernorm.weight": "model.norm.weight",
}
_LAYER = re.compile(r"(?:model|encoder)\.layers\.(\d{1,4})\.(.+)")


def recognise_layout(names: Mapping[str, object]) -> str | None:
    """The layout that tensors of these names are in, or `None` for another model's."""
    if any(name.startswith("encoder.layers.") for name in names):
        return "training"
    if any(".mlp.router_proj." in name for name in names):
        return "published"
    if any(".mlp.router." in name or name.startswith("model.embed_tokens.") for name in names):
        return "ours"
    return None


def our_name(name: str, layout: str) -> str:
    """Our name of a tensor that is called `name` in `layout`; names that need no change are returned as they are."""
    table = {"published": _PUBLISHED, "training": _TRAINING}.get(layout, {})
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TRAINING_TOP.get(name, name) if layout == "training" else name
    return f"model.layers.{match[1]}.{table.get(match[2], match[2])}"


def published_name(name: str) -> str:
    """The published name of our tensor `name`."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    theirs = next((theirs for theirs, ours in _PUBLISHED.items() if ours == match[2]), match[2])
    return f"model.layers.{match[1]}.{theirs}"


@dataclass(frozen=True)
class Experts:
    """Number, width and input size of a layer's experts: what tells the axes of their weights apart."""

    num_experts: int
    width: int
    hidden_size: int


def to_ours(tensor: Tensor, name: str, their_name: str, experts: Experts) -> Tensor:
    """A view of `tensor`, stored as `their_name`, with the axes of our tensor `name`.

    Raises:
        ValueError: its shape is none of those known for this name.
    """
    E, F, D = experts.num_experts, experts.width, experts.hidden_size
    shape = tuple(tensor.shape)
    if name.endswith(_EXPERT_UP):
        if shape in ((E * F, D), (E, F, D)):
            return tensor.view(E, F, D)
    elif name.endswith(_EXPERT_DOWN):
        if ".mlp.mlp." in their_name and shape == (E * F, D):
            return tensor.view(E, F, D)
        if shape == (D, E * F):
            return tensor.view(D, E, F).permute(1, 2, 0)
        if shape == (E, D, F):
            return tensor.transpose(1, 2)
    elif name.endswith(_ROUTER):
        if shape == (E, D):
            return tensor
        if shape == (D, E):
            return tensor.T
    else:
        return tensor
    raise ValueError(f"has shape {shape}, which {E} experts of width {F} and input {D} do not have")


def to_published(tensor: Tensor, name: str) -> Tensor:
    """Our tensor `name` with the published axes: experts in two dimensions."""
    if name.endswith(_EXPERT_UP):
        return tensor.flatten(0, 1)
    if name.endswith(_EXPERT_DOWN):
        return tensor.flatten(0, 1).T.contiguous()
    return tensor


def is_draft(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an EAGLE draft's."""
    return {"fc.weight", "input_norm1.weight", "input_norm2.weight"} <= set(names)
