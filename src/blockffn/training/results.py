"""What a run yields: its held-out loss, its model in Hugging Face's layout, its log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from blockffn.data.loader import iterate_split
from blockffn.data.tokenizer import load_tokenizer
from blockffn.evaluation.perplexity import evaluate
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.training.config import TrainSettings
from blockffn.training.distributed import World


def heldout_loss(model: BlockFFNForCausalLM, wrapped: torch.nn.Module, settings: TrainSettings) -> float:
    """Cross entropy on some rows of the first folder's validation split. Every rank computes all of it."""
    module: Any = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    folder = Path(next(iter(settings.data.folders)))
    batches = iterate_split(
        folder,
        "valid",
        sequence_length=settings.data.sequence_length,
        batch_size=settings.micro_batch_size or settings.batch_size,
        align=settings.data.align,
        max_rows=settings.evaluate_rows,
    )
    return evaluate(model, batches, score=module.score).heldout_loss


def save_model(
    folder: Path, wrapped: torch.nn.Module, model: BlockFFNForCausalLM, settings: TrainSettings, world: World
) -> None:
    """Write weights, configuration and tokenizer in Hugging Face's layout, whole or not at all.

    Sharded weights are gathered first. All ranks call this.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {k.removeprefix("model."): v for k, v in get_model_state_dict(wrapped, options=options).items()}
    if world.is_main:
        torn = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(torn, ignore_errors=True)
        model.save_pretrained(torn, state_dict=state)
        load_tokenizer(Path(next(iter(settings.data.folders))) / "tokenizer").save_pretrained(torn)
        shutil.rmtree(folder, ignore_errors=True)
        torn.rename(folder)
    world.barrier()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
