"""Shared experts in a `Routing`: columns of experts that every token uses and no router chooses.

They come first and have the routing weight 1, so that the same op computes them and every metric counts them as active,
which they are. Their logits and shares are 0. Objectives shall neither spread load over them nor reward that they
never change, so `blockffn.objectives.objective_terms` leaves their columns out.
"""

from __future__ import annotations

from torch.nn import functional as F

from blockffn.routing import Routing


def with_shared_experts(routing: Routing, num_shared: int) -> Routing:
    """`[..., E - num_shared]` routed experts to `[..., E]`, the shared ones in front."""
    if not num_shared:
        return routing
    front = (num_shared, 0)
    return Routing(
        logits=F.pad(routing.logits, front),
        shares=F.pad(routing.shares, front),
        weights=F.pad(routing.weights, front, value=1.0),
    )
