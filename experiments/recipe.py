"""How the recipe of `mini` is chosen: learning rates, coefficients, initial scales; a third of the tokens, seed 0.

    python experiments/recipe.py --data DATA --gpus 2 --per-gpu 3 --only lr-

The suites that compare methods use other seeds than this one.
"""

from __future__ import annotations

import sys

from blockffn.experiments.suite import PUBLISHED_SIZE, Experiment

STEPS = 300
SEED = 0
SHORT = ("schedule.warmup_steps=30",)
# The published recipe starts with attention far weaker than the FFN, which costs a short run most of its time.
STARTS = {
    "kv_b-0.1": ["model.kv_b_initializer_range=0.1"],
    "matrices-0.05": ["model.initializer_range=0.05"],
    "both": ["model.initializer_range=0.05", "model.kv_b_initializer_range=0.05"],
}


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """Learning rates of two controls; locality, the router's rate and precision for BlockFFN; where training starts."""
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
    for label, changes in STARTS.items():
        for method in ("blockffn", "dense", "topk"):
            add(f"start-{label}-{method}", f"{method}, {label}", *changes, method=method)
    for scale in (0.3, 0.1):
        add(f"start-scale-{scale}", f"router's scale from {scale}", f"model.router_scale_initializer={scale}")
    return runs


def locality_of(value: float) -> str:
    return f"objectives.terms.activation_locality={{kind: constant, value: {value}, warmup_steps: 100}}"


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
