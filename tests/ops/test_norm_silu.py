"""NormSiLU experts against the formula, one token and expert at a time."""

from __future__ import annotations

import pytest
import torch

from blockffn.models.experts import RoutedExperts
from blockffn.models.normalization import RMSNorm
from blockffn.ops.sparse_ffn.norm_silu import norm_silu_ffn

T, D, E, F = 4, 6, 3, 5


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, RMSNorm]:
    torch.manual_seed(0)
    norm = RMSNorm(F, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return torch.randn(T, D), torch.randn(E, F, D), torch.randn(E, F, D), torch.rand(T, E), norm


def test_it_equals_the_formula_of_each_token_and_expert() -> None:
    x, up, down, weights, norm = inputs()
    weights[1, 2] = 0.0
    expected = torch.zeros(T, D)
    for t in range(T):
        u = torch.stack([up[e] @ x[t] for e in range(E)])
        u = u - u.mean()
        for e in range(E):
            z = u[e] / (u[e].square().mean() + 1e-5).sqrt() * norm.weight.detach()
            expected[t] += weights[t, e] * (z / (1 + (-z).exp())) @ down[e]
    actual = norm_silu_ffn(x, up, down, weights, norm=norm)
    torch.testing.assert_close(actual.detach(), expected, atol=1e-4, rtol=1e-4)


def test_the_mean_is_that_of_one_precomputable_vector() -> None:
    x, up, _, _, _ = inputs()
    torch.testing.assert_close((x @ up.reshape(-1, D).T).mean(dim=-1), x @ up.mean(dim=(0, 1)))


def test_another_backend_is_refused_with_the_reason() -> None:
    x, up, down, weights, norm = inputs()
    with pytest.raises(ValueError, match="backend 'triton' cannot compute NormSiLU experts: it has no mean"):
        norm_silu_ffn(x, up, down, weights, norm=norm, backend="triton")


def test_gated_norm_silu_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'norm_silu'"):
        RoutedExperts(D, E, F, gated=True, activation="norm_silu")
