"""What each part contributes: objectives, router norm, gated experts, granularity, load balancing. One seed.

    python experiments/ablation.py --data DATA --gpus 2 --per-gpu 2

Runs take half of the quality suite's steps, the standard among them. All have the preset's router, and its lift for
dead experts unless the label says otherwise. The coefficient of activation locality is a constant, as in the paper: the
preset's controller would make up for what a row leaves out. That of chunk sparsification is steered from 0.03.
"""

from __future__ import annotations

import sys

from blockffn.experiments.suite import NO_CHUNKS, NO_LOCALITY, PUBLISHED_SIZE, Experiment
from blockffn.presets import objective_terms_of, preset_config

SEED = 1
STEPS = {"mini": 450}
EXPERTS = {"nano": (32, 16), "mini": (48, 64)}  # number and width in the preset


def steered(objective: str, initial: float) -> str:
    """A penalty on single tokens, held where TLS is 80 %: settings are compared at the sparsity they all can reach."""
    return f"objectives.terms.{objective}={{kind: set_point, initial: {initial}, target: 80, observes: tls}}"


LOCALITY = "objectives.terms.activation_locality={kind: constant, value: 1e-3, warmup_steps: 100}"
CHUNKS = (
    "objectives.terms.chunk_sparsification={kind: set_point, initial: 0.03, target: 80.5, observes: tls, "
    "interval: 10, response_steps: 60, warmup_steps: 50}"
)
NO_LIFT = "objectives.terms.dead_experts=null"
PUBLISHED_ROUTER = ("model.router_norm_eps=null", "model.router_scale_initializer=0.3",
                    "model.router_initializer_range=null")  # fmt: skip
L1 = steered("l1", 1e-3)
ENTROPY = steered("router_entropy", 1e-3)

OBJECTIVES = {
    "cs": ("CS", [NO_LOCALITY]),
    "al": ("AL", [NO_CHUNKS]),
    "none": ("none", [NO_LOCALITY, NO_CHUNKS]),
    "al-l1": ("AL + L1", [NO_CHUNKS, L1]),
    "al-entropy": ("AL + entropy", [NO_CHUNKS, ENTROPY]),
    "l1": ("L1", [NO_LOCALITY, NO_CHUNKS, L1]),
    "entropy": ("entropy", [NO_LOCALITY, NO_CHUNKS, ENTROPY]),
}
BALANCE = (0.001, 0.01, 0.1)
GRANULARITY = (0.25, 0.5, 2)  # of the preset's number of experts, at the same total width


def experiments(size: str = PUBLISHED_SIZE) -> list[Experiment]:
    """The standard run, then one change at a time."""
    if size not in EXPERTS:
        raise ValueError(f"the ablation knows the sizes {', '.join(EXPERTS)}; got {size!r}: add a row to EXPERTS")
    number, width = EXPERTS[size]
    groups = ("objectives", "architecture", "granularity", "balance")
    runs: list[Experiment] = []

    def add(name: str, label: str, *changes: str, groups: tuple[str, ...]) -> None:
        if NO_LOCALITY not in changes:
            changes = (LOCALITY, *changes)
        if NO_CHUNKS not in changes and size == PUBLISHED_SIZE:
            changes = (CHUNKS, *changes)
        runs.append(
            Experiment("ablation", f"{size}-{name}", label, size=size, seed=SEED, steps=STEPS.get(size),
                       changes=changes, groups=groups)
        )  # fmt: skip

    add("standard", "AL + CS (standard)", groups=groups)

    for name, (label, changes) in OBJECTIVES.items():
        add(name, label, *changes, groups=("objectives",))
    if "dead_experts" in objective_terms_of(size, "blockffn"):
        add("no-lift", "AL + CS, dead experts not lifted", NO_LIFT, groups=("balance",))
    for value in BALANCE:
        term = f"objectives.terms.load_balancing={{kind: constant, value: {value}}}"
        add(f"balance-{value}", f"AL + CS + load balance {value}", term, groups=("balance",))
    if preset_config(size).router_norm_eps is not None:
        add("published-norm", "norm with the published epsilon", *PUBLISHED_ROUTER, groups=("architecture",))
    add("relu", "router without norm", "model.router_type=relu", groups=("architecture",))
    # Three matrices instead of two: two thirds of the width.
    gated = round(width * 2 / 3)
    add("gated", f"gated experts, width {gated}", "model.expert_gated=true", f"model.moe_intermediate_size={gated}",
        groups=("architecture",))  # fmt: skip
    for factor in GRANULARITY:
        count = round(number * factor)
        add(f"experts-{count}", f"{count} experts of width {round(width / factor)}", f"model.num_experts={count}",
            f"model.moe_intermediate_size={round(width / factor)}", groups=("granularity",))  # fmt: skip
    return runs


if __name__ == "__main__":
    from blockffn.experiments.command import main

    sys.exit(main(experiments, __doc__))
