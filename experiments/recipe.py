"""How the recipe of `mini` was chosen: learning rates and coefficients on a third of the tokens, seed 0.

    python experiments/recipe.py --data DATA --gpus 2 --per-gpu 3 --only lr-

The suites that compare methods use other seeds than this one.
"""

from __future__ import annotations

import sys

from blockffn.experiments.suite import PUBLISHED_SIZE, Experiment

STEPS = 300
SEED = 0
SHORT = ("schedule.warmup_steps=30",)


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """Learning rates of two controls; then locality, the router's rate and its precision for BlockFFN."""
    runs = []

    def add(name: str, label: str, *changes: str, method: str = "blockffn") -> None:
        runs.append(
            Experiment("recipe", f"{size}-{name}", label, method=method, size=size, seed=SEED, steps=STEPS,
                       changes=(*SHORT, *changes))
        )  # fmt: skip

    for rate in (0.005, 0.02):
        add(f"lr-dense-{rate}", f"dense, rate {rate}", f"optimizer.learning_rate={rate}", method="dense")
        add(f"lr-topk-{rate}", f"TopK, rate {rate}", f"optimizer.learning_rate={rate}", method="topk")
    add("lr-dense-0.01", "dense, rate 0.01", method="dense")
    add("lr-topk-0.01", "TopK, rate 0.01", method="topk")
    for locality in (3e-4, 1e-3, 3e-3):
        for rate in (0.005, 0.002):
            add(f"al-{locality}-router-{rate}", f"locality {locality}, router's rate {rate}", locality_of(locality),
                f"optimizer.router_learning_rate={rate}")  # fmt: skip
    add("router-float32", "float32 router", "model.router_dtype=float32")
    return runs


def locality_of(value: float) -> str:
    return f"objectives.terms.activation_locality={{kind: constant, value: {value}, warmup_steps: 100}}"


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
