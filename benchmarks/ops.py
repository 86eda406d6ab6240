"""Time the sparse FFN: every method against the dense product and against the memory bandwidth of the machine.

    python benchmarks/ops.py --shapes 1.2B 2.5B --tokens 1 8 32 --json benchmarks/results/ops.json --plot ops.png

Each method is first checked against the float32 reference on the inputs that are then timed; a method that fails is not
timed. Methods take turns in one process. Before and after each timing all threads read a large buffer: this gives the
bandwidth that holds at that moment, and empties the caches. Every call of a timing reads experts that no other call of
that timing has read, so weights are always cold. Columns:

    us       median time of a layer, called from Python
    GB/s     bytes of the weights that the method must read (active experts, or all for a dense product) over time
    % floor  time to read these bytes at the bandwidth measured beside it, over the time taken
    x dense  time of torch's dense bf16 product over the time taken
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockffn.ops import native
from blockffn.ops.quantization import PackedExperts, pack_experts
from blockffn.ops.sparse_ffn import sparse_ffn, sparse_ffn_packed
from blockffn.ops.sparse_ffn.cpu import PackedStep

POOL_BYTES = 640 << 20  # of distinct weights of a method: more than twice any cache
FLUSH_BYTES = 512 << 20  # read before and after each timing


@dataclass(frozen=True)
class Shape:
    """One FFN layer: `num_experts` experts of `width` on tokens of `hidden_size`."""

    hidden_size: int
    num_experts: int
    width: int

    @property
    def weights_per_expert(self) -> int:
        return 2 * self.hidden_size * self.width


SHAPES = {
    "0.1B": Shape(768, 48, 64),
    "0.8B": Shape(1536, 48, 128),
    "1.2B": Shape(1792, 56, 128),
    "2.5B": Shape(2560, 64, 128),
    "2.8B": Shape(2048, 128, 128),
}
UNION_SHARES = {1: 0.15, 8: 0.30, 32: 0.35}  # of experts that a chunk of this many tokens activates


@dataclass(frozen=True)
class Method:
    """A way to compute the layer.

    Attributes:
        storage: name of the storage format; methods with the same one share their layers.
        build: weights `(up [E, F, D], down [E, F, D])` to the layer in this method's storage.
        copy: the same layer in fresh memory.
        bind: `(x, layer, weights)` to a function without arguments that computes y; only that function is timed.
        bits: of a stored weight. sparse: whether only active experts are read.
        tolerance: of the relative error against the float32 reference on the weights as stored.
    """

    storage: str
    build: Callable[[Tensor, Tensor], Any]
    copy: Callable[[Any], Any]
    bind: Callable[[Tensor, Any, Tensor], Callable[[], Tensor]]
    dtype: torch.dtype
    bits: float
    sparse: bool
    tolerance: float


def copy_packed(layer: PackedExperts) -> PackedExperts:
    return replace(layer, data=native.empty_huge(layer.data.numel()).view(layer.data.shape).copy_(layer.data))


def call_op(x: Tensor, layer: PackedExperts, weights: Tensor) -> Callable[[], Tensor]:
    return lambda: sparse_ffn_packed(x, layer, weights, backend="cpu")


def call_step(x: Tensor, layer: PackedExperts, weights: Tensor) -> Callable[[], Tensor]:
    """The native call alone, on buffers that are filled beforehand: what a decode loop does."""
    step = PackedStep(layer, x.shape[0], dtype=x.dtype)
    step.x.copy_(x)
    step.weights.copy_(weights)

    def run() -> Tensor:
        step()
        return step.y

    return run


def packed(
    format: str, bits: float, tolerance: float, bind: Callable[..., Callable[[], Tensor]] = call_op,
    dtype: torch.dtype = torch.bfloat16,
) -> Method:  # fmt: skip
    return Method(
        storage=format,
        build=lambda up, down: pack_experts(up, down, format=format),
        copy=copy_packed,
        bind=bind,
        dtype=dtype,
        bits=bits,
        sparse=True,
        tolerance=tolerance,
    )  # fmt: skip


def plain(run: Callable[[Tensor, tuple[Tensor, Tensor], Tensor], Tensor], dtype: torch.dtype, sparse: bool) -> Method:
    return Method(
        storage="plain",
        build=lambda up, down: (up.to(dtype), down.to(dtype)),
        copy=lambda layer: tuple(t.clone() for t in layer),
        bind=lambda x, layer, weights: lambda: run(x, layer, weights),
        dtype=dtype,
        bits=32 if dtype == torch.float32 else 16,
        sparse=sparse,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
    )


def index_select(x: Tensor, layer: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """What one writes in torch: gather the union of active experts, then two dense products over it."""
    union = weights.any(dim=0).nonzero().squeeze(-1)
    up, down = (projection.index_select(0, union).flatten(0, 1) for projection in layer)
    hidden = F.silu(x @ up.T).view(x.shape[0], len(union), -1) * weights[:, union, None].to(x.dtype)
    return hidden.flatten(1) @ down


METHODS: dict[str, Method] = {
    "cpu bf16 step": packed("bf16", 16, 5e-3, call_step),
    "cpu int8 step": packed("int8", 8.25, 2e-2, call_step),
    "cpu int4 step": packed("int4", 4.25, 2e-2, call_step),
    "cpu bf16 packed": packed("bf16", 16, 5e-3),
    "cpu int8 packed": packed("int8", 8.25, 2e-2),
    "cpu int4 packed": packed("int4", 4.25, 2e-2),
    "cpu f32 packed": packed("f32", 32, 1e-5, dtype=torch.float32),
    "cpu bf16 plain": plain(lambda x, w, s: sparse_ffn(x, *w, s, backend="cpu"), torch.bfloat16, True),
    "cpu f32 plain": plain(lambda x, w, s: sparse_ffn(x, *w, s, backend="cpu"), torch.float32, True),
    "auto bf16": plain(lambda x, w, s: sparse_ffn(x, *w, s), torch.bfloat16, True),
    "torch index_select bf16": plain(index_select, torch.bfloat16, True),
    "torch dense bf16": plain(lambda x, w, s: sparse_ffn(x, *w, s.to(x.dtype), backend="dense"), torch.bfloat16, False),
    "torch dense f32": plain(lambda x, w, s: sparse_ffn(x, *w, s, backend="dense"), torch.float32, False),
}
BASELINE = "torch dense bf16"


def routing_weights(num_tokens: int, shape: Shape, share: float, union_share: float, experts: Tensor) -> Tensor:
    """`[T, E]` routing weights: each token activates `share` of all experts, all within the first of `experts`.

    The union holds `union_share` of all experts exactly, provided that the tokens can fill it.
    """
    num_active = max(1, round(share * shape.num_experts))
    num_union = max(num_active, round(union_share * shape.num_experts))
    union = experts[:num_union]
    weights = torch.zeros(num_tokens, shape.num_experts)
    for token in range(num_tokens):
        # Rotating through a random order covers the whole union as evenly as tokens allow.
        own = union[(torch.arange(num_active) + token * num_active) % num_union]
        weights[token, own] = torch.rand(num_active) + 0.5
    return weights


def fresh_experts(shape: Shape, union_share: float, num_layers: int) -> Iterator[tuple[int, Tensor]]:
    """`(layer, experts)` such that the first `union_share` of the experts are new each time, until all were used."""
    size = max(1, round(union_share * shape.num_experts))
    orders = [torch.randperm(shape.num_experts) for _ in range(num_layers)]
    for start in range(0, shape.num_experts - size + 1, size):
        for layer in range(num_layers):
            yield layer, torch.roll(orders[layer], -start)


def read_bandwidth(buffer: Tensor) -> float:
    """Bytes per second with which all threads read the buffer."""
    start = time.perf_counter()
    native.read_bandwidth(buffer)
    return buffer.numel() / (time.perf_counter() - start)


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def error_of(method: Method, layer: object, x: Tensor, weights: Tensor) -> float:
    """Against the float32 reference on the weights as the method stores them."""
    up, down = layer.unpack()[:2] if isinstance(layer, PackedExperts) else (w.float() for w in layer)  # type: ignore[attr-defined]
    reference = sparse_ffn(x.float(), up, down, weights, backend="reference")
    return relative_error(method.bind(x, layer, weights)(), reference)


@dataclass(frozen=True)
class Result:
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


class Bench:
    """The layers of all methods at one shape, and their timings."""

    def __init__(self, shape_name: str, methods: dict[str, Method], share: float) -> None:
        self.name, self.shape, self.methods, self.share = shape_name, SHAPES[shape_name], methods, share
        self.flush = native.empty_huge(FLUSH_BYTES).fill_(1)
        E, width, D = self.shape.num_experts, self.shape.width, self.shape.hidden_size
        up, down = torch.randn(E, width, D) / D**0.5, torch.randn(E, width, D) / width**0.5
        self.pools: dict[object, list[object]] = {}
        for method in methods.values():
            key = self.pool_key(method)
            if key not in self.pools:
                first = method.build(up, down)
                count = math.ceil(POOL_BYTES / (E * self.shape.weights_per_expert * method.bits / 8))
                self.pools[key] = [first, *(method.copy(first) for _ in range(count - 1))]

    @staticmethod
    def pool_key(method: Method) -> object:
        """Methods with the same storage share their layers."""
        return (method.storage, method.dtype)

    def time_once(self, method: Method, num_tokens: int, union_share: float, seconds: float) -> tuple[float, float]:
        """`(seconds a call, bandwidth beside it)` over calls that read fresh experts."""
        layers = self.pools[self.pool_key(method)]
        x = torch.randn(num_tokens, self.shape.hidden_size).to(method.dtype)
        share = union_share if method.sparse else 1.0
        calls = [
            method.bind(x, layers[index], routing_weights(num_tokens, self.shape, self.share, union_share, experts))
            for index, experts in fresh_experts(self.shape, share, len(layers))
        ][:256]
        before = read_bandwidth(self.flush)
        start = time.perf_counter()
        for done, call in enumerate(calls, 1):
            call()
            if time.perf_counter() - start > seconds and done >= 3:
                break
        elapsed = time.perf_counter() - start
        return elapsed / done, (before + read_bandwidth(self.flush)) / 2

    def run(self, num_tokens: int, union_share: float, rounds: int, seconds: float) -> list[Result]:
        E = self.shape.num_experts
        x = torch.randn(num_tokens, self.shape.hidden_size)
        weights = routing_weights(num_tokens, self.shape, self.share, union_share, torch.randperm(E))
        num_union = int(weights.any(dim=0).sum())
        errors = {
            name: error_of(method, self.pools[self.pool_key(method)][0], x.to(method.dtype), weights)
            for name, method in self.methods.items()
        }
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in self.methods}
        for _ in range(rounds):
            for name, method in self.methods.items():
                if errors[name] <= method.tolerance:
                    timings[name].append(self.time_once(method, num_tokens, union_share, seconds))
        results = []
        for name, method in self.methods.items():
            if not timings[name]:
                print(f"{name}: error {errors[name]:.1e} exceeds {method.tolerance:.0e}; not timed")
                continue
            num_experts = num_union if method.sparse else E
            size = round(num_experts * self.shape.weights_per_expert * method.bits / 8)
            results.append(
                Result(
                    shape=self.name, num_tokens=num_tokens, share=self.share, union_share=num_union / E, method=name,
                    error=errors[name], microseconds=statistics.median(t for t, _ in timings[name]) * 1e6,
                    best_microseconds=min(t for t, _ in timings[name]) * 1e6, bytes_read=size,
                    gigabytes_per_second=statistics.median(size / t for t, _ in timings[name]) / 1e9,
                    percent_of_floor=statistics.median(size / t / b for t, b in timings[name]) * 100,
                    bandwidth=statistics.median(b for _, b in timings[name]),
                )
            )  # fmt: skip
        dense = next((r.microseconds for r in results if r.method == BASELINE), None)
        return [replace(r, times_dense=dense / r.microseconds if dense else None) for r in results]


def print_table(results: list[Result]) -> None:
    first = results[0]
    bandwidth = statistics.median(r.bandwidth for r in results) / 1e9
    print(
        f"\n{first.shape} ({SHAPES[first.shape]}), {first.num_tokens} tokens, {first.share:.0%} of experts a token, "
        f"union {first.union_share:.0%}, read bandwidth {bandwidth:.1f} GB/s"
    )
    print(f"{'method':<24}{'us':>9}{'best':>9}{'MB':>8}{'GB/s':>8}{'% floor':>9}{'x dense':>9}{'error':>10}")
    for r in results:
        times = f"{r.times_dense:.2f}" if r.times_dense else "-"
        print(
            f"{r.method:<24}{r.microseconds:>9.1f}{r.best_microseconds:>9.1f}{r.bytes_read / 1e6:>8.2f}"
            f"{r.gigabytes_per_second:>8.2f}{r.percent_of_floor:>8.0f}%{times:>9}{r.error:>10.1e}"
        )


def plot(results: list[Result], path: Path) -> None:
    """A roofline: bytes that must be read against the time taken; the line is the read bandwidth."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    bandwidth = statistics.median(r.bandwidth for r in results)
    sizes = [r.bytes_read / 1e6 for r in results]
    span = [min(sizes) * 0.8, max(sizes) * 1.25]
    axes.plot(span, [size * 1e12 / bandwidth for size in span], color="black", lw=1)
    axes.annotate(f"read bandwidth, {bandwidth / 1e9:.0f} GB/s", (span[0], span[0] * 1e12 / bandwidth), fontsize=8)
    for name in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == name]
        axes.scatter([r.bytes_read / 1e6 for r in own], [r.microseconds for r in own], label=name, s=18)
    axes.set(xscale="log", yscale="log", xlabel="weights read (MB)", ylabel="time of a layer (µs)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def machine() -> dict[str, str | int]:
    """What the numbers were measured on, and when."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1.2B", "2.5B"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--share", type=float, default=0.15, help="share of experts that a token activates")
    parser.add_argument("--union", type=float, help="share that a chunk activates; default by number of tokens")
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "auto bf16"], choices=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    parser.add_argument("--plot", type=Path, help="write a roofline plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: list[Result] = []
    with torch.inference_mode():
        for name in arguments.shapes:
            bench = Bench(name, {m: METHODS[m] for m in arguments.methods}, arguments.share)
            for num_tokens in arguments.tokens:
                nearest = UNION_SHARES[max(t for t in UNION_SHARES if t <= num_tokens)]
                union_share = max(arguments.union or nearest, arguments.share)
                rows = bench.run(num_tokens, union_share, arguments.rounds, arguments.seconds)
                print_table(rows)
                results += rows
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
