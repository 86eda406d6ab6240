"""The sparse FFN on the CPU: methods, and timings with cold weights beside the bandwidth of memory.

Methods take turns in one process. Before and after each timing all threads read a large buffer: this gives the
bandwidth that holds at that moment, and empties the caches. Every call of a timing reads experts that no other call of
that timing has read.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from layers import SHAPES, Chunk, Row, Shape, index_select, random_experts, relative_error, routing_weights
from torch import Tensor

from blockffn.ops import native
from blockffn.ops.quantization import PackedExperts, pack_experts
from blockffn.ops.sparse_ffn import sparse_ffn, sparse_ffn_packed
from blockffn.ops.sparse_ffn.cpu import PackedStep

POOL_BYTES = 384 << 20  # of distinct weights of a method: more than any cache
FLUSH_BYTES = 256 << 20  # read before and after each timing
UNION_SHARES = {1: 0.15, 8: 0.30, 32: 0.35}  # of experts that a chunk of this many tokens activates
MOST_CALLS = 256  # of a timing


@dataclass(frozen=True)
class Method:
    """A way to compute the layer.

    Attributes:
        storage: name of the storage format; methods with the same one and the same dtype share their layers.
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

    @property
    def pool(self) -> tuple[str, torch.dtype]:
        return self.storage, self.dtype


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
    def build(up: Tensor, down: Tensor) -> PackedExperts:
        return pack_experts(up, down, format=format)

    return Method(format, build, copy_packed, bind, dtype, bits, True, tolerance)


def plain(run: Callable[..., Tensor], dtype: torch.dtype, sparse: bool) -> Method:
    return Method(
        storage="plain",
        build=lambda up, down: (up.to(dtype), down.to(dtype)),
        copy=lambda layer: tuple(t.clone() for t in layer),
        bind=lambda x, layer, weights: lambda: run(x, *layer, weights),
        dtype=dtype,
        bits=32 if dtype == torch.float32 else 16,
        sparse=sparse,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
    )


BF16, F32 = torch.bfloat16, torch.float32
BASELINE, BASELINE_F32 = "torch dense bf16", "torch dense f32"
METHODS: dict[str, Method] = {
    "cpu bf16 step": packed("bf16", 16, 5e-3, call_step),
    "cpu int8 step": packed("int8", 8.25, 2e-2, call_step),
    "cpu int4 step": packed("int4", 4.25, 2e-2, call_step),
    "cpu bf16 packed": packed("bf16", 16, 5e-3),
    "cpu int8 packed": packed("int8", 8.25, 2e-2),
    "cpu int4 packed": packed("int4", 4.25, 2e-2),
    "cpu f32 packed": packed("f32", 32, 1e-5, dtype=F32),
    "cpu bf16 plain": plain(lambda *a: sparse_ffn(*a, backend="cpu"), BF16, True),
    "cpu f32 plain": plain(lambda *a: sparse_ffn(*a, backend="cpu"), F32, True),
    "torch index_select bf16": plain(index_select, BF16, True),
    BASELINE: plain(lambda x, u, d, w: sparse_ffn(x, u, d, w.to(x.dtype), backend="dense"), BF16, False),
    BASELINE_F32: plain(lambda *a: sparse_ffn(*a, backend="dense"), F32, False),
}


def chunks() -> list[Chunk]:
    """One token, and the chunks of speculative decoding."""
    return [Chunk(tokens, 0.15, union) for tokens, union in UNION_SHARES.items()]


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


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy; best of five."""
    source, target = (torch.ones(FLUSH_BYTES // 2, dtype=torch.uint8) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def error_of(method: Method, layer: Any, x: Tensor, weights: Tensor) -> float:
    """Against the float32 reference on the weights as the method stores them."""
    up, down = layer.unpack()[:2] if isinstance(layer, PackedExperts) else (w.float() for w in layer)
    return relative_error(
        method.bind(x, layer, weights)(), sparse_ffn(x.float(), up, down, weights, backend="reference")
    )


class Bench:
    """The layers of all methods at one shape, and their timings."""

    def __init__(self, shape_name: str, methods: dict[str, Method]) -> None:
        self.name, self.shape, self.methods = shape_name, SHAPES[shape_name], methods
        self.flush = native.empty_huge(FLUSH_BYTES).fill_(1)
        experts = random_experts(self.shape)
        self.pools: dict[object, list[Any]] = {}
        for method in methods.values():
            if method.pool not in self.pools:
                first = method.build(*experts)
                size = self.shape.num_experts * self.shape.weights_per_expert * method.bits / 8
                copies = range(math.ceil(POOL_BYTES / size) - 1)
                self.pools[method.pool] = [first, *(method.copy(first) for _ in copies)]

    def time_once(self, method: Method, chunk: Chunk, seconds: float) -> tuple[list[float], float]:
        """`(seconds of each call, bandwidth beside them)` over calls that read fresh experts."""
        layers = self.pools[method.pool]
        x = torch.randn(chunk.num_tokens, self.shape.hidden_size).to(method.dtype)
        calls = [
            method.bind(x, layers[index], routing_weights(chunk, self.shape, experts))
            for index, experts in fresh_experts(self.shape, chunk.union_share if method.sparse else 1.0, len(layers))
        ][:MOST_CALLS]
        before = read_bandwidth(self.flush)
        times: list[float] = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if sum(times) > seconds and (len(times) >= 3 or sum(times) > 10 * seconds):
                break
        return times, (before + read_bandwidth(self.flush)) / 2

    def run(self, chunk: Chunk, rounds: int, seconds: float) -> list[Row]:
        """Check every method, then time those that are right."""
        x, weights = torch.randn(chunk.num_tokens, self.shape.hidden_size), routing_weights(chunk, self.shape)
        errors = {n: error_of(m, self.pools[m.pool][0], x.to(m.dtype), weights) for n, m in self.methods.items()}
        timings: dict[str, list[tuple[list[float], float]]] = {name: [] for name in self.methods}
        for _ in range(rounds):
            for name, method in self.methods.items():
                if errors[name] <= method.tolerance:
                    timings[name].append(self.time_once(method, chunk, seconds))
        rows = [
            self._row(name, chunk, errors[name], timings[name]) for name in self.methods if timings[name]
        ]  # fmt: skip
        for name in self.methods:
            if not timings[name]:
                print(f"{name}: error {errors[name]:.1e} is too large; not timed")
        times = {row.method: row.microseconds for row in rows}
        dense, dense_f32 = times.get(BASELINE), times.get(BASELINE_F32)
        return [
            replace(
                row,
                times_dense=dense / row.microseconds if dense else None,
                times_dense_f32=dense_f32 / row.microseconds if dense_f32 else None,
            )
            for row in rows
        ]

    def _row(self, name: str, chunk: Chunk, error: float, timings: list[tuple[list[float], float]]) -> Row:
        method, E = self.methods[name], self.shape.num_experts
        num_active, num_union = chunk.counts(self.shape)
        expert = self.shape.weights_per_expert * method.bits / 8
        size = round((num_union if method.sparse else E) * expert)
        medians = [(statistics.median(times), bandwidth) for times, bandwidth in timings]
        middle = statistics.median(t for t, _ in medians)
        return Row(
            shape=self.name, num_tokens=chunk.num_tokens, share=num_active / E, union_share=num_union / E, method=name,
            error=error, microseconds=middle * 1e6, best_microseconds=min(min(t) for t, _ in timings) * 1e6,
            bytes_read=size, gigabytes_per_second=size / middle / 1e9,
            percent_of_floor=statistics.median(num_union * expert / t / b for t, b in medians) * 100,
            bandwidth=statistics.median(b for _, b in medians),
        )  # fmt: skip


def call_overhead() -> dict[str, float]:
    """Median microseconds of a call in which no expert is active: all that is not work, by way of calling."""
    experts = pack_experts(*random_experts(Shape(256, 8, 32)))
    x, weights = torch.randn(1, 256, dtype=BF16), torch.zeros(1, 8)
    ways = {"step": PackedStep(experts, 1), "op": call_op(x, experts, weights)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2000):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What the numbers are measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "device": next(names, platform.processor()),
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "copy_bandwidth": copy_bandwidth(),
        "call_overhead_microseconds": call_overhead(),
    }
