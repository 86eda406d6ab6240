"""Writes a draft in the layout of EAGLE-3 heads (`LlamaForCausalLMEagle3`), as vLLM reads it.

An EAGLE-3 layer joins the inputs in its query, key and value projections and adds its branches to the hidden state
alone; ours joins them in a linear map with a bias, of which everything else is made. The map is folded into the
projections. What it adds to the residual stream is carried by more heads, which attend to nothing but their own
position: their queries and keys are constants that rotary embedding makes equal at distance 0 only, and their values
are the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.draft import DraftModel
from blockffn.models.rotary import RotaryEmbedding

MARGIN = 30.0  # by which the own position's score exceeds all others': they get less than 1e-13 each

EXACT = (
    "norms of both inputs: input_layernorm and hidden_norm, with norm_before_residual",
    "the joining linear map and its bias: folded into q, k and v (attention_bias)",
    "its part in the residual stream: {heads} more heads that attend to their own position only",
    "scale of the embeddings: in embed_tokens; divisor of the head's input: in lm_head",
    "the draft vocabulary: d2t, t2d, by ascending token id",
)
INEXACT = (
    "EAGLE-3 has a norm before the head, ours has none: the order of the tokens at a position is ours, but each "
    "position has a temperature of its own, so trees that compare paths may grow otherwise",
    "the state must be the target's last one, after its final norm: an engine must honour "
    "eagle_config.use_aux_hidden_state = false; fc.weight passes on the last of three auxiliary states and is no "
    "substitute",
    "an engine must honour norm_before_residual = true and attention_bias = true; one that ignores either, as "
    "SGLang does, computes something else",
    "the engine must know the target's architecture",
)


def check_eagle3(draft: DraftModel) -> None:
    """Raise `ValueError` when the layout has no place for a part of the draft."""
    config = draft.config
    if len(draft.layers) > 1:
        raise ValueError(f"the EAGLE-3 layout has one layer, the draft has {len(draft.layers)}; train one with 1")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"the export to EAGLE-3 knows default rotary embedding only, the draft has {kind!r}")


def write_eagle3(draft: DraftModel, target: BlockFFNForCausalLM, folder: Path, *, dtype: torch.dtype) -> dict[str, Any]:
    """Write weights and configuration to the existing `folder`.

    Returns:
        `exact` and `inexact`: what the layout expresses and what it does not, a sentence each. Also in config.json.
    """
    check_eagle3(draft)
    weights = eagle3_weights(draft, target)
    stored = {n: (w.to(dtype) if w.is_floating_point() else w).contiguous() for n, w in sorted(weights.items())}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = eagle3_config(draft, target, dtype=dtype)
    heads = config["num_key_value_heads"] - draft.config.num_key_value_heads
    notes = {"exact": [line.format(heads=heads) for line in EXACT], "inexact": list(INEXACT)}
    (folder / "config.json").write_text(json.dumps(config | {"export": notes}, indent=2) + "\n", encoding="utf-8")
    return notes


def eagle3_config(draft: DraftModel, target: BlockFFNForCausalLM, *, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: a Llama of one layer, and the fields of an EAGLE-3 head."""
    config, verifier = draft.config, target.config
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    more = -(-config.hidden_size // config.head_dim)
    groups = config.num_attention_heads // config.num_key_value_heads
    vocabulary = verifier.vocab_size if draft.token_ids is None else len(draft.token_ids)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads + groups * more,
        "num_key_value_heads": config.num_key_value_heads + more,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": (config.rope_parameters or {}).get("rope_theta", 10000.0),
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": verifier.vocab_size,
        "draft_vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": verifier.bos_token_id,
        "eos_token_id": verifier.eos_token_id,
        "pad_token_id": verifier.pad_token_id,
        "norm_before_residual": True,
        "eagle_config": {"use_aux_hidden_state": False},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def eagle3_weights(draft: DraftModel, target: BlockFFNForCausalLM) -> dict[str, Tensor]:
    """The tensors by their names, in float32 and, of the vocabulary, int64 and bool."""
    state = {name: weight.detach().float().cpu() for name, weight in draft.named_parameters()}
    embeddings, head, final_norm = (
        weight.detach().float().cpu()
        for weight in (target.model.embed_tokens.weight, target.lm_head.weight, target.model.norm.weight)
    )
    D, V = draft.config.hidden_size, target.config.vocab_size
    ids = torch.arange(V) if draft.token_ids is None else draft.token_ids.cpu().sort().values
    known = torch.zeros(V, dtype=torch.bool)
    known[ids] = True
    weights = {
        "embed_tokens.weight": embeddings * target.config.scale_emb,
        "fc.weight": torch.cat((torch.zeros(D, 2 * D), torch.eye(D)), dim=1),
        "midlayer.input_layernorm.weight": state["input_norm1.weight"],
        "midlayer.hidden_norm.weight": state["input_norm2.weight"],
        "midlayer.post_attention_layernorm.weight": state["layers.0.post_attention_layernorm.weight"],
        "norm.weight": torch.full((D,), final_norm.square().mean().sqrt().item()),
        "lm_head.weight": head[ids] / target.config.width_multiplier,
        "d2t": ids - torch.arange(len(ids)),
        "t2d": known,
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights[f"midlayer.mlp.{name}.weight"] = state[f"layers.0.mlp.{name}.weight"]
    attention = _attention(draft, {name: state[f"layers.0.self_attn.{name}.weight"] for name in _PROJECTIONS}, state)
    return weights | {f"midlayer.self_attn.{name}": weight for name, weight in attention.items()}


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _attention(draft: DraftModel, ours: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of the embedding and the state, with the draft's heads first and the carrying ones behind them."""
    config = draft.config
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    D, width = config.hidden_size, config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    more = -(-D // width)
    joined, bias = state["fc.weight"], state["fc.bias"]
    query, key = _self_attending(draft)
    # What the joined input has beyond the state, which is in the residual stream already.
    difference = joined - torch.cat((torch.zeros(D, D), torch.eye(D)), dim=1)
    rest = more * width - D
    out = torch.eye(D, more * width).view(D, more, 1, width)
    out = torch.cat((out, out.new_zeros(D, more, groups - 1, width)), dim=2).flatten(1)  # one query head a key head
    return {
        "q_proj.weight": torch.cat((ours["q_proj"] @ joined, torch.zeros(more * groups * width, 2 * D))),
        "q_proj.bias": torch.cat((ours["q_proj"] @ bias, query.repeat(more * groups))),
        "k_proj.weight": torch.cat((ours["k_proj"] @ joined, torch.zeros(more * width, 2 * D))),
        "k_proj.bias": torch.cat((ours["k_proj"] @ bias, key.repeat(more))),
        "v_proj.weight": torch.cat((ours["v_proj"] @ joined, difference, torch.zeros(rest, 2 * D))),
        "v_proj.bias": torch.cat((ours["v_proj"] @ bias, bias, torch.zeros(rest))),
        "o_proj.weight": torch.cat((ours["o_proj"], out), dim=1),
        "o_proj.bias": torch.zeros(D),
    }


def _self_attending(draft: DraftModel) -> tuple[Tensor, Tensor]:
    """A constant query and key `[head_dim]` whose rotated product is larger at distance 0 than anywhere else.

    With ones in `m` rotated pairs, the product at distance `d` is the sum of the cosines of `d` times their
    frequencies. `m` is the number of the fastest pairs for which the sum falls most, relative to itself.
    """
    config = draft.config
    assert config.head_dim is not None
    frequencies = RotaryEmbedding.initial_frequencies(config)[0].double()
    distances = torch.arange(1, config.max_position_embeddings, dtype=torch.float64)
    falls = (1 - (distances[:, None] * frequencies).cos()).cumsum(dim=1).amin(dim=0)
    pairs = int((falls / torch.arange(1, len(falls) + 1)).argmax()) + 1
    key = torch.zeros(config.head_dim)
    key[:pairs] = 1.0
    return key * (MARGIN * config.head_dim**0.5 / falls[pairs - 1].item()), key
