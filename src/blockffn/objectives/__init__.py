"""Training objectives as pure functions of routing tensors `[B, T, E]`; they know no model and keep no state.

Each returns a 0-d tensor: a mean over pairs, chunks, tokens or rows of the batch, or, given a `normalizer`, the sum
over the number that a whole optimisation step holds, so that micro-batches and ranks add up to exactly its value.
Nothing waits for the device, and all of it compiles without graph breaks.

| Name | Reads | Counts |
|---|---|---|
| `activation_locality` | logits | pairs |
| `chunk_sparsification` | shares | chunks |
| `l1` | weights | tokens |
| `balanced_l1` | weights | rows |
| `router_entropy` | shares | tokens |
| `load_balancing` | shares, weights | rows |
| `token_balance` | logits | pairs |
| `dead_experts` | logits | rows |
"""

from blockffn.objectives.activation_locality import activation_locality
from blockffn.objectives.chunk_sparsification import chunk_sparsification
from blockffn.objectives.counts import objective_counts
from blockffn.objectives.dead_experts import dead_experts
from blockffn.objectives.load_balancing import balanced_l1, load_balancing, token_balance
from blockffn.objectives.registry import OBJECTIVES, objective_terms
from blockffn.objectives.router_regularization import l1, router_entropy

__all__ = [
    "OBJECTIVES",
    "activation_locality",
    "balanced_l1",
    "chunk_sparsification",
    "dead_experts",
    "l1",
    "load_balancing",
    "objective_counts",
    "objective_terms",
    "router_entropy",
    "token_balance",
]
