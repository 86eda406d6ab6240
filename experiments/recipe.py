"""How the recipe of `mini` is chosen: learning rates, coefficients, initial scales; a third of the tokens, seed 0.

    python experiments/recipe.py --data DATA --gpus 2 --per-gpu 3 --only lr-

The suites that compare methods use other seeds than this one.
"""

from __future__ import annotations

import sys

from blockffn.experiments.suite import NO_CHUNKS, NO_LOCALITY, PUBLISHED_SIZE, Experiment

STEPS = 300
SEED = 0
SHORT = ("schedule.warmup_steps=30",)
ROUTER_RATE = "optimizer.router_learning_rate=0.002"
START_STEPS = 450
WHOLE_STEPS = 900
WHOLE_WARMUP = ("schedule.warmup_steps=60",)
# The published recipe starts with attention far weaker than the FFN, which costs a short run most of its time.
STARTS = {
    "kv_b-0.1": ["model.kv_b_initializer_range=0.1"],
    "kv_b-0.1-matrices-0.05": ["model.kv_b_initializer_range=0.1", "model.initializer_range=0.05"],
}
START_METHODS = ("dense", "topk", "deepseek", "remoe")
SCALES = (0.3, 0.1, 0.03)


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """Learning rates of two controls; locality, the router's rate and precision for BlockFFN; where training starts."""
    runs = []

    def add(
        name: str,
        label: str,
        *changes: str,
        method: str = "blockffn",
        steps: int = STEPS,
        warmup: tuple[str, ...] = SHORT,
    ) -> None:
        runs.append(
            Experiment("recipe", f"{size}-{name}", label, method=method, size=size, seed=SEED, steps=steps,
                       changes=(*warmup, *changes))
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
    for label, changes in {"published": [], **STARTS}.items():
        for method in START_METHODS:
            add(f"start-{label}-{method}", f"{method}, start {label}", *changes, method=method, steps=START_STEPS)
        for scale in (1.0, *SCALES):
            add(f"start-{label}-blockffn-{scale}", f"start {label}, router's scale from {scale}", *changes, ROUTER_RATE,
                f"model.router_scale_initializer={scale}", steps=START_STEPS)  # fmt: skip
    # From the start that won: what the objectives cost there, and how gently they can be had.
    for label, changes in {
        "none": [NO_LOCALITY, NO_CHUNKS],
        "cs": [NO_LOCALITY],
        "al-0.0001": [locality_of(1e-4)],
        "al-0.0003": [locality_of(3e-4)],
        "al-steered": [held_locality("3e-4", 72)],
        "al-0.0003-router-0.001": [locality_of(3e-4), "optimizer.router_learning_rate=0.001"],
        "al-0.0003-balance": [locality_of(3e-4), "objectives.terms.load_balancing={kind: constant, value: 0.001}"],
        "al-0.0003-shared": [locality_of(3e-4), "model.num_shared_experts=2"],
        "al-0.0003-float32": [locality_of(3e-4), "model.router_dtype=float32"],
    }.items():
        add(f"then-{label}", f"scale 0.1, {label}", *STARTS["kv_b-0.1"], "model.router_scale_initializer=0.1",
            *([] if "router-" in label else [ROUTER_RATE]), *changes, steps=START_STEPS)  # fmt: skip
    gentle = [*STARTS["kv_b-0.1"], locality_of(2e-4), held_chunks(0.03, warmup=50)]
    for label, changes in {
        "router-0.001": [],
        "router-0.0005": ["optimizer.router_learning_rate=0.0005"],
        "scale-0.2": ["model.router_scale_initializer=0.2"],
        "rate-0.007": ["optimizer.learning_rate=0.007"],
        "rate-0.014": ["optimizer.learning_rate=0.014"],
        "shared": ["model.num_shared_experts=2"],
        "matrices-0.07": ["model.initializer_range=0.07"],
        "late": ["objectives.terms.activation_locality={kind: constant, value: 3e-4, warmup_steps: 300}"],
    }.items():
        given = {change.split("=")[0] for change in changes}
        base = ["model.router_scale_initializer=0.1", "optimizer.router_learning_rate=0.001"]
        kept = [change for change in [*base, *gentle] if change.split("=")[0] not in given]
        add(f"gentle-{label}", f"gentle, {label}", *kept, *changes, steps=START_STEPS)
    for scale, locality in ((0.2, 3e-4), (0.3, 3e-4), (0.45, 3e-4), (0.3, 6e-4)):
        add(f"last-scale-{scale}-al-{locality}", f"scale {scale}, locality {locality}", *STARTS["kv_b-0.1"],
            f"model.router_scale_initializer={scale}", "optimizer.router_learning_rate=0.001", locality_of(locality),
            steps=START_STEPS)  # fmt: skip
    # What the second half of a run needs that the baselines have: the whole length of the quality suite.
    late = [
        "objectives.terms.activation_locality={kind: constant, value: 1e-3, warmup_steps: 600}",
        held_chunks(0.02, warmup=500),
    ]
    relu = ["model.router_type=relu", "model.router_initializer_range=0.01"]
    whole = {"steps": WHOLE_STEPS, "warmup": WHOLE_WARMUP}
    add("gap-standard", "standard", **whole)
    add("gap-remoe", "ReMoE", method="remoe", **whole)
    add("gap-deepseek", "DeepSeek", method="deepseek", **whole)
    for label, changes in {
        "none": [NO_LOCALITY, NO_CHUNKS],
        "relu": relu,
        "relu-late": [*relu, *late],
        "late": late,
        "scaled": ["model.router_type=relu_scaled"],
        "shared": ["model.num_shared_experts=2"],
    }.items():
        add(f"gap-{label}", label, *changes, **whole)
    small = "model.router_initializer_range=0.01"
    eps_1 = [small, "model.router_norm_eps=1.0", "model.router_scale_initializer=1.0"]
    steer = held_locality("3e-4", 72.5)
    soft = [held_locality("1e-4", 72.5), held_chunks(0.03, warmup=50)]
    for label, changes in {
        "standard": [],
        "relu": relu,
        "relu-shared": [*relu, "model.num_shared_experts=2"],
        "eps-1": eps_1,
        "eps-0.1": [small, "model.router_norm_eps=0.1"],
    }.items():
        add(f"steered-{label}", f"locality steered, {label}", *changes, steer, **whole)
        if label in ("relu", "eps-1"):
            add(f"soft-{label}", f"both objectives start small, {label}", *changes, *soft, **whole)
    # What the large epsilon leaves to be mended: dead experts. Then how far its other settings matter.
    for label, changes in {
        "0.01": [*eps_1, *soft, lift(0.01)],
        "0.1": [*eps_1, *soft, lift(0.1)],
        "0.01-router-0.002": [*eps_1, *soft, lift(0.01), "optimizer.router_learning_rate=0.002"],
        "0.01-eps-0.1": [small, "model.router_norm_eps=0.1", *soft, lift(0.01)],
        "0.01-projection-0.03": ["model.router_initializer_range=0.03", *eps_1[1:], *soft, lift(0.01)],
        "0.01-cls8-71": [*eps_1, held_locality("1e-4", 71), soft[1], lift(0.01)],
        "0-slow": [*eps_1, held_locality("1e-4", 72.5, warmup=300), held_chunks(0.03, warmup=300)],
        "0.01-slow": [*eps_1, held_locality("1e-4", 72.5, warmup=300), held_chunks(0.03, warmup=300), lift(0.01)],
    }.items():
        add(f"lift-{label}", f"dead experts lifted, {label}", *changes, **whole)
    # A start of chunk sparsification that does not carry TLS beyond its aim.
    add("chunks-0.003", "chunk sparsification from 0.003", held_chunks(0.003, warmup=50), **whole)
    return runs


def lift(value: float) -> str:
    """A constant lift for experts that a row does not activate."""
    return f"objectives.terms.dead_experts={{kind: constant, value: {value}}}"


def held_locality(initial: str, cls8: float, *, warmup: int = 100) -> str:
    """Activation locality whose coefficient a controller moves until CLS8 is there."""
    return (
        f"objectives.terms.activation_locality={{kind: set_point, initial: {initial}, target: {cls8}, observes: cls8, "
        f"interval: 10, response_steps: 60, warmup_steps: {warmup}}}"
    )


def held_chunks(initial: float, *, warmup: int) -> str:
    """Chunk sparsification that a controller holds at the preset's TLS, from another start."""
    return (
        f"objectives.terms.chunk_sparsification={{kind: set_point, initial: {initial}, target: 80.5, observes: tls, "
        f"interval: 10, response_steps: 60, warmup_steps: {warmup}}}"
    )


def locality_of(value: float) -> str:
    return f"objectives.terms.activation_locality={{kind: constant, value: {value}, warmup_steps: 100}}"


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
