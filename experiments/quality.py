"""The claim itself: every method at equal parameters, on the same tokens, with two seeds and more where it is close.

    python experiments/quality.py --data DATA --gpus 2 --per-gpu 2 --eval-data EVAL
    python experiments/quality.py --data DATA --size nano --cpu --steps 100     # on a laptop, in minutes

DATA is a folder that `blockffn prepare` made. `python experiments/results.py` turns the records into docs/results.md.
"""

from __future__ import annotations

import sys

from blockffn.experiments.suite import PUBLISHED_SIZE, Experiment

METHODS = {
    "blockffn": "BlockFFN",
    "dense": "dense",
    "topk": "TopK",
    "deepseek": "DeepSeek",
    "grin": "GRIN",
    "remoe": "ReMoE",
    "deco": "DECO",
}
SEEDS = (1, 2)
# BlockFFN and its nearest rival lie closer together than two seeds of one method: these two have more.
MORE_SEEDS = {"blockffn": (3, 4), "remoe": (3, 4)}


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """Seeds outermost: after half of the time there is one row of each method."""
    pairs = [(seed, method) for seed in SEEDS for method in METHODS]
    pairs += [(seed, method) for method, seeds in MORE_SEEDS.items() for seed in seeds]
    return [
        Experiment("quality", f"{size}-{method}-seed{seed}", METHODS[method], method=method, size=size, seed=seed)
        for seed, method in pairs
    ]


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
