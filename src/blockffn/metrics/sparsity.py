"""Token-level sparsity (TLS), chunk-level sparsity (CLS) and reuse ratio of routing weights `[B, T, E]`, in percent.

An expert is active for a token if its weight is not 0. `document_ids [B, T]` marks documents and, with -1, padding;
`None` stands for rows that are one document each. Padding never counts, and no window or pair holds tokens of two
documents. A figure over no tokens, windows or pairs is NaN.

The functions measure one layer's weights; `SparsityMeter` accumulates all layers over many batches. Neither waits for
the device before the figures are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockffn.metrics.reference_counting import reference_line
from blockffn.metrics.report import LayerSparsity, Sparsity, SparsityReport
from blockffn.metrics.units import check_window, complete_windows, documents_of, neighbour_reuse, window_unions
from blockffn.routing import Routing


def token_level_sparsity(weights: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Share of experts that are inactive for a token, averaged over tokens.

    Args:
        weights: `[B, T, E]`.
        document_ids: `[B, T]`, -1 for padding.

    Returns:
        0-d float64, in percent.

    Raises:
        ValueError: wrong shapes.
    """
    return chunk_level_sparsity(weights, window=1, document_ids=document_ids)


def chunk_level_sparsity(weights: Tensor, *, window: int, document_ids: Tensor | None = None) -> Tensor:
    """Share of experts that are inactive for all tokens of a window, averaged over windows.

    Windows are consecutive, non-overlapping groups of `window` positions of a row, counted if all their positions hold
    tokens of one document.

    Args:
        weights: `[B, T, E]`.
        window: positions per window.
        document_ids: `[B, T]`, -1 for padding.

    Returns:
        0-d float64, in percent.

    Raises:
        ValueError: wrong shapes, or a window below 1.
    """
    check_window(window)
    document_ids = documents_of(weights, document_ids)
    counted = complete_windows(document_ids, window)
    unions = window_unions(weights != 0, window) & counted.unsqueeze(-1)
    return 100 * (1 - unions.sum().double() / (counted.sum() * weights.shape[-1]))


def reuse_ratio(weights: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Share of a token's active experts that the next token of its document activates too, averaged over tokens.

    A token without an active expert has no such share and is left out. The paper (section 4.1.2) averages over the
    pairs of one sequence; here all pairs weigh the same.

    Args:
        weights: `[B, T, E]`.
        document_ids: `[B, T]`, -1 for padding.

    Returns:
        0-d float64, in percent.

    Raises:
        ValueError: wrong shapes.
    """
    ratios, counted = neighbour_reuse(weights != 0, documents_of(weights, document_ids))
    return 100 * ratios.sum() / counted.sum()


class SparsityMeter:
    """Counts what the routings of batch after batch activate; `compute` turns the counts into a `SparsityReport`.

    `update` only adds to counters on the device and never waits for it; `compute` waits once.

    Args:
        num_layers: routings per batch. num_experts: E.
        windows: window lengths of the chunk-level sparsity.
        reference_counting: count TLS and CLS as the published training code does, for comparison: TLS (and expert use)
            over all positions with padding, CLS over `reference_line`. Its figures are means over batches; here counts
            are pooled, which is the same for batches of one size. The reuse ratio has no published code and stays.
        num_sources: labels of texts to report separately, 0 for none.
        device: where the counters live; that of the routings.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        windows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        reference_counting: bool = False,
        num_sources: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_layers", num_layers), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for window in windows:
            check_window(window)
        if num_sources < 0:
            raise ValueError(f"num_sources must not be negative, got {num_sources}")
        self.num_layers, self.num_experts, self.num_sources = num_layers, num_experts, num_sources
        self.windows, self.reference_counting = tuple(windows), reference_counting

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # The last source collects what has no label. Counts by source are pooled over layers.
        num_windows, num_slots = len(self.windows), num_sources + 1
        self._counters = {
            "tokens": zeros(),
            "expert_tokens": zeros(num_layers, num_experts),
            "windows": zeros(num_windows),
            "unions": zeros(num_windows, num_layers),
            "pairs": zeros(num_layers),
            "reuse": zeros(num_layers, dtype=torch.float64),
            "source_tokens": zeros(num_slots),
            "source_active": zeros(num_slots),
            "source_windows": zeros(num_windows, num_slots),
            "source_unions": zeros(num_windows, num_slots),
            "source_pairs": zeros(num_slots),
            "source_reuse": zeros(num_slots, dtype=torch.float64),
        }

    @torch.no_grad()
    def update(
        self, routings: Sequence[Routing], document_ids: Tensor | None = None, source_ids: Tensor | None = None
    ) -> None:
        """Add one batch.

        Args:
            routings: one per layer, `[B, T, E]`.
            document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
            source_ids: label of each row `[B]` or token `[B, T]`, from 0; others are counted under no label.

        Raises:
            ValueError: wrong shapes or numbers, or `source_ids` without `num_sources`.
        """
        documents = self._check(routings, document_ids)
        slots = self._source_slots(documents, source_ids)
        counters, line = self._counters, None
        tokens, window_documents, window_slots = documents >= 0, documents, slots
        if self.reference_counting:
            tokens = torch.ones_like(tokens)
            line, window_documents = reference_line(documents)
            window_slots = None if slots is None else slots.flatten()[line]
        complete = [complete_windows(window_documents, window) for window in self.windows]
        first_slots = [_first_of_window(window_slots, window) for window in self.windows]

        counters["tokens"] += tokens.sum()
        _add_by_source(counters["source_tokens"], slots, tokens)
        for w in range(len(self.windows)):
            counters["windows"][w] += complete[w].sum()
            _add_by_source(counters["source_windows"][w], first_slots[w], complete[w])

        for layer, routing in enumerate(routings):
            active = routing.weights != 0
            counted = active & tokens.unsqueeze(-1)
            counters["expert_tokens"][layer] += counted.sum(dim=(0, 1))
            _add_by_source(counters["source_active"], slots, counted)

            ratios, pairs = neighbour_reuse(active, documents)
            counters["reuse"][layer] += ratios.sum()
            counters["pairs"][layer] += pairs.sum()
            left_slots = None if slots is None else slots[:, :-1]
            _add_by_source(counters["source_reuse"], left_slots, ratios)
            _add_by_source(counters["source_pairs"], left_slots, pairs)

            windowed = active if line is None else active.flatten(0, 1)[line]
            for w, window in enumerate(self.windows):
                unions = window_unions(windowed, window) & complete[w].unsqueeze(-1)
                counters["unions"][w, layer] += unions.sum()
                _add_by_source(counters["source_unions"][w], first_slots[w], unions)

    def all_reduce(self, group: Any = None) -> None:
        """Add up the counters of all ranks of a `torch.distributed` group; all ranks call it once, before `compute`."""
        for counter in self._counters.values():
            dist.all_reduce(counter, group=group)

    def reset(self) -> None:
        """Forget all batches."""
        for counter in self._counters.values():
            counter.zero_()

    def compute(self, source_labels: Sequence[str] | None = None) -> SparsityReport:
        """The report of all batches so far.

        Args:
            source_labels: names of the `num_sources` sources; default their numbers.

        Raises:
            ValueError: another number of names.
        """
        labels = [str(i) for i in range(self.num_sources)] if source_labels is None else list(source_labels)
        if len(labels) != self.num_sources:
            raise ValueError(f"{self.num_sources} sources need as many labels, got {labels}")
        count: dict[str, Any] = {name: counter.tolist() for name, counter in self._counters.items()}
        tokens, layers, experts = count["tokens"], range(self.num_layers), self.num_experts
        per_layer = tuple(
            LayerSparsity(
                tls=_unused(sum(count["expert_tokens"][i]), tokens * experts),
                cls=self._cls([unions[i] for unions in count["unions"]], count["windows"], experts),
                reuse_ratio=_percent(count["reuse"][i], count["pairs"][i]),
                tokens=tokens,
                expert_use=tuple(_percent(used, tokens) for used in count["expert_tokens"][i]),
            )
            for i in layers
        )
        rows = self.num_layers * experts
        sources = {
            label: Sparsity(
                tls=_unused(count["source_active"][s], count["source_tokens"][s] * rows),
                cls=self._cls([u[s] for u in count["source_unions"]], [n[s] for n in count["source_windows"]], rows),
                reuse_ratio=_percent(count["source_reuse"][s], count["source_pairs"][s]),
                tokens=count["source_tokens"][s],
            )
            for s, label in enumerate(labels)
        }
        return SparsityReport(
            tls=_unused(sum(map(sum, count["expert_tokens"])), tokens * rows),
            cls=self._cls([sum(unions) for unions in count["unions"]], count["windows"], rows),
            reuse_ratio=_percent(sum(count["reuse"]), sum(count["pairs"])),
            tokens=tokens,
            layers=per_layer,
            sources=sources,
        )

    def _cls(self, unions: list[int], num_windows: list[int], experts: int) -> dict[int, float]:
        return {
            window: _unused(used, number * experts)
            for window, used, number in zip(self.windows, unions, num_windows, strict=True)
            if number
        }

    def _check(self, routings: Sequence[Routing], document_ids: Tensor | None) -> Tensor:
        if len(routings) != self.num_layers:
            raise ValueError(f"this meter counts {self.num_layers} layers, got {len(routings)} routings")
        shape = routings[0].weights.shape
        for layer, routing in enumerate(routings):
            if routing.weights.shape != shape or shape[-1] != self.num_experts:
                raise ValueError(
                    f"layer {layer} has routing weights {list(routing.weights.shape)}; "
                    f"expected {[*shape[:-1], self.num_experts]}"
                )
        return documents_of(routings[0].weights, document_ids)

    def _source_slots(self, documents: Tensor, source_ids: Tensor | None) -> Tensor | None:
        """Counter of each token `[B, T]`, or None if sources are not told apart."""
        if source_ids is None:
            return None
        if not self.num_sources:
            raise ValueError("source_ids given to a meter without sources; make it with num_sources")
        if source_ids.shape not in (documents.shape, documents.shape[:1]):
            raise ValueError(
                f"source_ids must have shape {list(documents.shape)} or {list(documents.shape[:1])}, "
                f"got {list(source_ids.shape)}"
            )
        by_token = source_ids if source_ids.ndim == 2 else source_ids.unsqueeze(1).expand(documents.shape)
        known = (by_token >= 0) & (by_token < self.num_sources)
        return torch.where(known, by_token, self.num_sources).long()  # an index, whatever integers the labels are


def _first_of_window(slots: Tensor | None, window: int) -> Tensor | None:
    """A window belongs to the source of its first token."""
    return None if slots is None else slots[:, : slots.shape[1] // window * window : window]


def _add_by_source(counter: Tensor, slots: Tensor | None, values: Tensor) -> None:
    """Add `values [B, N, ...]` to the counter `[num_sources + 1]` of their source, `slots [B, N]`."""
    if slots is not None:
        per_slot = values.flatten(2).sum(dim=2) if values.ndim > 2 else values
        counter.index_add_(0, slots.flatten(), per_slot.flatten().to(counter.dtype))


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else float("nan")


def _unused(used: float, whole: float) -> float:
    return 100 * (1 - used / whole) if whole else float("nan")
