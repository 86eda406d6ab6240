"""Small random layers for the tests of the ops, and how far a result may be from the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative error in the Frobenius norm. int8 and int4 kernels round activations to eight bits for each group of inputs.
TOLERANCE = {"f32": 1e-5, "bf16": 5e-3, "int8": 2e-2, "int4": 2e-2}


@dataclass(frozen=True)
class Layer:
    """Tokens, experts and routing weights of one sparse FFN, float32."""

    x_TD: Tensor
    up_proj_EFD: Tensor
    down_proj_EFD: Tensor
    gate_proj_EFD: Tensor
    weights_TE: Tensor

    @classmethod
    def random(cls, T: int, E: int, F: int, D: int, *, active_share: float = 0.3, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        weights = normal(T, E) * (torch.rand(T, E, generator=generator) < active_share)
        return cls(normal(T, D), normal(E, F, D) / D**0.5, normal(E, F, D) / F**0.5, normal(E, F, D) / D**0.5, weights)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm; NaN fails."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"
