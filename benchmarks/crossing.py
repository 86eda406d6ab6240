"""Where the sparse CPU kernel over plain experts stops paying, and whether `auto` knows it.

Tokens choose experts at random, each independently. The kernel, the dense product and `auto` take turns on layers that
rotate over more memory than a cache holds. `SPARSE_SHARE_LIMITS` in `blockffn.ops.sparse_ffn.cpu` holds the limits.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from layers import SHAPES, random_experts
from torch import Tensor

from blockffn.ops.sparse_ffn import sparse_ffn

SHARES = (0.1, 0.3, 0.5, 0.8, 1.0)
TOKENS = (1, 4, 8, 16, 32, 64, 256)
BACKENDS = ("cpu", "dense", "auto")
POOL_BYTES = 192 << 20
WORST = 1.05  # `auto` may take this times the dense product's time


def time_backends(
    layers: list[tuple[Tensor, Tensor]], num_tokens: int, share: float, rounds: int, seconds: float
) -> dict[str, float]:
    """Time of each backend over the dense product's, call after call; the median of the ratios."""
    up, _ = layers[0]
    ratios: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    begin = time.perf_counter()
    for number in range(10 * rounds):
        x = torch.randn(num_tokens, up.shape[2]).to(up.dtype)
        weights = torch.rand(num_tokens, up.shape[0])
        weights = torch.where(weights < share, weights + 0.5, 0.0).to(up.dtype)
        times = {}
        for offset, backend in enumerate(BACKENDS):
            layer = layers[(number * len(BACKENDS) + offset) % len(layers)]
            start = time.perf_counter()
            sparse_ffn(x, *layer, weights, backend=backend)
            times[backend] = time.perf_counter() - start
        for backend in BACKENDS:
            ratios[backend].append(times[backend] / times["dense"])
        elapsed = time.perf_counter() - begin
        if elapsed > seconds and (number + 1 >= rounds or elapsed > 10 * seconds):
            break
    return {backend: statistics.median(values) for backend, values in ratios.items()}


def crossing(
    shapes: list[str], dtypes: list[str], *, tokens: list[int] | None, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Print and return the table; a `!` marks where `auto` is slower than the dense product."""
    rows = []
    for name in shapes:
        for dtype in dtypes:
            experts = random_experts(SHAPES[name], dtype=getattr(torch, dtype))
            size = sum(tensor.numel() * tensor.element_size() for tensor in experts)
            layers = [experts, *(tuple(t.clone() for t in experts) for _ in range(max(2, POOL_BYTES // size)))]
            print(
                f"\n{name}, {dtype}: time of the sparse kernel over the dense product | of auto over the dense product"
            )
            print("tokens" + "".join(f"{share:>15.0%}" for share in SHARES))
            for num_tokens in tokens or TOKENS:
                cells = []
                for share in SHARES:
                    with torch.inference_mode():
                        ratios = time_backends(layers, num_tokens, share, rounds, seconds)
                    flag = "!" if ratios["auto"] > WORST else " "
                    cells.append(f"{ratios['cpu']:>8.2f}|{ratios['auto']:<5.2f}{flag}")
                    rows.append(
                        {"shape": name, "dtype": dtype, "num_tokens": num_tokens, "share": share,
                         "ratio": ratios["cpu"], "auto_ratio": ratios["auto"]}
                    )  # fmt: skip
                print(f"{num_tokens:>6}" + "".join(cells), flush=True)
    slower = [row for row in rows if row["auto_ratio"] > WORST]
    print(f"\nauto is over {WORST:.0%} of the dense product's time (!) in {len(slower)} of {len(rows)} cells")
    return rows
