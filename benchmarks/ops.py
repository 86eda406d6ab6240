"""Time the sparse FFN: every method against the dense product and against the memory bandwidth of the machine.

    python benchmarks/ops.py --json benchmarks/results/ops.json --plot ops.png
    python benchmarks/ops.py --device cuda --json benchmarks/results/ops-h100.json
    python benchmarks/ops.py --crossing --json benchmarks/results/ops-crossing.json

Each method is first checked against the float32 reference on the inputs that are then timed; a method that fails is not
timed. Weights are always cold. Columns:

    us       median time of a layer: called from Python on a CPU, in a CUDA graph on a GPU
    GB/s     bytes of the weights that the method must read (active experts, or all for a dense product) over time
    % floor  time to move the bytes of the active experts, as the method stores them, at the bandwidth of memory, over
             the time taken. CPU: a read by all threads just before and after; GPU: a copy of one gigabyte
    x dense  time of torch's dense bf16 product over the time taken; x f32: of its dense float32 product

On a GPU a second table times many tokens, forward alone and with backward: where grouped products over the active pairs
beat the dense product. `--crossing` shows for which tokens and shares the CPU kernel over plain experts beats the dense
product, and whether `auto` is ever more than 5 % slower than that.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from layers import SHAPES, Chunk, Row, plot, print_rows


def arguments_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 1.2B and 2.5B on a CPU, four on a GPU")
    parser.add_argument("--tokens", nargs="+", type=int, help="only chunks of so many tokens")
    parser.add_argument("--methods", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one timing (CPU)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill-shape", default="2048x64", choices=SHAPES)
    parser.add_argument("--crossing", action="store_true", help="only the table of where sparsity pays (CPU)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of --crossing")
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    parser.add_argument("--plot", type=Path, help="write a roofline plot (PNG or SVG)")
    return parser.parse_args()


def time_chunks(
    module: Any, shapes: list[str], chunks: list[Chunk], methods: dict[str, Any], options: Any
) -> list[Row]:
    rows: list[Row] = []
    for name in shapes:
        bench = module.Bench(name, methods)
        for chunk in chunks:
            with torch.inference_mode():
                own = bench.run(chunk, options.rounds, options.seconds)
            print_rows(own, lambda row: f", memory {row.bandwidth / 1e9:.1f} GB/s")
            rows += own
        del bench
    return rows


def main() -> None:
    options = arguments_of_command()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data: dict[str, Any] = {}
    if options.crossing:
        from crossing import crossing
        from on_cpu import machine

        data["crossing"] = crossing(
            options.shapes or ["0.1B", "1.2B"],
            options.dtypes,
            tokens=options.tokens,
            rounds=options.rounds,
            seconds=options.seconds,
        )
    elif options.device == "cpu":
        import on_cpu as module
        from on_cpu import machine
    else:
        import on_cuda as module
        from on_cuda import machine
    about = machine()
    print(f"{about['device']}, copy bandwidth {about['copy_bandwidth'] / 1e9:.1f} GB/s")
    for way, microseconds in about.get("call_overhead_microseconds", {}).items():
        print(f"a call without work: {microseconds:.1f} us ({way})")
    if not options.crossing:
        shapes = options.shapes or (
            ["1.2B", "2.5B"] if options.device == "cpu" else ["0.1B", "0.8B", "2048x64", "2.8B"]
        )
        wanted = options.methods or [""]
        methods = {name: m for name, m in module.METHODS.items() if any(part in name for part in wanted)}
        chunks = [chunk for chunk in module.chunks() if not options.tokens or chunk.num_tokens in options.tokens]
        if not methods or not chunks:
            raise SystemExit(f"nothing to time: methods are {', '.join(module.METHODS)}")
        rows = time_chunks(module, shapes, chunks, methods, options)
        data["results"] = [asdict(row) for row in rows]
        if options.device == "cuda":
            prefill = [row for case in module.PREFILL for row in module.time_prefill(options.prefill_shape, *case)]
            module.print_prefill(prefill)
            data["prefill"] = [asdict(row) for row in prefill]
        if options.plot:
            plot(data["results"], str(options.plot))
    if options.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": about | versions | {"date": date}, **data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
