"""What a run-time threshold on routing weights costs in quality and saves in work.

Experts whose routing weight is at most the threshold are skipped (`BlockFFNForCausalLM.set_threshold`). Quality and
sparsity are those of held-out text; the time is that of the sparse FFN alone, one token at a time as in decoding.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockffn.checkpoints.quantize import is_packed
from blockffn.evaluation.perplexity import Evaluation, evaluate
from blockffn.evaluation.run import heldout_batches, load_run
from blockffn.metrics.cost import weight_bytes_per_token
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import RoutedExperts
from blockffn.models.moe import BlockFFN
from blockffn.ops.quantization import pack_experts
from blockffn.ops.sparse_ffn import sparse_ffn, sparse_ffn_packed

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
TIMED_TOKENS = 64
BITS = 16  # of the timed and counted weights
Step = Callable[[Tensor, Tensor], Tensor]  # one token [1, D] and its routing weights [1, E] to y [1, D]
Call = tuple[Step, Tensor, Tensor]  # a layer's step with its tokens [T, D] and their routing weights [T, E]


@dataclass(frozen=True)
class ThresholdPoint:
    """One row of the curve. Sparsity in percent.

    Attributes:
        ffn_bytes: of bf16 expert weights that a token reads, all layers.
        model_bytes: of all bf16 weights that decoding a token reads.
        ffn_microseconds: median time of one layer's experts for one token, called from Python.
    """

    threshold: float
    heldout_loss: float
    perplexity: float
    tls: float
    cls8: float
    ffn_bytes: float
    model_bytes: float
    ffn_microseconds: float


@torch.no_grad()
def threshold_curve(
    path: Path,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    data: Path | None = None,
    split: str = "valid",
    sequence_length: int | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> list[ThresholdPoint]:
    """Evaluate and time the model of `path` at each threshold, in ascending order. Arguments as for `evaluate_run`.

    Raises:
        ValueError: no or negative thresholds, a dense model, or as `evaluate_run`.
    """
    if not thresholds:
        raise ValueError("give at least one threshold, e.g. 0")
    model, tokenizer = load_run(path, device=device)
    if is_packed(model):
        model.dequantize()  # the curve is that of bf16 weights, whose times it gives
    for threshold in (*thresholds, 0.0):  # a wrong one is an error before hours of evaluation
        model.set_threshold(threshold)
    pass_over = functools.partial(
        heldout_batches, path, model, tokenizer, data=data, split=split, sequence_length=sequence_length,
        max_rows=max_rows, batch_size=batch_size,
    )  # fmt: skip
    ids = next(pass_over()[0]).input_ids[:1, :TIMED_TOKENS]
    layers = list(_decoded_layers(model, ids))
    results, calls = [], []
    for threshold in sorted(set(thresholds)):
        model.set_threshold(threshold)
        results.append((threshold, evaluate(model, pass_over()[0])))
        calls.append([(step, x.bfloat16(), block(x)[1].weights) for block, step, x in layers])
    seconds = _median_times(calls)
    return [_point(model, *result, time) for result, time in zip(results, seconds)]


def _point(model: BlockFFNForCausalLM, threshold: float, result: Evaluation, seconds: float) -> ThresholdPoint:
    assert result.sparsity is not None  # every model with experts has one
    tls = result.sparsity.tls
    total = weight_bytes_per_token(model.config, bits_per_weight=BITS, tls_percent=tls)
    return ThresholdPoint(
        threshold=threshold,
        heldout_loss=result.heldout_loss,
        perplexity=result.perplexity,
        tls=tls,
        cls8=result.sparsity.cls[8],
        ffn_bytes=total - weight_bytes_per_token(model.config, bits_per_weight=BITS, tls_percent=100),
        model_bytes=total,
        ffn_microseconds=seconds * 1e6,
    )


def curve_to_dict(path: Path, points: Sequence[ThresholdPoint], **about: Any) -> dict[str, Any]:
    """Plain data, as `--json` writes it."""
    return {"model": str(path), "bits_per_weight": BITS, **about, "points": [asdict(point) for point in points]}


@torch.no_grad()
def _decoded_layers(model: BlockFFNForCausalLM, ids: Tensor) -> Iterator[tuple[BlockFFN, Step, Tensor]]:
    """`(layer, its step, tokens [T, D])`: every layer with the inputs that it meets in this text."""
    blocks = [module for module in model.modules() if isinstance(module, BlockFFN)]
    with _recorded(blocks) as inputs:
        model(ids.to(model.device), use_cache=False)
    for block, x in zip(blocks, inputs):
        yield block, _decode_step(block.routed_experts), x[0]


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _decode_step(experts: RoutedExperts) -> Step:
    """The experts in bf16, in the form in which their device decodes fastest."""
    if experts.activation_norm is not None:  # which no packed format knows
        copy = deepcopy(experts).bfloat16()
        return lambda x, weights: copy(x, weights)
    up, down, gate = experts.up_proj, experts.down_proj, experts.gate_proj
    if up.device.type == "cpu":
        packed = pack_experts(up, down, gate_proj_EFD=gate)
        return lambda x, weights: sparse_ffn_packed(x, packed, weights)
    stored = [None if w is None else w.bfloat16() for w in (up, down, gate)]
    return lambda x, weights: sparse_ffn(x, stored[0], stored[1], weights.to(x.dtype), gate_proj_EFD=stored[2])  # type: ignore[arg-type]


@torch.inference_mode()
def _median_times(thresholds: Sequence[Sequence[Call]], rounds: int = 9) -> list[float]:
    """Median seconds a layer for the calls of each threshold. Thresholds take turns, so that noise meets all alike."""
    times: list[list[float]] = [[] for _ in thresholds]
    num_tokens, device = thresholds[0][0][1].shape[0], thresholds[0][0][1].device
    for _ in range(rounds):
        for token in range(num_tokens):
            for own, calls in zip(times, thresholds):
                begin = time.perf_counter()
                for step, x, weights in calls:
                    step(x[token : token + 1], weights[token : token + 1])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                own.append((time.perf_counter() - begin) / len(calls))
    return [statistics.median(own) for own in times]
