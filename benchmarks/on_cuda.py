"""The sparse FFN on a GPU: methods, timings inside CUDA graphs with cold weights, and training steps.

A timing is a CUDA graph over many layers, each with its own weights and routing, together several times larger than the
L2 cache: weights are always cold, launches are free of Python. Kernels are compiled before the first timing. Many
tokens are timed as called from Python, forward alone and with backward.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from layers import SHAPES, Chunk, Row, Shape, index_select, random_experts, relative_error, routing_weights
from torch import Tensor

from blockffn.ops.sparse_ffn import sparse_ffn

GRAPH_BYTES = 256 << 20  # of active experts in one graph: four times the largest L2 cache
LEAST_LAYERS = 16
DEVICE = "cuda"
DTYPE = torch.bfloat16
TOLERANCE = 5e-3
PREFILL = [(256, 0.125), (1024, 0.125), (4096, 0.125), (4096, 0.25), (4096, 0.5), (16384, 0.125), (16384, 0.25)]


@dataclass(frozen=True)
class Layer:
    x: Tensor
    up: Tensor
    down: Tensor
    weights: Tensor
    union: Tensor
    gate: Tensor | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.up, self.down, self.weights

    def output(self, backend: str = "auto") -> Tensor:
        return sparse_ffn(*self.inputs(), gate_proj_EFD=self.gate, backend=backend)


@dataclass(frozen=True)
class Method:
    """A way to compute a layer. `prepare` turns one into what `run` takes: its weights in the method's own storage.

    `bits` and `sparse` say which bytes of weights it reads; `tolerance` is that of its error against the reference.
    """

    run: Callable[[Any], Tensor]
    prepare: Callable[[Layer], Any] = lambda layer: layer
    bits: float = 16
    sparse: bool = True
    tolerance: float = TOLERANCE


OURS, BASELINE = "auto bf16", "torch dense bf16"
WORST = 1.05  # `auto` may take this times the dense product's time
METHODS: dict[str, Method] = {
    OURS: Method(Layer.output),  # up to 64 tokens, the Triton kernels
    "torch index_select bf16": Method(
        lambda layer: index_select(*layer.inputs(), layer.union, layer.gate), tolerance=4 * TOLERANCE
    ),
    BASELINE: Method(lambda layer: layer.output("dense"), sparse=False, tolerance=4 * TOLERANCE),
}


def chunks() -> list[Chunk]:
    """One token, chunks of speculative decoding, and unions so large that the dense product catches up."""
    tokens = [(1, 0.125, 0.125), (1, 0.31, 0.31), (1, 0.6, 0.6), (1, 1.0, 1.0), (4, 0.125, 0.25)]
    tokens += [(T, *shares) for T in (8, 16, 32, 64) for shares in ((0.125, 0.31), (0.125, 0.6), (0.5, 1.0))]
    return [Chunk(*row) for row in tokens]


def median_time(run: Callable[[], object], rounds: int = 10, repeats: int = 1) -> tuple[float, float]:
    """Median and best microseconds of a call, between device events."""
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
    return statistics.median(times), min(times)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of one gigabyte."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_time(lambda: target.copy_(source))[0] * 1e-6)


def graph_time(run: Callable[[Any], Tensor], layers: list[Any], rounds: int) -> tuple[float, float]:
    """Median and best microseconds a layer, of a CUDA graph over all of them."""
    run(layers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # without the garbage collection of `torch.cuda.graph`
        graph.capture_begin()
        for layer in layers:
            run(layer)
        graph.capture_end()
    median, best = median_time(graph.replay, rounds, repeats=5)
    return median / len(layers), best / len(layers)


class Bench:
    """Layers of one shape, and the timings of all methods over them."""

    def __init__(self, shape_name: str, methods: dict[str, Method], *, gated: bool = False) -> None:
        self.name, self.shape, self.methods = shape_name, replace(SHAPES[shape_name], gated=gated), methods
        smallest = min(chunk.counts(self.shape)[1] for chunk in chunks())
        count = self._layers_for(smallest)
        self.experts = [random_experts(self.shape, DEVICE, DTYPE) for _ in range(count)]
        self.gates = [random_experts(self.shape, DEVICE, DTYPE)[0] if gated else None for _ in range(count)]

    def _layers_for(self, num_union: int) -> int:
        return max(LEAST_LAYERS, math.ceil(GRAPH_BYTES / (num_union * self.shape.weights_per_expert * 2)))

    def compile(self, chunks: list[Chunk]) -> None:
        """Run every method once for every number of tokens, in threads."""
        layers = [self._layer(chunk, 0) for chunk in {c.num_tokens: c for c in chunks}.values()]

        def once(method: Method, layer: Layer) -> None:
            try:
                method.run(method.prepare(layer))
            except Exception as problem:  # `run` meets it again and leaves this method out
                print(f"{layer.x.shape[0]} tokens: {type(problem).__name__} while compiling", flush=True)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda pair: once(*pair), itertools.product(self.methods.values(), layers)))
        torch.cuda.synchronize()

    def run(self, chunk: Chunk, rounds: int, seconds: float) -> list[Row]:
        """Check every method, then time those that are right. `seconds` is the CPU's."""
        E, (num_active, num_union) = self.shape.num_experts, chunk.counts(self.shape)
        layers = [self._layer(chunk, index) for index in range(self._layers_for(num_union))]
        gate = layers[0].gate
        expected = sparse_ffn(
            *(tensor.float() for tensor in layers[0].inputs()), gate_proj_EFD=None if gate is None else gate.float(),
            backend="reference",
        )  # fmt: skip
        rows = []
        for name, method in self.methods.items():
            prepared = [method.prepare(layer) for layer in layers]
            try:
                error = relative_error(method.run(prepared[0]), expected)
                if not error <= method.tolerance:
                    print(f"{name}: error {error:.1e} is too large; not timed", flush=True)
                    continue
                time, best = graph_time(method.run, prepared, rounds)
            except Exception as problem:  # what does not run on this GPU is a result, not the end of the others
                print(f"{name}, {chunk.num_tokens} tokens: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                continue
            expert = self.shape.weights_per_expert * method.bits / 8
            size = round((num_union if method.sparse else E) * expert)
            rows.append(
                Row(
                    shape=self.name, num_tokens=chunk.num_tokens, share=num_active / E, union_share=num_union / E,
                    method=name, error=error, microseconds=time, best_microseconds=best, bytes_read=size,
                    gigabytes_per_second=size / time / 1e3,
                    percent_of_floor=num_union * expert / copy_bandwidth() / time * 1e8, bandwidth=copy_bandwidth(),
                )
            )  # fmt: skip
        dense = next((row.microseconds for row in rows if row.method == BASELINE), None)
        return [replace(row, times_dense=dense / row.microseconds if dense else None) for row in rows]

    def _layer(self, chunk: Chunk, index: int) -> Layer:
        weights = routing_weights(chunk, self.shape).to(DEVICE, DTYPE)
        x = torch.randn(chunk.num_tokens, self.shape.hidden_size, device=DEVICE, dtype=DTYPE)
        union = weights.any(dim=0).nonzero().squeeze(-1)
        return Layer(x, *self.experts[index], weights, union, self.gates[index])


def print_crossing(rows: list[Row]) -> list[dict[str, Any]]:
    """Print and return, for every shape, `auto`'s time over the dense product's: tokens by share of the union."""
    wanted = [row for row in rows if row.method == OURS and row.times_dense]
    cells = [
        {"shape": row.shape, "num_tokens": row.num_tokens, "union_share": row.union_share,
         "auto_ratio": 1 / row.times_dense} for row in wanted if row.times_dense
    ]  # fmt: skip
    targets = (0.31, 0.6, 1.0)
    for shape in dict.fromkeys(row.shape for row in wanted):
        print(f"\n{shape}: time of auto over the dense product, by share of the experts in the union")
        print("tokens" + "".join(f"{target:>9.0%}" for target in targets))
        for num_tokens in dict.fromkeys(row.num_tokens for row in wanted):
            line = f"{num_tokens:>6}"
            for target in targets:
                ratios = [
                    cell["auto_ratio"] for cell in cells
                    if (cell["shape"], cell["num_tokens"]) == (shape, num_tokens)
                    and abs(cell["union_share"] - target) < 0.02
                ]  # fmt: skip
                line += f"{ratios[0]:>8.2f}{'!' if ratios[0] > WORST else ' '}" if ratios else f"{'-':>8} "
            if any(character.isdigit() for character in line[6:]):
                print(line)
    slower = [cell for cell in cells if cell["auto_ratio"] > WORST]
    print(
        f"auto is over {WORST:.0%} of the dense product's time (!) in {len(slower)} of {len(cells)} cells", flush=True
    )
    return cells


@dataclass(frozen=True)
class PrefillRow:
    shape: str
    num_tokens: int
    share: float
    backward: bool
    triton_microseconds: float
    dense_microseconds: float
    times_dense: float
    error: float


def time_prefill(name: str, num_tokens: int, share: float) -> list[PrefillRow]:
    """Many tokens, each with its own random experts: the forward pass, and forward with backward."""
    shape: Shape = SHAPES[name]
    up, down = random_experts(shape, DEVICE, DTYPE)
    x, dy = (torch.randn(num_tokens, shape.hidden_size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weights = torch.rand(num_tokens, shape.num_experts, device=DEVICE) + 0.5
    weights = (weights * (torch.rand_like(weights) < share)).to(DTYPE)
    inputs = [tensor.requires_grad_() for tensor in (x, up, down, weights)]

    def forward(backend: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (sparse_ffn(*inputs, backend=backend),)

    def both(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sparse_ffn(*inputs, backend=backend), inputs, dy)

    rows = []
    for backward, run in ((False, forward), (True, both)):
        error = relative_error(run("triton")[0], run("dense")[0])  # of y, or of the gradient of x
        if error > 2 * TOLERANCE:  # either of the two may be off by TOLERANCE
            print(f"{num_tokens} tokens: error {error:.1e}; not timed")
            continue
        ours, dense = (median_time(functools.partial(run, backend))[0] for backend in ("triton", "dense"))
        rows.append(PrefillRow(name, num_tokens, share, backward, ours, dense, dense / ours, error))
    return rows


def print_prefill(rows: list[PrefillRow]) -> None:
    print(
        f"\n{'shape':<10}{'tokens':>8}{'active':>8}{'':>20}{'triton us':>11}{'dense us':>10}{'x dense':>9}{'error':>9}"
    )
    for r in rows:
        what = "forward + backward" if r.backward else "forward"
        print(
            f"{r.shape:<10}{r.num_tokens:>8}{r.share:>8.1%}{what:>20}{r.triton_microseconds:>11.0f}"
            f"{r.dense_microseconds:>10.0f}{r.times_dense:>9.2f}{r.error:>9.1e}",
            flush=True,
        )


def machine() -> dict[str, Any]:
    """What the numbers are measured on."""
    return {
        "device": torch.cuda.get_device_name(),
        "copy_bandwidth": copy_bandwidth(),
        "triton": triton.__version__,
    }
