"""The objectives by name, each called in one form on a layer's `Routing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from blockffn.objectives.activation_locality import activation_locality
from blockffn.objectives.chunk_sparsification import chunk_sparsification
from blockffn.objectives.load_balancing import load_balancing, token_balance
from blockffn.objectives.router_regularization import l1, router_entropy
from blockffn.presets import did_you_mean
from blockffn.routing import Routing

Counts = Mapping[str, Tensor] | None


def _activation_locality(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    n = _normalizer(counts, "num_pairs")
    return activation_locality(routing.logits, document_ids=document_ids, sharpness=sharpness, normalizer=n)


def _chunk_sparsification(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    n = _normalizer(counts, "num_chunks")
    return chunk_sparsification(routing.shares, chunk_length=chunk_length, document_ids=document_ids, normalizer=n)


def _l1(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    return l1(routing.weights, document_ids=document_ids, normalizer=_normalizer(counts, "num_tokens"))


def _router_entropy(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    return router_entropy(routing.shares, document_ids=document_ids, normalizer=_normalizer(counts, "num_tokens"))


def _load_balancing(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    n = _normalizer(counts, "num_rows")
    return load_balancing(routing.shares, routing.weights, document_ids=document_ids, normalizer=n)


def _token_balance(
    routing: Routing, *, document_ids: Tensor | None, counts: Counts, chunk_length: int, sharpness: float
) -> Tensor:
    n = _normalizer(counts, "num_pairs")
    return token_balance(routing.logits, document_ids=document_ids, sharpness=sharpness, normalizer=n)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "activation_locality": _activation_locality,
    "chunk_sparsification": _chunk_sparsification,
    "l1": _l1,
    "router_entropy": _router_entropy,
    "load_balancing": _load_balancing,
    "token_balance": _token_balance,
}


def objective_terms(
    routings: Sequence[Routing],
    names: Iterable[str],
    *,
    document_ids: Tensor | None = None,
    counts: Counts = None,
    chunk_length: int = 64,
    sharpness: float = 100.0,
) -> dict[str, Tensor]:
    """Each named objective, averaged over layers.

    Args:
        routings: one `Routing` of `[B, T, E]` per layer.
        names: keys of `OBJECTIVES`.
        document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
        counts: `objective_counts` summed over the whole optimisation step: the terms of its micro-batches and ranks
            then add up to the term of the whole. `None`: the counts of this batch.
        chunk_length: for `chunk_sparsification`. sharpness: for `activation_locality` and `token_balance`.

    Returns:
        Name to 0-d float32 tensor (float64 for float64 routings).

    Raises:
        ValueError: names but no routing, an unknown name, wrong shapes, or T is not a multiple of `chunk_length`.
    """
    names = list(names)
    if names and not routings:
        raise ValueError("no routings to penalise; call the model with output_routing=True (a dense model has none)")
    terms = {}
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}{did_you_mean(name, OBJECTIVES)}")
        objective = OBJECTIVES[name]
        layers = [
            objective(r, document_ids=document_ids, counts=counts, chunk_length=chunk_length, sharpness=sharpness)
            for r in routings
        ]
        terms[name] = sum(layers[1:], start=layers[0]) / len(layers)
    return terms


def _normalizer(counts: Counts, key: str) -> Tensor | None:
    return None if counts is None else counts[key]
