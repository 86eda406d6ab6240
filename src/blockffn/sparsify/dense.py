"""Opens a dense model in our architecture: our own ones, and Hugging Face models that compute as Llama does.

A model is Llama-like if its tensors have Llama's names and shapes and our dense model gives its logits. The second
condition is measured, so that a scale or a norm which a configuration hides is found, not assumed away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockffn.checkpoints.load import is_foreign, load, model_folder
from blockffn.configuration import BlockFFNConfig
from blockffn.models.causal_lm import BlockFFNForCausalLM

TOLERANCE = 1e-3  # of the logits, relative; float32 differences are near 1e-6, those of another formula above 1e-2


def open_dense(path: Path) -> tuple[BlockFFNForCausalLM, PreTrainedTokenizerBase, float]:
    """The dense model of `path` in float32 and in our architecture, its tokenizer, and the relative difference of its
    logits to those of the model as Hugging Face runs it (0 for our own).

    Args:
        path: folder of a model or a run, or a `.gguf` file (which needs the package `gguf`).

    Raises:
        ValueError: there is no model or no tokenizer, the model is sparse already, or it is not Llama-like.
    """
    is_gguf = path.suffix == ".gguf"
    folder = path.parent if is_gguf else model_folder(path)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if is_gguf:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name a folder with a model, or a .gguf file")
        source["gguf_file"] = path.name
    tokenizer = _tokenizer(folder, path, source)
    if not is_gguf and not is_foreign(folder):
        model = load(folder, dtype=torch.float32)
        if model.config.ffn_type != "dense":
            raise ValueError(f"{path} has experts already (ffn_type {model.config.ffn_type}); name a dense model")
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(f"{path} is quantised; name the model that it was made from")
        return model, tokenizer, 0.0
    try:
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source).eval()
    except Exception as error:  # models of unknown kinds fail in ways that are not listed
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be opened as a causal language model: {reason}") from error
    model = from_llama(original)
    return model, tokenizer, _difference(original, model)


def from_llama(original: PreTrainedModel) -> BlockFFNForCausalLM:
    """Our dense model with the weights of a Llama-like one, in float32 and in evaluation mode.

    Raises:
        ValueError: `original` has other tensors than Llama, or computes something else with them.
    """
    kind = original.config.model_type
    config = dense_config(original.config)
    model = BlockFFNForCausalLM(config).eval()
    ours, theirs = model.state_dict(), original.state_dict()
    unlike = sorted(set(ours) ^ set(theirs)) or [name for name in ours if ours[name].shape != theirs[name].shape]
    if unlike:
        where = "has no" if unlike[0] not in theirs else "has an unknown or misshapen"
        raise ValueError(
            f"a model of type {kind!r} is not Llama-like: it {where} tensor {unlike[0]!r}. Models without biases, with "
            "a gated FFN, grouped queries and RMS norms can be converted"
        )
    model.load_state_dict(theirs)
    difference = _difference(original, model)
    if not difference < TOLERANCE:
        raise ValueError(
            f"a model of type {kind!r} is not Llama-like: its tensors have Llama's names, but its logits differ by "
            f"{difference:.1%} from what Llama computes with them"
        )
    return model


def dense_config(config: Any) -> BlockFFNConfig:
    """The configuration of our dense model that computes what a Llama of `config` does: no scales, plain GQA.

    Raises:
        ValueError: a field that Llama has is missing, or the activation is not SiLU.
    """
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    for name in needed:
        if getattr(config, name, None) is None:
            raise ValueError(
                f"a model of type {config.model_type!r} is not Llama-like: its configuration has no {name}"
            )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"the FFN's activation is {activation!r}; models with a gated SiLU can be converted")
    copied = ("vocab_size", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "bos_token_id",
              "eos_token_id", "pad_token_id", "num_key_value_heads", "head_dim")  # fmt: skip
    return BlockFFNConfig(
        **{name: getattr(config, name) for name in needed},
        **{name: getattr(config, name) for name in copied if hasattr(config, name)},
        ffn_type="dense",
        attention_type="gqa",
        scale_emb=1.0,
        scale_depth=None,
        dim_model_base=None,
        initializer_range=getattr(config, "initializer_range", 0.02),
    )


@torch.no_grad()
def _difference(original: PreTrainedModel, model: BlockFFNForCausalLM) -> float:
    """Relative difference of the logits of two models on 64 tokens that depend on nothing but a seed."""
    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    wanted: Tensor = original(tokens, use_cache=False).logits
    return float((model(tokens, use_cache=False).logits - wanted).norm() / wanted.norm())


def _tokenizer(folder: Path, path: Path, source: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **source)
    except Exception as error:  # tokenizers of unknown models fail in ways that are not listed
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds no tokenizer that can be read ({reason}); copy its files there") from error
    return tokenizer
