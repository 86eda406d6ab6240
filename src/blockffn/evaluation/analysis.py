"""The evidence about routing that one checkpoint holds, from one pass over held-out text.

The pass streams: counters per layer and per vocabulary item are all that is kept, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blockffn.data.batch import Batch
from blockffn.evaluation.draft_trees import draft_tree_union, prefixes_of
from blockffn.evaluation.perplexity import Scores, evaluate, token_losses
from blockffn.evaluation.token_classes import CLASSES
from blockffn.metrics.balance import load_statistics
from blockffn.metrics.bimodality import two_component_fit
from blockffn.metrics.report import SparsityReport
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.moe import BlockFFN

PREFIX_TOKENS = 64  # of the text that a tree is drafted behind
MIN_OCCURRENCES = 10  # of a vocabulary item, for its mean to say something about it


class TokenCounters:
    """Sums over the tokens of documents, on the device: by vocabulary item, and by layer with experts."""

    def __init__(self, vocab_size: int, num_layers: int, device: torch.device) -> None:
        self.count = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.active_share = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.norms = torch.zeros(3, num_layers, dtype=torch.float64, device=device)  # input, output, routing weights

    def update(self, batch: Batch, scores: Scores, ffn: list[tuple[Tensor, Tensor]]) -> None:
        """Add a batch: its routings, and input and output `[B, T, D]` of each layer's feed-forward network."""
        routings = scores[1]
        tokens = batch.document_ids >= 0
        shares = torch.stack([(r.weights != 0).double().mean(dim=-1) for r in routings]).mean(dim=0)
        ids = batch.input_ids.flatten()
        self.count.index_add_(0, ids, tokens.flatten().double())
        self.active_share.index_add_(0, ids, (shares * tokens).flatten())
        for layer, (routing, (x, y)) in enumerate(zip(routings, ffn, strict=True)):
            for row, vectors in enumerate((x, y, routing.weights)):
                self.norms[row, layer] += (vectors.float().norm(dim=-1) * tokens).sum()


def analyze(
    model: BlockFFNForCausalLM,
    batches: Iterable[Batch],
    classes: NDArray[np.int64],
    *,
    precision: str = "float32",
    num_trees: int = 0,
) -> dict[str, Any]:
    """Plain data about a model's routing, shares in percent; `blockffn.reporting.evidence` makes tables of it.

    Args:
        classes: `[V]`, index into `token_classes.CLASSES` of each id.
        precision: as `evaluate`.
        num_trees: draft so many trees behind the beginnings of rows (`draft_tree_union`), after the pass.

    Raises:
        ValueError: the model has no routed experts, or there is no text.
    """
    layers = routed_layers(model)
    if not layers:
        raise ValueError("this model is dense: it has no routing to analyse; blockffn evaluate measures its loss")
    counters = TokenCounters(model.config.vocab_size, len(layers), next(model.parameters()).device)
    prefixes: list[Tensor] = []
    with _recorded([ffn for _, ffn in layers]) as recorded:

        def score(batch: Batch) -> Scores:
            recorded.clear()
            scores = token_losses(model, batch, precision=precision)
            counters.update(batch, scores, recorded)
            if len(prefixes) < num_trees:
                prefixes.extend(prefixes_of(batch.document_ids, batch.input_ids, length=PREFIX_TOKENS))
            return scores

        evaluation = evaluate(model, batches, precision=precision, score=score)
    report = evaluation.sparsity
    assert report is not None
    return {
        "loss": evaluation.heldout_loss,
        "tokens": report.tokens,
        "num_experts": model.config.num_experts,
        **report.scalars(),
        "cls": report.cls,
        "layers": _by_layer([number for number, _ in layers], report, counters),
        "windows": _by_window(report),
        "classes": _by_class(classes, counters),
        "vocabulary": _vocabulary(counters),
        "draft_trees": draft_tree_union(model, prefixes[:num_trees]) if num_trees else None,
    }


def routed_layers(model: BlockFFNForCausalLM) -> list[tuple[int, BlockFFN]]:
    """Number from 1 and feed-forward network of each layer that has routed experts."""
    mlps = (layer.mlp for layer in model.model.layers)
    return [(number, mlp) for number, mlp in enumerate(mlps, start=1) if isinstance(mlp, BlockFFN)]


@contextmanager
def _recorded(modules: list[BlockFFN]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that each forward pass of the modules appends input and output to."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        seen.append((inputs[0], output[0]))

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _by_layer(numbers: list[int], report: SparsityReport, counters: TokenCounters) -> list[dict[str, Any]]:
    norms = (counters.norms / report.tokens).tolist()
    rows = []
    for i, (number, layer) in enumerate(zip(numbers, report.layers, strict=True)):
        load = load_statistics(layer.expert_use)
        rows.append(
            {
                "layer": number,
                **layer.scalars(),
                "input_norm": norms[0][i],
                "output_norm": norms[1][i],
                "weight_norm": norms[2][i],
                "load_variation": load.coefficient_of_variation,
                "load_max_over_mean": load.max_over_mean,
                "dead_experts": load.dead_experts,
                "expert_use": list(layer.expert_use),
            }
        )
    return rows


def _by_window(report: SparsityReport) -> list[dict[str, float]]:
    """CLS beside what routing without memory gives: at the same TLS, and with each expert used as often as it is."""
    use = np.array(report.expert_use) / 100
    return [
        {
            "window": window,
            "cls": cls,
            "same_tls": 100 * (report.tls / 100) ** window,
            "same_use": float(100 * ((1 - use) ** window).mean()),
        }
        for window, cls in sorted(report.cls.items())
    ]


def _by_class(classes: NDArray[np.int64], counters: TokenCounters) -> list[dict[str, Any]]:
    count, shares = counters.count.cpu().numpy(), counters.active_share.cpu().numpy()
    classes = np.pad(classes[: len(count)], (0, max(0, len(count) - len(classes))), constant_values=len(CLASSES) - 1)
    tokens = np.bincount(classes, weights=count, minlength=len(CLASSES))
    active = np.bincount(classes, weights=shares, minlength=len(CLASSES))
    items = np.bincount(classes[count > 0], minlength=len(CLASSES))
    rows = [
        {"class": name, "items": int(items[i]), "tokens": int(tokens[i]), "active_share": 100 * active[i] / tokens[i]}
        for i, name in enumerate(CLASSES)
        if tokens[i]
    ]
    return sorted(rows, key=lambda row: row["active_share"])


def _vocabulary(counters: TokenCounters) -> dict[str, Any]:
    """Mean active share of each frequent vocabulary item, as a histogram with a fit of two normal distributions."""
    count, shares = counters.count.cpu().numpy(), counters.active_share.cpu().numpy()
    frequent = count >= MIN_OCCURRENCES
    values = 100 * shares[frequent] / count[frequent]
    counts, edges = np.histogram(values, bins=40) if len(values) else (np.zeros(0), np.zeros(1))
    fit = two_component_fit(values.tolist())
    return {
        "items": len(values),
        "min_occurrences": MIN_OCCURRENCES,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "fit": None if fit is None else {**vars(fit), "bimodal": fit.bimodal},
    }
