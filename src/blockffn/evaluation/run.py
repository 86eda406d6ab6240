"""Open what `blockffn train` left: its model, tokenizer, settings and data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from blockffn.checkpoints.files import open_tensors
from blockffn.checkpoints.layouts import recognise_layout
from blockffn.checkpoints.load import is_foreign, load, model_folder
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.data.batch import Batch
from blockffn.data.loader import iterate_split
from blockffn.data.prepare import load_manifest
from blockffn.data.tokenizer import tokenizer_hash
from blockffn.evaluation.perplexity import Evaluation, evaluate
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.device import choose_device
from blockffn.wording import BATCHES_COUNT


def load_run(
    path: Path, *, device: str | None = None, threshold: float | None = None
) -> tuple[BlockFFNForCausalLM, PreTrainedTokenizerBase]:
    """Model (in evaluation mode) and tokenizer of a run's folder, or of a folder in Hugging Face's layout.

    `threshold` replaces the model's own `routing_threshold`.

    Raises:
        ValueError: neither is there, a file is damaged, or a weight is NaN; the message says what was looked for
            and found.
    """
    device = choose_device(device)
    model = load(path, device=device, check_finite=True, progress=sys.stderr.isatty())
    if threshold is not None:
        model.set_threshold(threshold)
    return model, load_tokenizer(model_folder(path))


def load_any(path: Path, *, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_run`, for a causal language model of any architecture that Hugging Face's auto classes know."""
    folder = model_folder(path)
    if recognise_layout(open_tensors(folder)) in ("published", "training") or not is_foreign(folder):
        return load_run(path, device=device)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval().to(choose_device(device)), load_tokenizer(folder)


def heldout_batches(
    path: Path,
    model: BlockFFNForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path | None = None,
    split: str = "valid",
    sequence_length: int | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
) -> tuple[Iterator[Batch], Path]:
    """Batches of a split of a prepared folder, and the folder; folder, length and alignment default to the run's own.

    Raises:
        ValueError: no data is known, or it was prepared with another tokenizer or a larger vocabulary.
    """
    for name, value in (("sequence_length", sequence_length), ("max_rows", max_rows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    align = 1
    if (path / "config.yaml").is_file():
        from blockffn.settings import load_yaml
        from blockffn.training.config import TrainSettings, check_data_of_run

        settings = load_yaml(TrainSettings, path / "config.yaml").data
        align = settings.align
        if data is None:
            data = Path(next(iter(settings.folders)))
            check_data_of_run(path, data, otherwise=", or say what text to score: --data FOLDER")
        sequence_length = sequence_length or settings.sequence_length
    if data is None:
        raise ValueError(f"{path} is not a run, so say what text to score: --data FOLDER (made by blockffn prepare)")
    manifest = load_manifest(data)
    if manifest.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{data} has a vocabulary of {manifest.vocab_size}, the model of {model.config.vocab_size}; "
            f"prepare the text with the model's tokenizer: blockffn prepare … --tokenizer {path}"
        )
    if manifest.tokenizer_hash != tokenizer_hash(cast(PreTrainedTokenizerFast, tokenizer)):
        raise ValueError(
            f"{data} was prepared with another tokenizer than that of {path}; "
            f"prepare the text anew: blockffn prepare … --tokenizer {path}"
        )
    batches = iterate_split(
        data,
        split,
        sequence_length=sequence_length or min(model.config.max_position_embeddings, 1024),
        batch_size=batch_size,
        align=align,
        max_rows=max_rows,
    )
    bar = tqdm(
        batches, desc="held-out text", bar_format=BATCHES_COUNT, leave=False, delay=1, disable=not sys.stderr.isatty()
    )
    return iter(bar), data


def evaluate_run(
    path: Path,
    *,
    data: Path | None = None,
    split: str = "valid",
    sequence_length: int | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
    threshold: float | None = None,
    reference_counting: bool = False,
    device: str | None = None,
) -> Evaluation:
    """Evaluate the model of `path` on a split of a prepared folder; both default to the run's own.

    Raises:
        ValueError: as `load_run` and `heldout_batches`.
    """
    model, tokenizer = load_run(path, device=device, threshold=threshold)
    batches, data = heldout_batches(
        path,
        model,
        tokenizer,
        data=data,
        split=split,
        sequence_length=sequence_length,
        max_rows=max_rows,
        batch_size=batch_size,
    )
    return evaluate(
        model,
        batches,
        token_bytes=np.load(data / "token_bytes.npy"),
        source_names=load_manifest(data).source_names,
        reference_counting=reference_counting,
    )
