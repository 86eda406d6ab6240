"""Packs a model's weights in place, unpacks them again, and prepares an empty model for packed files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.models.attention import Attention
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import GatedFFN, RoutedExperts
from blockffn.models.packed import PackedEmbedding, PackedLinear, PackedModule, PackedRoutedExperts
from blockffn.ops.quantization import StoredWeight, relative_error

WEIGHTS_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} weights, {remaining} left"


def check_model(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a class whose parts are not known here."""
    if not isinstance(model, BlockFFNForCausalLM):
        raise ValueError(
            f"packed weights are loaded by AutoModelForCausalLM or BlockFFNForCausalLM, not by {type(model).__name__}"
        )


def packed_modules(model: BlockFFNForCausalLM, config: BlockFFNQuantizationConfig) -> list[tuple[str, str]]:
    """Names of the modules of `model` that are packed, each with its format."""
    found = []
    for name, module in model.named_modules():
        part = _part(name, module, model)
        if part == "lm_head" and model.config.tie_word_embeddings:
            part = "embeddings"
        format = None if part is None else getattr(config, part)
        if format is not None:
            found.append((name, format))
    return found


def _part(name: str, module: nn.Module, model: BlockFFNForCausalLM) -> str | None:
    """The part that a module belongs to, or `None` for what is never packed."""
    if isinstance(module, RoutedExperts):
        return "ffn" if module.activation_norm is None else None  # no kernel computes such experts packed
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if not isinstance(module, nn.Linear):
        return None
    if module is model.lm_head:
        return "lm_head"
    parent = model.get_submodule(name.rpartition(".")[0])
    return "attention" if isinstance(parent, Attention) else "ffn" if isinstance(parent, GatedFFN) else None


def is_packed(model: PreTrainedModel) -> bool:
    """Whether any part of `model` is packed."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def replace_with_empty(model: BlockFFNForCausalLM, config: BlockFFNQuantizationConfig) -> None:
    """Put empty packed modules where `config` says, as loading a packed folder needs them."""
    for name, format in packed_modules(model, config):
        model.set_submodule(name, _packed_like(model.get_submodule(name), format, config.group_size))
    tie(model)


def pack_model(
    model: BlockFFNForCausalLM, config: BlockFFNQuantizationConfig, *, progress: bool = False
) -> list[StoredWeight]:
    """Pack the weights of `model` in place, one module after the other, and freeze it.

    Args:
        progress: show a bar.

    Returns:
        A line for each tensor of the model, packed or not; `error` is relative, in the Frobenius norm.

    Raises:
        ValueError: a weight is NaN or infinite; the message names the module.
    """
    errors: dict[str, float] = {}
    tied = model.config.tie_word_embeddings
    chosen = list(packed_modules(model, config))
    sizes = {name: sum(weight.numel() for weight in model.get_submodule(name).parameters()) for name, _ in chosen}
    with tqdm(
        total=sum(sizes.values()), unit_scale=True, desc="quantising", disable=not progress, leave=False,
        dynamic_ncols=True, bar_format=WEIGHTS_BAR,
    ) as bar:  # fmt: skip
        for name, format in chosen:
            module = model.get_submodule(name)
            packed = _packed_like(module, format, config.group_size)
            if not (tied and module is model.lm_head):
                try:
                    packed.fill(module)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                errors[name] = _error(module, packed.unpack(torch.float32))
            model.set_submodule(name, packed)
            bar.update(sizes[name])
    tie(model)
    model.requires_grad_(False)
    return stored_weights(model, errors)


def stored_weights(model: BlockFFNForCausalLM, errors: dict[str, float]) -> list[StoredWeight]:
    """A line for each tensor of `model`; `errors` holds those of packed modules, by name."""
    return [_stored(model, name, parameter, errors) for name, parameter in model.named_parameters()]


def _error(original: nn.Module, unpacked: nn.Module) -> float:
    """Relative error over all matrices of a module."""
    flat = [torch.cat([p.detach().float().flatten() for p in m.parameters()]) for m in (original, unpacked)]
    return relative_error(*flat)


def _stored(model: BlockFFNForCausalLM, name: str, parameter: nn.Parameter, errors: dict[str, float]) -> StoredWeight:
    module_name, _, last = name.rpartition(".")
    if last != "packed":
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(parameter.dtype, "?")
        return StoredWeight(name, tuple(parameter.shape), dtype, parameter.nbytes, 0.0)
    module = model.get_submodule(module_name)
    assert isinstance(module, PackedModule)
    error = errors.get(module_name, 0.0)
    shape, padding = module.unpacked_shape, module.padding_bytes
    return StoredWeight(module_name, shape, module.format, parameter.nbytes, error, padding)


def unpack_model(model: BlockFFNForCausalLM, dtype: torch.dtype) -> None:
    """Turn packed modules into plain ones of `dtype`, in place; everything else is cast to it."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]
    tied = model.config.tie_word_embeddings
    for name, module in packed:
        plain = module.unpack(dtype) if not (tied and module is model.lm_head) else nn.Linear(
            model.config.hidden_size, model.config.vocab_size, bias=False, device="meta"
        )  # fmt: skip
        model.set_submodule(name, plain)
    tie(model)
    model.to(dtype)  # type: ignore[arg-type]
    model.requires_grad_(True)


def settle(model: BlockFFNForCausalLM) -> None:
    """Check and align what was loaded, and freeze it: the kernels are used where nothing needs a gradient."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            try:
                module.settle()
            except ValueError as error:
                raise ValueError(f"{name}.packed: {error}") from error
    tie(model)
    model.requires_grad_(False)


def attach(model: BlockFFNForCausalLM, config: BlockFFNQuantizationConfig) -> None:
    """Mark a packed model as Hugging Face marks one that it loaded: `save_pretrained` then says how it is packed."""
    from blockffn.checkpoints.quantizer import BlockFFNQuantizer

    marks: Any = model
    marks.hf_quantizer = BlockFFNQuantizer(config)
    marks.config.quantization_config, marks.config._is_quantized = config, True
    marks.is_quantized = True
    marks.quantization_method = config.quant_method


def _packed_like(module: nn.Module, format: str, group_size: int) -> PackedModule:
    if isinstance(module, RoutedExperts):
        return PackedRoutedExperts(module, format, group_size)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(module, format, group_size)
    assert isinstance(module, nn.Linear)
    return PackedLinear(module, format, group_size)


def tie(model: BlockFFNForCausalLM) -> None:
    """Tell Hugging Face what the tied parameter is called now, and tie it."""
    name = "packed" if isinstance(model.model.embed_tokens, PackedEmbedding) else "weight"
    model._tied_weights_keys = {f"lm_head.{name}": f"model.embed_tokens.{name}"}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    model.tie_weights(recompute_mapping=False)
