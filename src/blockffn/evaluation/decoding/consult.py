"""`blockffn advise` as a function: measure, decide, and try what was decided."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from blockffn.checkpoints.load import load, model_folder
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.evaluation.decoding.advice import (
    Advice,
    DraftMeasurement,
    Option,
    TargetMeasurement,
    advise,
    by_measurement,
    conditional_rates,
)
from blockffn.evaluation.decoding.measure import (
    Acceptance,
    measure_draft,
    measure_target,
    read_bandwidth,
    record_acceptance,
)
from blockffn.evaluation.decoding.modes import ORACLE, Subject, choose_draft
from blockffn.evaluation.decoding.prompts import EncodedPrompt, Prompt, encode_prompts
from blockffn.evaluation.decoding.rounds import time_ways
from blockffn.evaluation.decoding.ways import Decoder
from blockffn.evaluation.machine import busy, describe_machine
from blockffn.inference.backends import check_backend, make_target
from blockffn.inference.speculative.growth import Budget
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.device import choose_device

PRECISIONS = ("auto", "int8", "int4")
MOST = {"cpu": Budget(nodes=16, depth=5), "cuda": Budget(nodes=31, depth=5)}
MAX_PROMPT_TOKENS = 192
Key = tuple[str, str, str, int]  # backend, precision, draft, tree


@dataclass(frozen=True)
class Consultation:
    """What was measured and what follows.

    Attributes:
        bandwidth: of memory, bytes per second.
        measured: new tokens per second of the options that were tried.
        notes: what could not be measured.
    """

    advice: Advice
    targets: tuple[TargetMeasurement, ...]
    drafts: tuple[DraftMeasurement, ...]
    acceptances: tuple[Acceptance, ...]
    bandwidth: float
    measured: dict[Key, float]
    notes: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The advice in words."""
        best, exact = self.advice.best, self.advice.best_exact
        lines = [f"best: {_words(best, self.measured)}"]
        if exact != best:
            lines.append(f"with the weights as they are: {_words(exact, self.measured)}")
        flags = "".join(
            f" --{name} {value}"
            for name, value in (("backend", best.backend), ("precision", best.precision))
            if value != "auto"
        )
        if best.tree:
            flags += f" --speculative {best.draft} --tree {best.tree}"
        return [*lines, *(f"note: {note}" for note in self.notes), f"use: blockffn generate MODEL{flags}"]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "bandwidth": self.bandwidth,
            "targets": [asdict(target) for target in self.targets],
            "drafts": [asdict(draft) for draft in self.drafts],
            "acceptance": {
                one.draft: {
                    task: {
                        "tokens_per_step": sum(len(r.path) + 1 for r in rounds) / len(rounds),
                        "by_depth": [rate for rate, _ in conditional_rates(rounds)],
                        "offered": [count for _, count in conditional_rates(rounds)],
                    }
                    for task, rounds in {**one.by_task, "all": tuple(one.all)}.items()
                }
                for one in self.acceptances
            },
            "options": [
                asdict(option)
                | {
                    "tokens_per_second": option.tokens_per_second,
                    "measured": self.measured.get(_key(option)),
                }
                for option in self.advice.options
            ],
            "warnings": list(self.advice.warnings),
            "notes": list(self.notes),
        }


@torch.no_grad()
def consult(
    path: Path,
    prompts: Sequence[Prompt],
    *,
    draft: str | None = None,
    max_new_tokens: int = 32,
    backend: str = "auto",
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> Consultation:
    """Measure and advise.

    Args:
        draft: see `choose_draft`; n-grams are measured in any case.

    Raises:
        ValueError: the model or the draft cannot be used, or fewer than 2 new tokens are asked for.
    """
    if max_new_tokens < 2:
        raise ValueError(f"advice needs at least 2 new tokens, got {max_new_tokens}; the prompt gives the first")
    device = choose_device(device)
    draft = choose_draft(path, draft)
    check_backend(backend)
    model = load(path, device=device, progress=sys.stderr.isatty())
    encoded = encode_prompts(load_tokenizer(model_folder(path)), prompts, max_tokens=MAX_PROMPT_TOKENS)
    capacity = min(MAX_PROMPT_TOKENS + max_new_tokens + 64, model.config.max_position_embeddings)
    bandwidth = read_bandwidth(model.device)
    say(f"{describe_machine(model.device)}: memory gives {bandwidth / 1e9:.1f} GB/s")
    targets, notes = _targets(model, backend, capacity)
    notes += busy(model.device)
    first = next(iter(targets.values()))
    most = MOST[model.device.type]
    names = ["ngram", *([draft] if draft not in (None, "ngram") else [])]
    acceptances, drafts, subjects = [], [], {}
    for name in names:
        subject = subjects[name] = Subject("model", model, first, name)
        if name.startswith(ORACLE):
            subject.learn(encoded, max_new_tokens)
        say(f"decoding with {name}, trees of {most.nodes}")
        drafter = subject.speculating(tree=most.nodes).speculation.drafter  # type: ignore[union-attr]
        acceptance = record_acceptance(first, name, drafter, encoded, max_new_tokens=max_new_tokens, most=most)
        acceptances.append(acceptance)
        drafts.append(measure_draft(first, drafter, acceptance, most=most))
    trees = [recorded.tree for recorded in acceptances[-1].all]
    measured_targets = []
    for (name, precision), target in targets.items():
        say(f"timing steps: {name}, {precision}")
        measured_targets.append(measure_target(model, target, encoded[0], trees, backend=name, precision=precision))
    advice = advise(measured_targets, drafts)
    measured = _try(advice, model, targets, subjects, encoded, max_new_tokens, say)
    advice = by_measurement(advice, [measured[_key(option)] for option in advice.options])
    about = {
        "machine": {
            "device": describe_machine(model.device), "torch": torch.__version__, "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "model": Path(str(model.name_or_path)).name,
        "draft": draft,
        "simulated_acceptance": (draft or "").startswith(ORACLE),
    }  # fmt: skip
    return Consultation(
        advice, tuple(measured_targets), tuple(drafts), tuple(acceptances), bandwidth, measured, tuple(notes), about
    )


def _targets(model: BlockFFNForCausalLM, backend: str, capacity: int) -> tuple[dict[tuple[str, str], Any], list[str]]:
    """A target for every precision that makes a difference to this model, the stored one first."""
    targets: dict[tuple[str, str], Any] = {}
    notes, same = [], []
    for precision in PRECISIONS:
        try:
            target = make_target(model, backend=backend, precision=precision, capacity=capacity)
        except ValueError as error:
            if precision == "auto":
                raise
            notes.append(f"precision {precision} is not measured: {error}")
            continue
        bits = getattr(target, "bits_per_weight", None)
        if any(bits == other.bits_per_weight for other in targets.values()):
            same.append(precision)
        else:
            targets[backend, precision] = target
    if same:
        notes.append(f"{' and '.join(same)} not measured: the weights are stored packed and stay as they are")
    return targets, notes


def _try(
    advice: Advice, model: BlockFFNForCausalLM, targets: dict[tuple[str, str], Any], subjects: dict[str, Subject],
    prompts: Sequence[EncodedPrompt], max_new_tokens: int, say: Callable[[str], None],
) -> dict[Key, float]:  # fmt: skip
    """New tokens per second of the options, decoded with."""
    say("decoding with the best options")
    ways, keys = [], []
    for option in advice.options:
        key = _key(option)
        target, name = targets[option.backend, option.precision], f"{option.precision}, {option.draft}"
        if option.tree:
            own = subjects[option.draft]
            subject = Subject("model", model, target, option.draft)
            if option.draft.startswith(ORACLE):
                # Another precision may say something else.
                subject.continuations = own.continuations
                if target is not own.target:
                    subject.learn(prompts, max_new_tokens)
            ways.append(Decoder(name, target, subject.speculating(tree=option.tree).speculation))
        else:
            ways.append(Decoder(name, target))
        keys.append(key)
    results = time_ways(ways, prompts, max_new_tokens=max_new_tokens, rounds=1, baseline=None)
    return {key: result.overall.tokens_per_second for key, result in zip(keys, results)}


def _key(option: Option) -> Key:
    return option.backend, option.precision, option.draft, option.tree


def _words(option: Option, measured: Mapping[Key, float]) -> str:
    how = f"backend {option.backend}, precision {option.precision}"
    drafts = f"draft {option.draft} with a tree of {option.tree}" if option.tree else "no draft"
    return f"{how}, {drafts}: about {measured.get(_key(option), option.tokens_per_second):.1f} tokens/s"
