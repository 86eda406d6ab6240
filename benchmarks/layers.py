"""What the benchmarks of the sparse FFN share on every device: shapes, random routing, errors, and a row of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from blockffn.ops.sparse_ffn import sparse_ffn
from blockffn.reporting.chart import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, styled

COLORS = {"bf16": BLUE, "int8": ORANGE, "int4": GREEN, "f32": MUTED}  # of weights in the plot


@dataclass(frozen=True)
class Shape:
    """One FFN layer: `num_experts` experts of `width` on tokens of `hidden_size`, of two matrices (`gated`: three)."""

    hidden_size: int
    num_experts: int
    width: int
    gated: bool = field(default=False, repr=False)

    @property
    def weights_per_expert(self) -> int:
        return (3 if self.gated else 2) * self.hidden_size * self.width


SHAPES = {
    "0.1B": Shape(768, 48, 64),
    "0.8B": Shape(1536, 48, 128),
    "1.2B": Shape(1792, 56, 128),
    "2.5B": Shape(2560, 64, 128),
    "2048x64": Shape(2048, 64, 128),
    "2.8B": Shape(2048, 128, 128),
}


@dataclass(frozen=True)
class Chunk:
    """Tokens of one call, the share of experts that each activates, and the share that they activate together."""

    num_tokens: int
    share: float
    union_share: float

    def counts(self, shape: Shape) -> tuple[int, int]:
        """Active experts of a token, and of the chunk."""
        num_active = max(1, round(self.share * shape.num_experts))
        num_union = max(num_active, round(self.union_share * shape.num_experts))
        return num_active, min(num_union, self.num_tokens * num_active)


@dataclass(frozen=True)
class Row:
    """One method at one shape and chunk; `percent_of_floor` as the script's docstring says."""

    shape: str
    num_tokens: int
    share: float
    union_share: float
    method: str
    error: float
    microseconds: float
    best_microseconds: float
    bytes_read: int
    gigabytes_per_second: float
    percent_of_floor: float
    bandwidth: float
    times_dense: float | None = None
    times_dense_f32: float | None = None


def random_experts(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`(up, down)`, `[E, F, D]` each, scaled so that values keep their size."""
    size = (shape.num_experts, shape.width, shape.hidden_size)
    up, down = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    return up.mul_(shape.hidden_size**-0.5), down.mul_(shape.width**-0.5)


def routing_weights(chunk: Chunk, shape: Shape, experts: Tensor | None = None) -> Tensor:
    """`[T, E]` weights of a chunk whose union is exactly the first of `experts` (default: a random order)."""
    num_active, num_union = chunk.counts(shape)
    union = (torch.randperm(shape.num_experts) if experts is None else experts)[:num_union]
    weights = torch.zeros(chunk.num_tokens, shape.num_experts)
    for token in range(chunk.num_tokens):
        # Rotating through a random order covers the whole union as evenly as tokens allow.
        own = union[(torch.arange(num_active) + token * num_active) % num_union]
        weights[token, own] = torch.rand(num_active) + 0.5
    return weights


def index_select(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, union: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """What one writes in torch: gather the union of active experts, then two dense products over it.

    On a GPU the union is given, since finding it would make the host wait.
    """
    union = weights.any(dim=0).nonzero().squeeze(-1) if union is None else union
    up, down, gate = (None if matrix is None else matrix.index_select(0, union) for matrix in (up, down, gate))
    weights = weights.index_select(1, union).to(x.dtype)
    return sparse_ffn(x, up, down, weights, gate_proj_EFD=gate, backend="dense")


def relative_error(y: Tensor, expected: Tensor) -> float:
    """`|y - expected| / |expected|` in the Frobenius norm."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def print_rows(rows: list[Row], describe: Callable[[Row], str]) -> None:
    """One table for one shape and chunk."""
    if not rows:
        return
    first = rows[0]
    print(
        f"\n{first.shape} ({SHAPES[first.shape]}), {first.num_tokens} tokens, {first.share:.1%} of experts each, "
        f"union {first.union_share:.1%}{describe(first)}"
    )
    heading = f"{'method':<24}{'us':>9}{'best':>9}{'MB':>8}{'GB/s':>8}{'% floor':>9}{'x dense':>9}{'x f32':>8}"
    print(f"{heading}{'error':>10}")
    for r in rows:
        ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in (r.times_dense, r.times_dense_f32)]
        print(
            f"{r.method:<24}{r.microseconds:>9.1f}{r.best_microseconds:>9.1f}{r.bytes_read / 1e6:>8.2f}"
            f"{r.gigabytes_per_second:>8.1f}{r.percent_of_floor:>8.0f}%{ratios[0]:>9}{ratios[1]:>8}{r.error:>10.1e}",
            flush=True,
        )


@styled
def roofline(rows: list[dict[str, Any]]) -> Figure:
    """Bytes of weights that a method reads against its time; the line is the bandwidth of memory.

    A marker is a kernel, a colour the format of its weights.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    bandwidths = sorted(row["bandwidth"] for row in rows)
    bandwidth = bandwidths[len(bandwidths) // 2]
    sizes = [row["bytes_read"] / 1e6 for row in rows]
    span = [min(sizes) * 0.8, max(sizes) * 1.25]
    axes.plot(span, [size * 1e12 / bandwidth for size in span], color=INK, lw=1)
    label = f"memory: {bandwidth / 1e9:,.0f} GB/s"
    axes.annotate(label, (span[0], span[0] * 1e12 / bandwidth), (12, 0), textcoords="offset points", va="top")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kernels = list(dict.fromkeys(map(_kernel, methods)))
    for name in methods:
        own = [row for row in rows if row["method"] == name]
        x, y = [row["bytes_read"] / 1e6 for row in own], [row["microseconds"] for row in own]
        marker = "osD^vP*X"[kernels.index(_kernel(name)) % 8]
        axes.plot(x, y, marker, color=_color(name), alpha=0.8, label=name, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="weights read, MB", ylabel="time of a layer, µs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    shapes, counts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "num_tokens"))
    tokens = f"{', '.join(map(str, counts))} token{'s' if counts != [1] else ''} at once"
    axes.set_title(f"Time of a sparse FFN layer: {', '.join(shapes)} shape{'s' * (len(shapes) > 1)}, {tokens}")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _kernel(method: str) -> str:
    return " ".join(word for word in method.split() if word not in COLORS)


def _color(method: str) -> str:
    return next((COLORS[word] for word in method.split() if word in COLORS), PURPLE)
