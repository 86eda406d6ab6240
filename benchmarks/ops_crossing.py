"""Where the sparse kernel over plain experts stops paying: its time over the dense product's.

    python benchmarks/ops_crossing.py --json benchmarks/results/ops-crossing.json

Below 1 the sparse kernel is faster. `SPARSE_SHARE_LIMITS` in `blockffn.ops.sparse_ffn.cpu` holds the resulting limits;
above them the backend `auto` takes the dense product. Tokens choose experts at random, each independently. Both methods
take turns, and layers rotate over more memory than any cache holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from blockffn.ops.sparse_ffn import sparse_ffn
from ops import POOL_BYTES, SHAPES, machine

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def time_ratio(layers: list[tuple[torch.Tensor, torch.Tensor]], num_tokens: int, share: float, rounds: int) -> float:
    """Median over rounds of sparse time over dense time at this share of active (token, expert) pairs."""
    up, _ = layers[0]
    ratios = []
    for _ in range(rounds):
        x = torch.randn(num_tokens, up.shape[2]).to(up.dtype)
        weights = torch.rand(num_tokens, up.shape[0])
        weights = torch.where(weights < share, weights + 0.5, 0.0).to(up.dtype)
        times = {}
        for backend in ("cpu", "dense"):
            start = time.perf_counter()
            for layer in layers:
                sparse_ffn(x, *layer, weights, backend=backend)
            times[backend] = time.perf_counter() - start
        ratios.append(times["cpu"] / times["dense"])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.2B", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape, rows = SHAPES[arguments.shape], []
    for dtype in arguments.dtypes:
        up = torch.randn(shape.num_experts, shape.width, shape.hidden_size).to(getattr(torch, dtype)) * 0.03
        size = 2 * up.numel() * up.element_size()
        layers = [(up.clone(), up.clone()) for _ in range(max(2, POOL_BYTES // size))]
        print(f"\n{arguments.shape}, {dtype}: time of the sparse kernel over the dense product")
        print("tokens" + "".join(f"{share:>8.0%}" for share in SHARES))
        for num_tokens in arguments.tokens:
            subset = layers if num_tokens <= 4 else layers[:2]  # compute-bound: cold weights matter no more
            with torch.inference_mode():
                ratios = [time_ratio(subset, num_tokens, share, arguments.rounds) for share in SHARES]
            print(f"{num_tokens:>6}" + "".join(f"{ratio:>8.2f}" for ratio in ratios), flush=True)
            rows += [
                {"shape": arguments.shape, "dtype": dtype, "num_tokens": num_tokens, "share": share, "ratio": ratio}
                for share, ratio in zip(SHARES, ratios)
            ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
