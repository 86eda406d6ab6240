"""Tune the Triton kernels: candidates and launch shapes against the kernels in use, checked, then timed.

    python benchmarks/tune_triton.py --seconds 150 --json tune.json

A case is a shape and a chunk. Its variants are compiled by threads, checked against the float32 reference, and timed in
a CUDA graph over layers with cold weights. Lines are printed as they come and the data after each case; after
`--seconds` the program stops wherever it is and prints the table of what it has. `--tiny` rehearses every variant in
the interpreter (`TRITON_INTERPRET=1`) with shapes of no meaning.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from candidates import token_rows, union
from layers import SHAPES, Chunk, Shape, random_experts, relative_error, routing_weights
from on_cuda import BASELINE, DTYPE, GRAPH_BYTES, LEAST_LAYERS, METHODS, TOLERANCE, Layer, copy_bandwidth, median_time
from torch import Tensor

from blockffn.ops.gpu import has_dependent_launch
from blockffn.ops.sparse_ffn import sparse_ffn
from blockffn.ops.sparse_ffn.triton_union import UnionConfig, choose_config, ffn_over_union

# In the order of what one wants to know first.
CHUNKS = [(1, 0.125, 0.125), (8, 0.125, 0.31), (32, 0.125, 0.31), (32, 0.5, 1.0), (16, 0.5, 1.0), (64, 0.5, 1.0)]
CASES = [(name, Chunk(*chunk)) for chunk in CHUNKS for name in ("2048x64", "2.8B")]
TINY = Shape(32, 4, 16)
TINY_CASES = [Chunk(1, 0.5, 0.5), Chunk(9, 0.5, 0.75), Chunk(9, 0.75, 1.0)]


@dataclass(frozen=True)
class Variant:
    """A way to compute a layer; `run` takes what `prepare` makes of it."""

    name: str
    run: Callable[[Any], Tensor]
    prepare: Callable[[Layer], Any] = lambda layer: layer
    tolerance: float = 1.2 * TOLERANCE


def int8(layer: Layer) -> tuple[Layer, tuple[Tensor, Tensor]]:
    """The layer with int8 experts, and the scales of their rows, `[E, F]` each."""
    scales = [(t.float().abs().amax(-1) / 127).clamp_min(1e-12) for t in (layer.up, layer.down)]
    up, down = (
        (t.float() / s[..., None]).round().to(torch.int8) for t, s in zip((layer.up, layer.down), scales, strict=True)
    )
    return replace(layer, up=up, down=down), (scales[0], scales[1])


def candidate(name: str, function: Callable[..., Tensor], config: Any, bits: int = 16) -> Variant:
    """A kernel of `candidates`, on the layer as it is or in int8."""
    if bits == 8:
        return Variant(
            f"int8 {name}",
            lambda prepared: function(
                *prepared[0].inputs(), scales=prepared[1], config=config, pdl=has_dependent_launch(prepared[0].x.device)
            ),
            int8,
            4 * TOLERANCE,
        )
    return Variant(
        name, lambda layer: function(*layer.inputs(), config=config, pdl=has_dependent_launch(layer.x.device))
    )


def variants_of_one_token() -> list[Variant]:
    """Rows, programs and warps of the first kernel; columns and warps of the sum."""
    rows = [(4, 256, 4), (8, 128, 8), (8, 256, 8), (4, 512, 4), (2, 512, 4), (4, 132, 4)]
    configs = [token_rows.TokenConfig(*r, *s) for s in ((16, 4), (32, 8)) for r in rows]
    variants = [candidate(shorten(c), token_rows.ffn_of_one_token, c) for c in configs]
    return variants + [candidate(shorten(c), token_rows.ffn_of_one_token, c, bits=8) for c in configs[:3]]


def variants_of_chunk(num_tokens: int, full: bool) -> list[Variant]:
    """Shapes of the up kernel times shapes of the down kernel; `full` where all experts are in the union."""
    up: list[dict[str, int]]
    names = ("down_rows", "down_cols", "splits", "down_warps", "down_depth")
    if full:
        wide = [(64, 128, 4, 1), (64, 128, 3, 2), (64, 64, 5, 2), (128, 64, 4, 1)]
        keys = ("wide_rows", "wide_cols", "wide_stages", "up_programs")
        narrow = {"wide_union": 1, "up_rows": 32, "up_cols": 256, "up_stages": 2}
        up = [{**narrow, **dict(zip(keys, w, strict=True))} for w in wide]
        down = [(128, 64, 8, 8, 1), (64, 64, 8, 4, 2), (128, 128, 8, 8, 1), (128, 64, 4, 4, 1)]
    else:
        keys = ("up_rows", "up_cols", "up_stages", "up_programs", "up_parts", "up_warps")
        if num_tokens <= 8:
            rows = [(16, 512, 5, 2, 4, 4), (16, 512, 4, 2, 4, 4), (16, 512, 3, 3, 4, 4), (16, 1024, 2, 2, 8, 8)]
            rows += [(16, 256, 4, 3, 4, 4), (8, 2048, 1, 3, 4, 4)]
            down = [(128, 64, 16, 4, 1), (128, 64, 8, 4, 1), (64, 64, 16, 4, 2), (64, 64, 8, 4, 3)]
        else:
            rows = [(16, 512, 3, 2, 4, 4), (32, 256, 4, 2, 4, 4), (32, 128, 5, 2, 1, 4), (32, 256, 4, 1, 1, 4)]
            rows += [(64, 128, 4, 1, 1, 4), (64, 64, 6, 2, 1, 4)]
            down = [(128, 64, 8, 8, 1), (128, 64, 16, 4, 1), (64, 64, 8, 4, 2), (128, 64, 4, 8, 2)]
        up = [dict(zip(keys, r, strict=True)) for r in rows]
    # The loads of a scan with 32 lanes are unrolled, four times as many as with 128: slow to compile for many tokens.
    lanes = 32 if num_tokens <= 8 else 128
    shapes = [{**u, **dict(zip(names, d, strict=True))} for u, d in itertools.product(up, down)]
    configs = [union.UnionConfig(**shape, lanes=lanes) for shape in shapes]
    if num_tokens <= 8:
        configs.append(replace(configs[0], lanes=128))
    variants = [candidate(shorten(c), union.ffn_over_union, c) for c in configs]
    return [*variants, candidate(shorten(configs[0]), union.ffn_over_union, configs[0], bits=8)]


def shorten(config: union.UnionConfig | token_rows.TokenConfig) -> str:
    """The fields that are not at their default."""
    plain = type(config)()
    return " ".join(f"{k}={v}" for k, v in vars(config).items() if v != getattr(plain, k)) or "default"


def variants_in_use(shape: Shape, num_tokens: int) -> list[Variant]:
    """The package's kernels, batch-invariant ones, the dense product, and stages in flight for a chunk."""
    variants = [Variant("in use", lambda layer: sparse_ffn(*layer.inputs(), backend="triton"))]
    variants.append(Variant("invariant", lambda layer: sparse_ffn(*layer.inputs(), backend="triton_invariant")))
    dense = METHODS[BASELINE]
    variants.append(Variant("dense", dense.run, dense.prepare, dense.tolerance))
    if num_tokens > 1:
        used = choose_config(num_tokens, shape.num_experts)
        for stages, programs in ((3, 2), (4, 2), (3, 3)):
            config: UnionConfig = replace(used, up_stages=stages, up_programs=programs)
            if config != used:
                variants.append(candidate(f"in use, stages={stages} programs={programs}", ffn_over_union, config))
    return variants


class Tuner:
    """Runs cases until the time is up; `finish` may be called at any moment, from any thread."""

    def __init__(self, json_path: Path | None, tiny: bool) -> None:
        self.json_path, self.tiny, self.device = json_path, tiny, "cpu" if tiny else "cuda"
        self.dtype = torch.float16 if tiny else DTYPE  # the interpreter multiplies bfloat16 wrongly
        self.bandwidth = 1e12 if tiny else copy_bandwidth()
        self.rows: list[dict[str, Any]] = []
        device = "interpreter" if tiny else torch.cuda.get_device_name()
        self.machine = {
            "device": device, "copy_bandwidth": self.bandwidth, "torch": torch.__version__,
            "triton": triton.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        print(f"{device}, copy {self.bandwidth / 1e9:.0f} GB/s", flush=True)

    def run_case(self, name: str, shape: Shape, chunk: Chunk) -> None:
        num_union = chunk.counts(shape)[1]
        num_bytes = num_union * shape.weights_per_expert * 2
        count = 1 if self.tiny else max(LEAST_LAYERS, math.ceil(GRAPH_BYTES / num_bytes))
        layers = [self._layer(shape, chunk) for _ in range(count)]
        T, full = chunk.num_tokens, num_union == shape.num_experts
        variants = variants_in_use(shape, T) + (variants_of_one_token() if T == 1 else variants_of_chunk(T, full))
        expected = sparse_ffn(*(tensor.float() for tensor in layers[0].inputs()), backend="reference")
        started = time.monotonic()
        self._compile(variants, layers[0])
        label = f"{name} T={T} union={num_union}"
        print(f"\n{label}: {len(variants)} variants, compiled in {time.monotonic() - started:.0f} s", flush=True)
        for variant in variants:
            try:
                prepared = [variant.prepare(layer) for layer in layers]
                error = relative_error(variant.run(prepared[0]), expected)
                # The reference of a variant in int8 has the weights before rounding.
                time_us = self._time(variant.run, prepared) if error <= variant.tolerance else None
            except Exception as problem:  # a launch shape that does not fit this GPU is a result, not the end
                print(f"  {variant.name}: {type(problem).__name__} {str(problem)[:100]}", flush=True)
                continue
            self._report(label, variant.name, error, time_us, num_bytes)
        self._write()

    def _layer(self, shape: Shape, chunk: Chunk) -> Layer:
        up, down = random_experts(shape, self.device, self.dtype)
        weights = routing_weights(chunk, shape).to(self.device, self.dtype)
        x = torch.randn(chunk.num_tokens, shape.hidden_size, device=self.device, dtype=self.dtype)
        return Layer(x, up, down, weights, weights.any(dim=0).nonzero().squeeze(-1))

    def _compile(self, variants: list[Variant], layer: Layer) -> None:
        def once(variant: Variant) -> None:
            try:
                variant.run(variant.prepare(layer))
            except Exception as problem:
                print(f"  {variant.name}: {type(problem).__name__} while compiling", flush=True)

        if not self.tiny:  # the interpreter compiles nothing
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                list(pool.map(once, variants))
            torch.cuda.synchronize()

    def _time(self, run: Callable[[Any], Tensor], prepared: list[Any]) -> float:
        if self.tiny:
            return 1.0
        run(prepared[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):  # without the garbage collection of `torch.cuda.graph`
            graph.capture_begin()
            for layer in prepared:
                run(layer)
            graph.capture_end()
        return median_time(graph.replay, rounds=5, repeats=5)[0] / len(prepared)

    def _report(self, case: str, name: str, error: float, time_us: float | None, num_bytes: int) -> None:
        share = num_bytes / self.bandwidth / time_us * 1e8 if time_us else None
        self.rows.append(
            {"case": case, "variant": name, "error": error, "microseconds": time_us, "percent_of_floor": share}
        )
        took = "not timed" if time_us is None or share is None else f"{time_us:8.2f} us {share:5.1f} %"
        print(f"  {took}  error {error:.1e}  {name}", flush=True)

    def _write(self) -> None:
        if self.json_path:
            self.json_path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")

    def finish(self) -> None:
        """Print, for every case, the kernels in use and the five fastest of all."""
        self._write()
        for case in dict.fromkeys(row["case"] for row in self.rows):
            timed = [row for row in self.rows if row["case"] == case and row["microseconds"]]
            timed.sort(key=lambda row: row["microseconds"])
            print(f"\n== {case}")
            for i, row in enumerate(timed):
                if i < 5 or row["variant"] in ("in use", "dense", "invariant"):
                    print(f"{row['microseconds']:8.2f} us {row['percent_of_floor']:5.1f} %  {row['variant']}")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="hard stop; the table is printed all the same")
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    parser.add_argument("--tiny", action="store_true", help="rehearse in the interpreter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tuner = Tuner(arguments.json, arguments.tiny)

    def stop() -> None:
        print("\nThe time is up.")
        tuner.finish()
        os._exit(0)  # threads that compile cannot be stopped

    timer = threading.Timer(arguments.seconds, stop)
    timer.daemon = True
    timer.start()
    cases = [("tiny", TINY, c) for c in TINY_CASES] if arguments.tiny else [(n, SHAPES[n], c) for n, c in CASES]
    with torch.inference_mode():
        for case in cases:
            tuner.run_case(*case)
    timer.cancel()
    tuner.finish()


if __name__ == "__main__":
    main()
