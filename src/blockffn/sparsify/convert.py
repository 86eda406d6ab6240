"""A dense model to one with experts, layer by layer, with a receipt of what each stage changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from blockffn.configuration import BlockFFNConfig
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.experts import GatedFFN
from blockffn.models.moe import BlockFFN
from blockffn.models.routers.relu_rmsnorm import ReLURMSNormRouter
from blockffn.routing import Routing
from blockffn.sparsify.layer import Neurons, fit_router, order_by_expert, refit_down, routed, without_gates
from blockffn.sparsify.passages import ffn_inputs
from blockffn.sparsify.receipt import Stage, compare


@dataclass(frozen=True)
class Regrouping:
    """What a dense model shall become.

    Attributes:
        num_experts: experts a layer; must divide the width of the dense FFN.
        gated: experts keep their gates, so that all of them together compute what the dense FFN does. Without, they are
            the paper's, and the down-projections are refitted.
        tls: token-level sparsity to start with, in percent.
    """

    num_experts: int
    gated: bool = True
    tls: float = 50.0

    def check(self, config: BlockFFNConfig) -> None:
        """Raises `ValueError` if a model of `config` cannot become this."""
        if not 0 < self.tls < 100:
            raise ValueError(f"the sparsity is a percentage between 0 and 100, got {self.tls}")
        width = config.intermediate_size
        if self.num_experts < 2 or width % self.num_experts:
            divisors = [n for n in range(2, width + 1) if width % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.num_experts))[:4])
            raise ValueError(
                f"an FFN of {width} neurons cannot be split into {self.num_experts} equal experts; "
                f"near are {', '.join(map(str, near))}"
            )


class EveryExpert(nn.Module):
    """A router that gives every expert the weight 1: experts as they are before one is fitted."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Routing:
        ones = x.new_ones(*x.shape[:-1], self.num_experts, dtype=torch.float32)
        return Routing(logits=ones, shares=ones / self.num_experts, weights=ones)


def regroup(
    dense: BlockFFNForCausalLM,
    wanted: Regrouping,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    on_layer: Callable[[int], object] = lambda layer: None,
) -> tuple[BlockFFNForCausalLM, list[Stage]]:
    """A model with experts made from `dense`, on the same device, and the receipt's stages `regrouped` and `routed`.

    Routers see in every layer what the dense model's FFN sees there.

    Args:
        calibration: token ids `[1, T]` of passages that neurons are grouped and routers are fitted on.
        held_out: other passages, for the receipt.
        on_layer: called with a layer's number when it is done.

    Raises:
        ValueError: `wanted` does not fit the model.
    """
    wanted.check(dense.config)
    model = _with_experts(dense, wanted)
    layers: list[tuple[Neurons, Tensor]] = []
    for number, x_TD in enumerate(ffn_inputs(dense, calibration)):
        x_TD = x_TD.to(dense.device)
        original = _neurons(dense.model.layers[number].mlp)
        order = order_by_expert(original, x_TD, wanted.num_experts)
        neurons = original.reordered(order)
        ffn = model.model.layers[number].mlp
        _fill(ffn, neurons if wanted.gated else without_gates(neurons, x_TD))
        layers.append((neurons, x_TD.cpu()))
        on_layer(number)
    routers = [layer.mlp.router for layer in model.model.layers]
    for layer in model.model.layers:
        layer.mlp.router = EveryExpert(wanted.num_experts)
    stages = [compare("regrouped", dense, model, held_out)]
    for layer, router, (neurons, x_TD) in zip(model.model.layers, routers, layers):
        layer.mlp.router = router
        _route(layer.mlp, neurons, x_TD.to(dense.device), wanted, eps=dense.config.rms_norm_eps)
    return model, [*stages, compare("routed", dense, model, held_out)]


def _route(ffn: BlockFFN, neurons: Neurons, x_TD: Tensor, wanted: Regrouping, *, eps: float) -> None:
    """Fit the router, then the down-projections to what it lets through; the dense FFN's output is the target."""
    target_TD = neurons.activations(x_TD) @ neurons.down_ND
    experts, router_module = ffn.routed_experts, cast(ReLURMSNormRouter, ffn.router)
    up_ND = neurons.up_ND if wanted.gated else None
    found = Neurons(neurons.gate_ND, up_ND, experts.down_proj.detach().flatten(0, 1))
    router = fit_router(found, x_TD, wanted.num_experts, tls=wanted.tls, eps=eps)
    weights_TE = routed(x_TD, router.proj_ED, eps) * router.scale_E
    with torch.no_grad():
        router_module.proj.weight.copy_(router.proj_ED)
        router_module.norm.weight.copy_(router.scale_E)
        experts.down_proj.copy_(refit_down(found, x_TD, weights_TE, target_TD).view_as(experts.down_proj))


def _with_experts(dense: BlockFFNForCausalLM, wanted: Regrouping) -> BlockFFNForCausalLM:
    """A model with experts that shares nothing with `dense` but has its weights everywhere outside the FFNs."""
    config = BlockFFNConfig(
        **{
            **dense.config.to_dict(),
            "ffn_type": "moe",
            "router_type": "relu_rmsnorm",
            "num_experts": wanted.num_experts,
            "num_experts_per_tok": max(1, round(wanted.num_experts * (1 - wanted.tls / 100))),
            "moe_intermediate_size": dense.config.intermediate_size // wanted.num_experts,
            "expert_gated": wanted.gated,
        }
    )
    model = BlockFFNForCausalLM(config).eval()
    state = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(state, strict=False)
    return model.to(dense.device)


def _neurons(ffn: GatedFFN) -> Neurons:
    return Neurons(ffn.gate_proj.weight.detach(), ffn.up_proj.weight.detach(), ffn.down_proj.weight.detach().T)


@torch.no_grad()
def _fill(ffn: BlockFFN, neurons: Neurons) -> None:
    """Our gated experts are `silu(gate x) * (up x)`, the others `silu(up x)`."""
    experts = ffn.routed_experts
    if neurons.up_ND is None or experts.gate_proj is None:
        experts.up_proj.copy_(neurons.gate_ND.view_as(experts.up_proj))
    else:
        experts.gate_proj.copy_(neurons.gate_ND.view_as(experts.gate_proj))
        experts.up_proj.copy_(neurons.up_ND.view_as(experts.up_proj))
    experts.down_proj.copy_(neurons.down_ND.reshape(experts.down_proj.shape))
