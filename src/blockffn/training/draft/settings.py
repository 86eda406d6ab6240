"""Settings of a draft's training. The resolved settings are saved with the run as `config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockffn.training.config import DataSettings, OptimizerSettings, ScheduleSettings


@dataclass(frozen=True)
class DraftSizes:
    """The draft's layers; what is `None` follows from the target.

    Heads are those of a GQA target, and of width 64 for an MLA target, whose own are no model for them.
    `intermediate_size` keeps the published draft's ratio to the width, 2.8.
    """

    num_hidden_layers: int = 1
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True)
class AcceptanceSettings:
    """How acceptance is measured when training has ended: texts that the target continues greedily.

    Attributes:
        prompts, prompt_tokens, new_tokens: so many held-out texts, of which so many tokens are given, so many new.
        chain: length of the drafted chain. top_k, depth, nodes: of the drafted tree.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    chain: int = 4
    top_k: int = 10
    depth: int = 4
    nodes: int = 31


@dataclass(frozen=True)
class DraftTrainSettings:
    """Everything that decides a run, apart from the machine it runs on.

    Attributes:
        target: folder of the model to draft for.
        draft_vocab_size: propose only so many of the most frequent tokens of the data (`None`: all).
        unroll: passes over each row. In the second and later ones the draft reads its own output of the pass before in
            place of the target's states, as it does when it drafts several tokens ahead.
        unroll_decay: a pass counts so much less than the one before.
        token_weight: of the divergence from the target's next-token distribution.
        feature_weight: of the smooth L1 distance from the target's next hidden state, mean over its numbers.
        steps: optimiser steps.
        max_seconds: end sooner if the machine is too slow for all of them, with the schedule shortened to match; not
            reproducible to the step.
        batch_size: rows a step.
        precision: `float32`, `bfloat16` (autocast over float32 weights; the target in bfloat16), or `auto`: bfloat16
            on a GPU.
        compile: compile the target's layers and the loss; `None`: on a GPU.
        stored_dtype: in which the draft is written.
        log_every, evaluate_every, checkpoint_every: in steps; 0 means at the end only.
        keep_checkpoints: older ones are deleted.
        evaluate_rows, evaluate_depth: held-out rows, and passes over them.
    """

    target: str | None = None
    draft: DraftSizes = field(default_factory=DraftSizes)
    draft_vocab_size: int | None = None
    data: DataSettings = field(default_factory=lambda: DataSettings(sequence_length=1024))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=0.004))
    schedule: ScheduleSettings = field(
        default_factory=lambda: ScheduleSettings(warmup_steps=30, decay_fraction=0.5, final_fraction=0.05)
    )
    unroll: int = 3
    unroll_decay: float = 0.8
    token_weight: float = 1.0
    feature_weight: float = 0.1
    steps: int = 1000
    max_seconds: float | None = None
    batch_size: int = 32
    seed: int = 2345
    precision: str = "auto"
    compile: bool | None = None
    stored_dtype: str = "bfloat16"
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_rows: int = 32
    evaluate_depth: int = 4
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    acceptance: AcceptanceSettings = field(default_factory=AcceptanceSettings)

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", ("auto", "float32", "bfloat16")),
            ("stored_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        sizes, acceptance = vars(self.draft), vars(self.acceptance)
        whole = {name: getattr(self, name) for name in (
            "draft_vocab_size", "unroll", "steps", "batch_size", "log_every", "keep_checkpoints", "evaluate_rows",
            "evaluate_depth")}  # fmt: skip
        whole |= {f"draft.{name}": value for name, value in sizes.items()}
        whole |= {f"acceptance.{name}": value for name, value in acceptance.items()}
        for name, value in whole.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value, least in (
            ("unroll_decay", self.unroll_decay, 0.0),
            ("token_weight", self.token_weight, 0.0),
            ("feature_weight", self.feature_weight, 0.0),
            ("max_seconds", self.max_seconds, 1e-12),
            ("evaluate_every", self.evaluate_every, 0),
            ("checkpoint_every", self.checkpoint_every, 0),
            ("optimizer.learning_rate", self.optimizer.learning_rate, 0.0),
            ("optimizer.weight_decay", self.optimizer.weight_decay, 0.0),
            ("optimizer.gradient_clip", self.optimizer.gradient_clip, 1e-12),
            ("schedule.warmup_steps", self.schedule.warmup_steps, 0),
            ("schedule.final_fraction", self.schedule.final_fraction, 0.0),
            ("data.sequence_length", self.data.sequence_length, 4),
            ("data.align", self.data.align, 1),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value}")
        if not self.token_weight + self.feature_weight:
            raise ValueError("token_weight and feature_weight are both 0: there is nothing to learn")
        if not 0.0 <= self.schedule.decay_fraction <= 1.0:
            raise ValueError(f"schedule.decay_fraction must lie in 0…1, got {self.schedule.decay_fraction}")
