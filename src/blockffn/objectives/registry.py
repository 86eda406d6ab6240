"""The objectives by name, each called in one form on a layer's `Routing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from blockffn.objectives.activation_locality import activation_locality
from blockffn.objectives.chunk_sparsification import chunk_sparsification
from blockffn.objectives.dead_experts import dead_experts
from blockffn.objectives.load_balancing import balanced_l1, load_balancing, token_balance
from blockffn.objectives.router_regularization import l1, router_entropy
from blockffn.presets import did_you_mean
from blockffn.routing import Routing

Counts = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class _Batch:
    """What the objectives of one batch share; see `objective_terms`."""

    document_ids: Tensor | None
    counts: Counts
    chunk_length: int
    sharpness: float
    num_experts_per_tok: int

    def number_of(self, units: str) -> Tensor | None:
        return None if self.counts is None else self.counts[f"num_{units}"]


def _activation_locality(routing: Routing, batch: _Batch) -> Tensor:
    return activation_locality(
        routing.logits,
        document_ids=batch.document_ids,
        sharpness=batch.sharpness,
        normalizer=batch.number_of("pairs"),
    )


def _chunk_sparsification(routing: Routing, batch: _Batch) -> Tensor:
    return chunk_sparsification(
        routing.shares,
        chunk_length=batch.chunk_length,
        document_ids=batch.document_ids,
        normalizer=batch.number_of("chunks"),
    )


def _l1(routing: Routing, batch: _Batch) -> Tensor:
    return l1(routing.weights, document_ids=batch.document_ids, normalizer=batch.number_of("tokens"))


def _balanced_l1(routing: Routing, batch: _Batch) -> Tensor:
    return balanced_l1(
        routing.weights,
        num_experts_per_tok=batch.num_experts_per_tok,
        document_ids=batch.document_ids,
        normalizer=batch.number_of("rows"),
    )


def _router_entropy(routing: Routing, batch: _Batch) -> Tensor:
    return router_entropy(routing.shares, document_ids=batch.document_ids, normalizer=batch.number_of("tokens"))


def _load_balancing(routing: Routing, batch: _Batch) -> Tensor:
    return load_balancing(
        routing.shares, routing.weights, document_ids=batch.document_ids, normalizer=batch.number_of("rows")
    )


def _token_balance(routing: Routing, batch: _Batch) -> Tensor:
    return token_balance(
        routing.logits,
        document_ids=batch.document_ids,
        sharpness=batch.sharpness,
        normalizer=batch.number_of("pairs"),
    )


def _dead_experts(routing: Routing, batch: _Batch) -> Tensor:
    return dead_experts(routing.logits, document_ids=batch.document_ids, normalizer=batch.number_of("rows"))


OBJECTIVES: dict[str, Callable[[Routing, _Batch], Tensor]] = {
    "activation_locality": _activation_locality,
    "chunk_sparsification": _chunk_sparsification,
    "l1": _l1,
    "balanced_l1": _balanced_l1,
    "router_entropy": _router_entropy,
    "load_balancing": _load_balancing,
    "token_balance": _token_balance,
    "dead_experts": _dead_experts,
}


def objective_terms(
    routings: Sequence[Routing],
    names: Iterable[str],
    *,
    document_ids: Tensor | None = None,
    counts: Counts = None,
    chunk_length: int = 64,
    sharpness: float = 100.0,
    num_shared_experts: int = 0,
    num_experts_per_tok: int | None = None,
) -> dict[str, Tensor]:
    """Each named objective, averaged over layers.

    Args:
        routings: one `Routing` of `[B, T, E]` per layer.
        names: keys of `OBJECTIVES`.
        document_ids: `[B, T]`, -1 for padding; `None`: each row is one document.
        counts: `objective_counts` summed over the whole optimisation step: the terms of its micro-batches and ranks
            then add up to the term of the whole. `None`: the counts of this batch.
        chunk_length: for `chunk_sparsification`. sharpness: for `activation_locality` and `token_balance`.
        num_shared_experts: so many first columns are not routed to, and no objective sees them.
        num_experts_per_tok: active experts a token that `balanced_l1` aims at, shared ones included.

    Returns:
        Name to 0-d float32 tensor (float64 for float64 routings).

    Raises:
        ValueError: names but no routing, an unknown name, wrong shapes, T is not a multiple of `chunk_length`, or
            `balanced_l1` without `num_experts_per_tok`.
    """
    names = list(names)
    if names and not routings:
        raise ValueError("no routings to penalise; call the model with output_routing=True (a dense model has none)")
    if "balanced_l1" in names and num_experts_per_tok is None:
        raise ValueError("balanced_l1 needs num_experts_per_tok, the number of active experts that it aims at")
    num_chosen = (num_experts_per_tok or 0) - num_shared_experts
    batch = _Batch(document_ids, counts, chunk_length, sharpness, num_chosen)
    routings = [_routed(routing, num_shared_experts) for routing in routings]
    terms = {}
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}{did_you_mean(name, OBJECTIVES)}")
        layers = [OBJECTIVES[name](routing, batch) for routing in routings]
        terms[name] = sum(layers[1:], start=layers[0]) / len(layers)
    return terms


def _routed(routing: Routing, num_shared: int) -> Routing:
    """The columns of the experts that a router chooses among."""
    if not num_shared:
        return routing
    return Routing(*(x[..., num_shared:] for x in (routing.logits, routing.shares, routing.weights)))
