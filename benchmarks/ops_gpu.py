"""Time the sparse FFN on a GPU: every method against the dense product and against the memory bandwidth of the device.

    python benchmarks/ops_gpu.py --json benchmarks/results/ops_h200.json

Each method is first checked against the float32 reference on the inputs that are then timed; a method that fails is not
timed. A timing is a CUDA graph over many layers, each with its own weights and routing, together several times larger
than the L2 cache: weights are always cold, launches are free of Python. Columns:

    us       median time of a layer
    GB/s     bytes of the weights that the method must read (active experts, or all for a dense product) over time
    % floor  time to move the bytes of the active experts at the bandwidth of a large copy on this device, over the time
             taken: the same floor for every method
    x dense  time of torch's dense bf16 product over the time taken

The second table times many tokens, forward alone and with backward, called from Python: where grouped products over the
active pairs beat the dense product.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from torch import Tensor

from blockffn.ops.sparse_ffn import sparse_ffn

GRAPH_BYTES = 256 << 20  # of active experts in one graph: four times the largest L2 cache
DTYPE = torch.bfloat16
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Shape:
    """One FFN layer: `num_experts` experts of `width` on tokens of `hidden_size`."""

    hidden_size: int
    num_experts: int
    width: int

    @property
    def bytes_per_expert(self) -> int:
        return 2 * self.hidden_size * self.width * DTYPE.itemsize


SHAPES = {
    "0.1B": Shape(768, 48, 64),
    "0.8B": Shape(1536, 48, 128),
    "2048x64": Shape(2048, 64, 128),
    "2.8B": Shape(2048, 128, 128),
}
# (tokens, share of experts a token activates, share the chunk activates); the last rows look for the crossing.
CHUNKS = [
    (1, 0.125, 0.125), (1, 0.15, 0.15), (1, 1.0, 1.0), (2, 0.125, 0.2), (4, 0.125, 0.25), (8, 0.125, 0.31),
    (16, 0.125, 0.31), (32, 0.125, 0.31), (64, 0.125, 0.45), (8, 0.125, 0.6), (8, 0.5, 1.0), (16, 0.125, 0.6),
    (16, 0.5, 1.0), (32, 0.125, 0.6), (32, 0.5, 1.0), (64, 0.5, 1.0),
]  # fmt: skip
PREFILL = [(256, 0.125), (1024, 0.125), (4096, 0.125), (4096, 0.25), (4096, 0.5), (16384, 0.125), (16384, 0.25)]


@dataclass(frozen=True)
class Layer:
    x: Tensor
    up: Tensor
    down: Tensor
    weights: Tensor
    union: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.up, self.down, self.weights


def index_select(layer: Layer) -> Tensor:
    """What one writes in torch: gather the union of active experts, then two dense products over it.

    The union is given: finding it in torch would make the host wait.
    """
    up, down = (projection.index_select(0, layer.union) for projection in (layer.up, layer.down))
    return sparse_ffn(layer.x, up, down, layer.weights.index_select(1, layer.union), backend="dense")


BASELINE = "torch dense"
METHODS: dict[str, Callable[[Layer], Tensor]] = {
    "triton": lambda layer: sparse_ffn(*layer.inputs(), backend="triton"),
    "torch index_select": index_select,
    BASELINE: lambda layer: sparse_ffn(*layer.inputs(), backend="dense"),
}


@dataclass(frozen=True)
class ChunkResult:
    shape: str
    num_tokens: int
    share: float
    union_share: float
    method: str
    error: float
    microseconds: float
    bytes_read: int
    gigabytes_per_second: float
    percent_of_floor: float
    times_dense: float


@dataclass(frozen=True)
class PrefillResult:
    shape: str
    num_tokens: int
    share: float
    backward: bool
    triton_microseconds: float
    dense_microseconds: float
    times_dense: float
    error: float


def routing_weights(num_tokens: int, num_experts: int, num_active: int, num_union: int) -> Tensor:
    """`[T, E]` routing weights: each token activates `num_active` experts; together they activate `num_union`."""
    union = torch.randperm(num_experts)[:num_union]
    weights = torch.zeros(num_tokens, num_experts)
    for token in range(num_tokens):
        own = union[(torch.arange(num_active) + token * num_active) % num_union]
        weights[token, own] = torch.rand(num_active) + 0.5
    return weights


def random_experts(shape: Shape) -> tuple[Tensor, Tensor]:
    size = (shape.num_experts, shape.width, shape.hidden_size)
    up, down = (torch.randn(size, device="cuda", dtype=DTYPE) for _ in range(2))
    return up.mul_(shape.hidden_size**-0.5), down.mul_(shape.width**-0.5)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of one gigabyte."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_time(lambda: target.copy_(source)) * 1e-6)


def median_time(run: Callable[[], object], rounds: int = 10, repeats: int = 1) -> float:
    """Median microseconds of a call, between device events."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return statistics.median(times)


def graph_time(method: Callable[[Layer], Tensor], layers: list[Layer]) -> float:
    """Microseconds a layer, of a CUDA graph over all of them."""
    with torch.cuda.stream(torch.cuda.Stream()):
        method(layers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            method(layer)
    return median_time(graph.replay, repeats=5) / len(layers)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def time_chunk(
    name: str, experts: list[tuple[Tensor, Tensor]], chunk: tuple[int, float, float], bandwidth: float
) -> list[ChunkResult]:
    shape, (T, share, union_share) = SHAPES[name], chunk
    num_active = max(1, round(share * shape.num_experts))
    num_union = min(T * num_active, max(num_active, round(union_share * shape.num_experts)))
    layers = []
    for up, down in experts[: max(16, math.ceil(GRAPH_BYTES / (num_union * shape.bytes_per_expert)))]:
        weights = routing_weights(T, shape.num_experts, num_active, num_union).to("cuda", DTYPE)
        x = torch.randn(T, shape.hidden_size, device="cuda", dtype=DTYPE)
        layers.append(Layer(x, up, down, weights, weights.any(dim=0).nonzero().squeeze(-1)))
    wide = [tensor.float() for tensor in layers[0].inputs()]
    expected = sparse_ffn(*wide, backend="reference")
    errors = {key: relative_error(method(layers[0]), expected) for key, method in METHODS.items()}
    times = {key: graph_time(method, layers) for key, method in METHODS.items() if errors[key] <= 4 * TOLERANCE}
    size = num_union * shape.bytes_per_expert
    results = []
    for key, time in times.items():
        read = shape.num_experts * shape.bytes_per_expert if key == BASELINE else size
        results.append(
            ChunkResult(
                name, T, num_active / shape.num_experts, num_union / shape.num_experts, key, errors[key],
                time, read, read / time / 1e3, size / bandwidth / time * 1e8, times[BASELINE] / time,
            )
        )  # fmt: skip
    return results


def time_prefill(name: str, num_tokens: int, share: float) -> list[PrefillResult]:
    shape = SHAPES[name]
    up, down = random_experts(shape)
    x, dy = (torch.randn(num_tokens, shape.hidden_size, device="cuda", dtype=DTYPE) for _ in range(2))
    weights = torch.rand(num_tokens, shape.num_experts, device="cuda") + 0.5
    weights = (weights * (torch.rand_like(weights) < share)).to(DTYPE)
    inputs = [tensor.requires_grad_() for tensor in (x, up, down, weights)]

    def forward(backend: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (sparse_ffn(*inputs, backend=backend),)

    def both(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sparse_ffn(*inputs, backend=backend), inputs, dy)

    results = []
    for backward, run in ((False, forward), (True, both)):
        error = relative_error(run("triton")[0], run("dense")[0])  # of y, or of the gradient of x
        if error > 2 * TOLERANCE:  # either of the two may be off by TOLERANCE
            print(f"{num_tokens} tokens: error {error:.1e}; not timed")
            continue
        ours, dense = (median_time(functools.partial(run, backend)) for backend in ("triton", "dense"))
        results.append(PrefillResult(name, num_tokens, share, backward, ours, dense, dense / ours, error))
    return results


def print_chunk(results: list[ChunkResult]) -> None:
    first = results[0]
    print(
        f"\n{first.shape}, {first.num_tokens} tokens, {first.share:.1%} of experts each, union {first.union_share:.1%}"
    )
    print(f"{'method':<20}{'us':>9}{'MB':>9}{'GB/s':>8}{'% floor':>9}{'x dense':>9}{'error':>10}")
    for r in results:
        print(
            f"{r.method:<20}{r.microseconds:>9.2f}{r.bytes_read / 1e6:>9.2f}{r.gigabytes_per_second:>8.0f}"
            f"{r.percent_of_floor:>8.1f}%{r.times_dense:>9.2f}{r.error:>10.1e}"
        )


def print_prefill(results: list[PrefillResult]) -> None:
    print(
        f"\n{'shape':<10}{'tokens':>8}{'active':>8}{'':>20}{'triton us':>11}{'dense us':>10}{'x dense':>9}{'error':>10}"
    )
    for r in results:
        what = "forward + backward" if r.backward else "forward"
        print(
            f"{r.shape:<10}{r.num_tokens:>8}{r.share:>8.1%}{what:>20}{r.triton_microseconds:>11.0f}"
            f"{r.dense_microseconds:>10.0f}{r.times_dense:>9.2f}{r.error:>10.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--prefill-shape", default="2048x64", choices=SHAPES)
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    chunks: list[ChunkResult] = []
    for name in arguments.shapes:
        smallest = SHAPES[name].num_experts * SHAPES[name].bytes_per_expert * min(share for _, share, _ in CHUNKS)
        experts = [random_experts(SHAPES[name]) for _ in range(max(16, math.ceil(GRAPH_BYTES / smallest)))]
        with torch.inference_mode():
            for chunk in CHUNKS:
                chunks += time_chunk(name, experts, chunk, bandwidth)
                print_chunk(chunks[-len(METHODS) :])
        del experts
    prefill = [row for case in PREFILL for row in time_prefill(arguments.prefill_shape, *case)]
    print_prefill(prefill)
    if arguments.json:
        machine = {
            "device": torch.cuda.get_device_name(),
            "copy_bandwidth": bandwidth,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine, "chunks": [asdict(r) for r in chunks], "prefill": [asdict(r) for r in prefill]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
