"""Time the sparse FFN: every method against the dense product and against the memory bandwidth of the machine.

    python benchmarks/ops.py --json benchmarks/results/ops.json --plot ops.png
    python benchmarks/ops.py --device cuda --budget 90 --json ops-h100.json --plot ops-h100.png
    python benchmarks/ops.py --crossing --json benchmarks/results/ops-crossing.json

Each method is first checked against the float32 reference on the inputs that are then timed; a method that fails is not
timed. Weights are always cold. Columns:

    us       median time of a layer: called from Python on a CPU, in a CUDA graph on a GPU
    GB/s     bytes of the weights that the method must read (active experts, or all for a dense product) over time
    % floor  time to move the bytes of the active experts, as the method stores them, at the bandwidth of memory, over
             the time taken. CPU: a read by all threads just before and after; GPU: a copy of one gigabyte
    x dense  time of torch's dense bf16 product over the time taken; x f32: of its dense float32 product

On a GPU kernels are compiled before the first timing, and a second table shows, by tokens and union, the time of `auto`
over that of the dense product. `--prefill` times many tokens instead, forward alone and with backward: where grouped
products over the active pairs beat the dense product. `--budget` stops there at the latest; what was timed until then
is printed and written. On a CPU `--crossing` shows for which tokens and shares the kernel over plain experts beats the
dense product, and whether `auto` is ever more than 5 % slower than that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from layers import SHAPES, Row, print_rows, roofline

RESERVE = 8  # seconds of the budget for the plot


def arguments_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: 1.2B, 2.5B on a CPU, 2048x64, 2.8B on a GPU"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="only chunks of so many tokens")
    parser.add_argument("--methods", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one timing (CPU)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=600, help="end after so many seconds from the imports (GPU)")
    parser.add_argument("--gated", action="store_true", help="experts with a gate, of three matrices (GPU)")
    parser.add_argument("--prefill", action="store_true", help="only the table of many tokens (GPU)")
    parser.add_argument("--crossing", action="store_true", help="only the table of where sparsity pays (CPU)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of --crossing")
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    parser.add_argument("--plot", type=Path, help="write a roofline plot (PNG or SVG)")
    return parser.parse_args()


class Report:
    """What has been measured so far; `write` may be called at any moment."""

    def __init__(self, about: dict[str, Any], path: Path | None) -> None:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.machine, self.path = about | versions | {"date": date}, path
        self.data: dict[str, Any] = {}

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, **self.data}, indent=1) + "\n")

    def stop(self) -> None:
        """Write and end the process, whatever it is doing."""
        self.write()
        print("\nThe time is up.", flush=True)
        os._exit(0)


def time_chunks(module: Any, options: argparse.Namespace, report: Report, deadline: float) -> None:
    """Every method on every shape and chunk until the deadline; on a GPU then the table of where `auto` pays."""
    on_gpu = options.device == "cuda"
    shapes = options.shapes or (["2048x64", "2.8B"] if on_gpu else ["1.2B", "2.5B"])
    wanted = options.methods or [""]
    methods = {name: m for name, m in module.METHODS.items() if any(part in name for part in wanted)}
    chunks = [chunk for chunk in module.chunks() if not options.tokens or chunk.num_tokens in options.tokens]
    if not methods or not chunks:
        raise SystemExit(f"nothing to time: methods are {', '.join(module.METHODS)}")
    rows: list[Row] = []
    kind, report.data["gated"] = ", gated" if options.gated else "", options.gated
    for name in shapes:
        if on_gpu and time.monotonic() > deadline:
            break
        bench = module.Bench(name, methods, **({"gated": options.gated} if on_gpu else {}))
        if on_gpu:
            start = time.monotonic()
            bench.compile(chunks)
            print(f"\n{name}: compiled in {time.monotonic() - start:.0f} s", flush=True)
        for chunk in chunks:
            if on_gpu and time.monotonic() > deadline:
                print(f"\n{name}: no time for {chunk}", flush=True)
                break
            with torch.inference_mode():
                own = bench.run(chunk, options.rounds, options.seconds)
            print_rows(own, lambda row: f"{kind}, memory {row.bandwidth / 1e9:.1f} GB/s")
            rows += own
            report.data["results"] = [asdict(row) for row in rows]
        report.write()
        del bench
    if on_gpu:
        report.data["crossing"] = module.print_crossing(rows)


def main() -> None:
    started = time.monotonic()
    options = arguments_of_command()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module: Any
    if options.device == "cpu":
        import on_cpu as module
    else:
        import on_cuda as module
    on_gpu = options.device == "cuda"
    if ((options.prefill or options.gated) and not on_gpu) or (options.crossing and on_gpu):
        raise SystemExit("--prefill and --gated need --device cuda, --crossing needs --device cpu")
    report = Report(module.machine(), options.json)
    if options.device == "cuda":
        timer = threading.Timer(options.budget - (time.monotonic() - started), report.stop)
        timer.daemon = True  # compiling threads cannot be stopped, so the process ends
        timer.start()
    print(f"{report.machine['device']}, copy bandwidth {report.machine['copy_bandwidth'] / 1e9:.1f} GB/s", flush=True)
    for way, microseconds in report.machine.get("call_overhead_microseconds", {}).items():
        print(f"a call without work: {microseconds:.1f} us ({way})")
    if options.crossing:
        from crossing import crossing

        report.data["crossing"] = crossing(
            options.shapes or ["0.1B", "1.2B"],
            options.dtypes,
            tokens=options.tokens,
            rounds=options.rounds,
            seconds=options.seconds,
        )
    elif options.prefill:
        report.data["prefill"] = []
        for shape in options.shapes or ["2048x64"]:
            for case in module.PREFILL:
                prefill = module.time_prefill(shape, *case)
                module.print_prefill(prefill)
                report.data["prefill"] += [asdict(row) for row in prefill]
    else:
        time_chunks(module, options, report, started + options.budget - RESERVE)
    report.write()
    if options.plot and "results" in report.data:
        roofline(report.data["results"]).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
