"""One layer on plain tensors: a dense FFN's neurons as experts, and a router fitted to what the experts contribute.

Letters beside those of `blockffn.routing`: `N` neurons of the dense FFN, `N = E · F`. Everything is fitted by least
squares on inputs `x_TD` that the layer saw on calibration text; the dense FFN's output is the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.sparsify.clustering import balanced_clusters

RIDGE = 1e-2  # of the mean squared input: directions that calibration text hardly visits stay near their start
NEAR = (
    1.0  # the same for rows of `down`, which have more to fit than calibration text can say and start from good values
)
PIECE = 512  # tokens at a time where every expert's output is held


@dataclass(frozen=True)
class Neurons:
    """A dense FFN, neuron by neuron: `gate`, `up` and `down`, each `[N, D]`. Without `up`, neurons are not gated."""

    gate_ND: Tensor
    up_ND: Tensor | None
    down_ND: Tensor

    def reordered(self, order_N: Tensor) -> Neurons:
        """The same neurons in another order."""
        return Neurons(
            self.gate_ND[order_N], None if self.up_ND is None else self.up_ND[order_N], self.down_ND[order_N]
        )

    def activations(self, x_TD: Tensor) -> Tensor:
        """What each neuron multiplies its row of `down` by: `[T, N]`."""
        activated = F.silu(x_TD @ self.gate_ND.T)
        return activated if self.up_ND is None else activated * (x_TD @ self.up_ND.T)


@dataclass(frozen=True)
class FittedRouter:
    """`proj [E, D]` and `scale [E]` of a `RMSNorm(ReLU(proj x))` router."""

    proj_ED: Tensor
    scale_E: Tensor


def order_by_expert(neurons: Neurons, x_TD: Tensor, num_experts: int) -> Tensor:
    """Order `[N]` in which neurons of an expert are neighbours: those that contribute to the same tokens.

    A neuron's feature is the size of its contribution on each calibration token, less its mean.
    """
    sizes_TN = neurons.activations(x_TD).abs()
    clusters = balanced_clusters((sizes_TN - sizes_TN.mean(dim=0)).T, num_experts)
    return clusters.argsort(stable=True)


def without_gates(neurons: Neurons, x_TD: Tensor) -> Neurons:
    """Neurons `silu(gate x)` whose rows of `down` are refitted to the output of the gated ones."""
    plain = Neurons(neurons.gate_ND, None, neurons.down_ND)
    target_TD = neurons.activations(x_TD) @ neurons.down_ND
    down_ND = ridge(plain.activations(x_TD), target_TD)
    return Neurons(plain.gate_ND, None, down_ND)


def fit_router(neurons: Neurons, x_TD: Tensor, num_experts: int, *, tls: float, eps: float) -> FittedRouter:
    """A router for neurons in the order of their experts, under which `tls` percent of the experts are inactive.

    Its logits are the best linear prediction of whether an expert's output is among the token's largest, less a
    threshold. The projection has no bias; the threshold is a multiple of the best linear prediction of 1, which inputs
    after a norm allow. The scales bring the weighted sum of the active experts closest to the dense output.

    Args:
        tls: token-level sparsity on `x`, in percent.
        eps: epsilon of the router's norm.
    """
    pieces = x_TD.split(PIECE)
    sizes_TE = torch.cat([expert_outputs(neurons, piece, num_experts).norm(dim=-1) for piece in pieces])
    kept = max(1, round(num_experts * (1 - tls / 100)))
    largest_TE = torch.zeros_like(sizes_TE).scatter(1, sizes_TE.topk(kept, dim=1).indices, 1.0)
    targets = torch.cat((largest_TE, torch.ones_like(largest_TE[:, :1])), dim=1)
    solution = ridge(x_TD, targets)  # [D, E + 1]
    predicted = x_TD @ solution
    one_T1 = predicted[:, -1:].clamp_min(1e-3)
    threshold = _quantile(predicted[:, :-1] / one_T1, tls / 100)
    proj_ED = (solution[:, :-1] - threshold * solution[:, -1:]).T
    activated = F.relu(x_TD @ proj_ED.T)
    proj_ED = proj_ED / activated.square().mean().sqrt().clamp_min(1e-12)
    return FittedRouter(proj_ED, fit_scale(neurons, x_TD, routed(x_TD, proj_ED, eps)))


def routed(x_TD: Tensor, proj_ED: Tensor, eps: float) -> Tensor:
    """Routing weights `[T, E]` before the norm's scale."""
    activated = F.relu(x_TD @ proj_ED.T)
    return activated * torch.rsqrt(activated.square().mean(dim=-1, keepdim=True) + eps)


def fit_scale(neurons: Neurons, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """Factors `[E]` that bring the routed experts closest to all of them; near one common factor where in doubt."""
    experts = weights_TE.shape[1]
    gram, moment = x_TD.new_zeros(experts, experts), x_TD.new_zeros(experts)
    for piece, weights in zip(x_TD.split(PIECE), weights_TE.split(PIECE)):
        parts = expert_outputs(neurons, piece, experts)
        weighted = parts * weights.unsqueeze(-1)
        gram += torch.einsum("ted,tfd->ef", weighted, weighted)
        moment += torch.einsum("ted,td->e", weighted, parts.sum(dim=1))
    common = moment.sum() / gram.sum().clamp_min(1e-12)
    strength = 0.1 * gram.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(experts, device=gram.device)
    return torch.linalg.solve(gram + strength * eye, moment + strength * common)


def refit_down(neurons: Neurons, x_TD: Tensor, weights_TE: Tensor, target_TD: Tensor) -> Tensor:
    """Rows of `down [N, D]` near the present ones with which the routed experts come closest to `target`."""
    experts = weights_TE.shape[1]
    activations = neurons.activations(x_TD).unflatten(-1, (experts, -1)) * weights_TE.unsqueeze(-1)
    return ridge(activations.flatten(1), target_TD, near=neurons.down_ND, strength=NEAR)


def expert_outputs(neurons: Neurons, x_TD: Tensor, num_experts: int) -> Tensor:
    """Output of each expert, `[T, E, D]`."""
    activations = neurons.activations(x_TD).unflatten(-1, (num_experts, -1))
    return torch.einsum("tef,efd->ted", activations, neurons.down_ND.unflatten(0, (num_experts, -1)))


def ridge(inputs_TK: Tensor, targets_TM: Tensor, *, near: Tensor | None = None, strength: float = RIDGE) -> Tensor:
    """`[K, M]` that takes `inputs` closest to `targets`, pulled towards `near` (default 0)."""
    inputs, targets = inputs_TK.double(), targets_TM.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
    start = torch.zeros_like(inputs.T @ targets) if near is None else near.double()
    return (start + torch.linalg.solve(gram, inputs.T @ (targets - inputs @ start))).to(inputs_TK.dtype)


def _quantile(values: Tensor, share: float) -> Tensor:
    """`torch.quantile` without its limit on the number of values."""
    ordered = values.flatten().sort().values
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
