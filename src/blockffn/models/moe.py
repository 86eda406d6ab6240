"""`BlockFFN`: router and experts composed. Usable alone, in anybody's network."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from blockffn.models.experts import RoutedExperts
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.models.routers.shared import with_shared_experts
from blockffn.ops.sparse_ffn import apply_threshold
from blockffn.routing import Routing


class BlockFFN(nn.Module):
    """A feed-forward network in which each token activates its own few experts.

    Args:
        hidden_size: D, width of the tokens.
        num_experts: E, shared ones included.
        moe_intermediate_size: F, width of one expert.
        router: any module that maps `[..., D]` to a `Routing` of the experts that are not shared; default the paper's
            `RMSNorm(ReLU(W x))`.
        num_shared_experts: the first so many experts are active for every token, with weight 1.
        expert_gated: gated experts (an ablation; they lose most of the sparsity).
        expert_activation: `silu` or `norm_silu`.
        eps: epsilon of the default router's norm.
        threshold: routed experts with `|weight| <= threshold` are skipped, and count as inactive in the returned
            routing. May be changed at any time through the attribute of this name.

    `forward(x)` takes tokens `[..., D]` and returns `(y [..., D], Routing of [..., E])`. Penalise the routing with the
    functions in `blockffn.objectives`, measure it with those in `blockffn.metrics`::

        ffn = BlockFFN(512, num_experts=48, moe_intermediate_size=64)
        y, routing = ffn(x)
        loss = task_loss(y) + 0.05 * chunk_sparsification(routing.shares, chunk_length=64)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        moe_intermediate_size: int,
        *,
        router: nn.Module | None = None,
        num_shared_experts: int = 0,
        expert_gated: bool = False,
        expert_activation: str = "silu",
        eps: float = 1e-5,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts),
                            ("moe_intermediate_size", moe_intermediate_size)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= num_shared_experts < num_experts:
            raise ValueError(f"num_shared_experts must lie in 0…{num_experts - 1}, got {num_shared_experts}")
        self.num_shared_experts = num_shared_experts
        if router is None:
            router = ReLURMSNormRouter(hidden_size, num_experts - num_shared_experts, eps=eps)
        self.router = router
        self.routed_experts = RoutedExperts(
            hidden_size, num_experts, moe_intermediate_size, gated=expert_gated, activation=expert_activation, eps=eps
        )
        self.threshold = threshold
        self.reset_parameters(hidden_size**-0.5)

    def reset_parameters(self, std: float) -> None:
        """Draw all matrices from a normal distribution of standard deviation `std`; scales stay at their start."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        routing = self.router(x)
        if self.threshold:
            routing = replace(routing, weights=apply_threshold(routing.weights, self.threshold))
        routing = with_shared_experts(routing, self.num_shared_experts)
        return self.routed_experts(x, routing.weights), routing
