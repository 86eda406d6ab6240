"""What a `SparsityMeter` found, as plain numbers: percentages that are NaN where nothing was counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sparsity:
    """Sparsity of some tokens, in percent.

    Attributes:
        tls: token-level sparsity.
        cls: chunk-level sparsity by window; windows that never fitted are absent.
        reuse_ratio: share of a token's experts that the next token uses too.
        tokens: number of tokens counted.
    """

    tls: float
    cls: dict[int, float]
    reuse_ratio: float
    tokens: int

    def scalars(self) -> dict[str, float]:
        """`{"tls": ..., "cls8": ..., "reuse_ratio": ...}`: the names that logs and coefficients use."""
        return {"tls": self.tls, **{f"cls{w}": v for w, v in self.cls.items()}, "reuse_ratio": self.reuse_ratio}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN becomes null, windows become strings."""
        return {
            "tls": _number(self.tls),
            "cls": {str(window): _number(value) for window, value in self.cls.items()},
            "reuse_ratio": _number(self.reuse_ratio),
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class LayerSparsity(Sparsity):
    """Sparsity of one layer. `expert_use[i]` is the percentage of tokens that use expert i."""

    expert_use: tuple[float, ...]

    @property
    def dead_experts(self) -> int:
        """Number of experts that no token used."""
        return sum(use == 0 for use in self.expert_use)

    def to_dict(self) -> dict[str, Any]:
        use = [_number(value) for value in self.expert_use]
        return {**super().to_dict(), "dead_experts": self.dead_experts, "expert_use": use}


@dataclass(frozen=True)
class SparsityReport(Sparsity):
    """Sparsity of a whole model, pooled over layers, then by layer and by source of the text."""

    layers: tuple[LayerSparsity, ...]
    sources: dict[str, Sparsity]

    @property
    def expert_use(self) -> tuple[tuple[float, ...], ...]:
        """`[layer][expert]`: percentage of tokens that use the expert."""
        return tuple(layer.expert_use for layer in self.layers)

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Number of experts that no token used, by layer."""
        return tuple(layer.dead_experts for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "sources": {label: source.to_dict() for label, source in self.sources.items()},
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
