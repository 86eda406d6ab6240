"""What a run needs before its first step: settings that fit the data, rows, coefficients that observe what there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from blockffn.checkpoints.load import load, model_folder
from blockffn.data.loader import BatchLoader
from blockffn.data.prepare import load_manifest
from blockffn.data.tokenizer import load_tokenizer, tokenizer_hash
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import did_you_mean, preset_config
from blockffn.training.coefficients import Coefficient
from blockffn.training.config import TrainSettings
from blockffn.training.distributed import World


def check_observations(coefficients: dict[str, Coefficient]) -> None:
    """Raises `ValueError` for a coefficient that observes what is not measured."""
    measured = {"tls", "cls8", "language_model", "grad_norm", *coefficients}
    for name, coefficient in coefficients.items():
        observed = getattr(coefficient, "observes", None)
        if observed is not None and observed not in measured:
            raise ValueError(f"the coefficient of {name} observes {observed!r}{did_you_mean(observed, measured)}")


def with_vocabulary(settings: TrainSettings) -> TrainSettings:
    """`settings` with the special tokens and the vocabulary size of the data, unless the user set a larger one.

    Raises:
        ValueError: no data folders, or a vocabulary smaller than the data's.
    """
    if not settings.data.folders:
        raise ValueError("no data: give a folder that `blockffn prepare` made, as data.folders or with --data")
    if settings.start_from is not None:  # its vocabulary is its own, and the data's must be the same
        check_tokenizer(settings.data.folders, settings.start_from)
        return settings
    manifests = [load_manifest(Path(folder)) for folder in settings.data.folders]
    needed = max(manifest.vocab_size for manifest in manifests)
    chosen = settings.model.get("vocab_size", needed)
    if chosen < needed:
        raise ValueError(f"model.vocab_size is {chosen}, but the data's tokenizer has {needed} tokens")
    tokens = {name: getattr(manifests[0], name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return replace(settings, model={**tokens, **settings.model, "vocab_size": chosen})


def check_tokenizer(folders: Iterable[str], model: str) -> None:
    """Raises `ValueError` if a prepared folder was made with another tokenizer than that of the folder `model`."""
    expected = tokenizer_hash(load_tokenizer(model_folder(Path(model))))
    for folder in folders:
        if load_manifest(Path(folder)).tokenizer_hash != expected:
            raise ValueError(
                f"{folder} was prepared with another tokenizer than that of {model}; "
                f"prepare the text anew: blockffn prepare … --tokenizer {model}"
            )


def make_model(settings: TrainSettings) -> BlockFFNForCausalLM:
    """The model that learns, in float32 on the CPU: freshly drawn, or that of `start_from`.

    Raises:
        ValueError: the settings name no possible model, or `start_from` holds none that can be trained.
    """
    if settings.start_from is None:
        return BlockFFNForCausalLM(preset_config(settings.size, settings.method, **settings.model))
    model = load(Path(settings.start_from), dtype=torch.float32)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{settings.start_from} is quantised, and packed weights cannot be trained; name its original")
    return model


def make_loader(settings: TrainSettings, world: World) -> BatchLoader:
    return BatchLoader(
        {Path(folder): weight for folder, weight in settings.data.folders.items()},
        sequence_length=settings.data.sequence_length,
        global_batch_size=settings.batch_size,
        align=settings.data.align,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
    )
