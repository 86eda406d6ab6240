"""`BlockFFN`: router and experts composed. Usable alone, in anybody's network."""

from __future__ import annotations

from torch import Tensor, nn

from blockffn.models.experts import RoutedExperts
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.routing import Routing


class BlockFFN(nn.Module):
    """A feed-forward network in which each token activates its own few experts.

    Args:
        hidden_size: D, width of the tokens.
        num_experts: E.
        moe_intermediate_size: F, width of one expert.
        router: any module that maps `[..., D]` to a `Routing`; default the paper's `RMSNorm(ReLU(W x))`.
        expert_gated: gated experts (an ablation; they lose most of the sparsity).
        eps: epsilon of the default router's norm.

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
        expert_gated: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts),
                            ("moe_intermediate_size", moe_intermediate_size)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.router = router if router is not None else ReLURMSNormRouter(hidden_size, num_experts, eps=eps)
        self.routed_experts = RoutedExperts(hidden_size, num_experts, moe_intermediate_size, gated=expert_gated)
        self.reset_parameters(hidden_size**-0.5)

    def reset_parameters(self, std: float) -> None:
        """Draw all matrices from a normal distribution of standard deviation `std`; norm scales are 1."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std) if parameter.ndim > 1 else nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        routing = self.router(x)
        return self.routed_experts(x, routing.weights), routing
