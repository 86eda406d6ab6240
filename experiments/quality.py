"""The claim itself: every method at equal parameters, on the same tokens, with two seeds.

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


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """Seeds outermost: after half of the time there is one row of each method."""
    return [
        Experiment("quality", f"{size}-{method}-seed{seed}", label, method=method, size=size, seed=seed)
        for seed in SEEDS
        for method, label in METHODS.items()
    ]


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
