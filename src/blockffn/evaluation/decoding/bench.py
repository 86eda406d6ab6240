"""`blockffn bench decode` as a function: load, check, time in turns, and describe what was measured where."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blockffn.checkpoints.load import load, model_folder
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.evaluation.decoding.modes import ORACLE, Subject, choose_draft, oracle_rates
from blockffn.evaluation.decoding.peers import check_peers, make_peers
from blockffn.evaluation.decoding.prompts import EncodedPrompt, Prompt, encode_prompts
from blockffn.evaluation.decoding.rounds import Check, WayResult, check_way, time_ways
from blockffn.evaluation.decoding.ways import Decoder, Way
from blockffn.evaluation.machine import describe_machine
from blockffn.inference.backends import make_target
from blockffn.inference.drafts import tree_shape
from blockffn.metrics.cost import parameter_counts
from blockffn.ops.device import choose_device

Say = Callable[[str], None]
MARGIN = 64  # tokens of the cache for a tree at the end of a text; also the shortest room for a prompt


@dataclass(frozen=True)
class BenchSettings:
    """What to time and how.

    Attributes:
        draft, dense_draft: see `modes.choose_draft`.
        priced: a simulated draft takes the time of a real head of random weights.
        tree: draft tokens of the fixed tree, or `chain:N`.
        backend, precision: see `backends.make_target`.
        screen_head: see `backends.make_target`.
        max_prompt_tokens: a longer prompt loses its beginning.
        rounds: every way takes every prompt so often.
        peers: names that `peers.check_peers` takes.
    """

    draft: str | None = None
    dense_draft: str | None = None
    priced: bool = True
    tree: int | str = 7
    backend: str = "auto"
    precision: str = "auto"
    screen_head: str | None = None
    device: str | None = None
    max_new_tokens: int = 128
    max_prompt_tokens: int = 512
    rounds: int = 3
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The prompt gives the first new token, so one alone takes no time of its own.
        for name, least in (("max_new_tokens", 2), ("max_prompt_tokens", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tree == "auto":
            raise ValueError("tree is that of the fixed tree: draft tokens or chain:N, got 'auto'")
        tree_shape(self.tree)
        check_peers(self.peers)
        for draft in (self.draft, self.dense_draft):
            if draft is not None and draft.startswith(ORACLE):
                oracle_rates(draft)


@dataclass(frozen=True)
class BenchReport:
    """What was measured. `notes`: what was left out, and why."""

    results: tuple[WayResult, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "notes": list(self.notes),
            "checks": [asdict(check) for check in self.checks],
            "results": [result.to_dict() for result in self.results],
        }


@torch.no_grad()
def bench_decode(
    path: Path, prompts: Sequence[Prompt], settings: BenchSettings, *, dense: Path | None = None, say: Say = print
) -> BenchReport:
    """Time a model, and its dense twin if one is given, in every mode.

    The dense twin's plain mode is what ratios refer to; without a twin it is the model's own. A mode whose text differs
    from the plain loop's by more than rounding explains is not timed.

    Raises:
        ValueError: a model, draft or setting that cannot be used; before anything is timed.
    """
    tokenizer = load_tokenizer(model_folder(path))
    subjects = [_subject("sparse", path, settings, settings.draft)]
    if subjects[0].model.config.ffn_type == "dense":
        subjects[0].label = "dense"
        if dense is not None:
            raise ValueError(f"{path} is a dense model; give the sparse one first and the dense twin as --dense")
    if dense is not None:
        twin = _subject("dense", dense, settings, settings.dense_draft)
        _check_twin(tokenizer, subjects[0], twin, dense)
        subjects.insert(0, twin)
    room = min(subject.target.capacity for subject in subjects) - settings.max_new_tokens
    if room < MARGIN:
        raise ValueError(
            f"{settings.max_new_tokens} new tokens leave no room for a prompt in the model's context; ask for at most "
            f"{max(room + settings.max_new_tokens - MARGIN, 0)}"
        )
    encoded = encode_prompts(tokenizer, prompts, max_tokens=min(settings.max_prompt_tokens, room))
    ways: list[Way] = []
    checks: list[Check] = []
    notes: list[str] = []
    for subject in subjects:
        say(f"{subject.label}: {_about_model(subject)}; drafts: {subject.draft or 'none'}")
        if (subject.draft or "").startswith(ORACLE):
            subject.learn(encoded, settings.max_new_tokens)
        modes, own_checks, own_notes = _modes(subject, encoded, settings, say)
        ways += modes
        checks += own_checks
        notes += own_notes
    peers, peer_notes = make_peers(
        settings.peers, subjects[0], settings.precision, settings.max_prompt_tokens + settings.max_new_tokens
    )
    ways += peers
    notes += peer_notes
    for note in notes:
        say(f"note: {note}")
    for way in ways:  # what is done once is done now
        way.run(encoded[0].ids, min(8, settings.max_new_tokens))
    results = time_ways(
        ways, encoded, max_new_tokens=settings.max_new_tokens, rounds=settings.rounds, baseline=ways[0].name
    )
    return BenchReport(tuple(results), tuple(checks), tuple(notes), _about(subjects, encoded, settings))


def _modes(
    subject: Subject, prompts: Sequence[EncodedPrompt], settings: BenchSettings, say: Say
) -> tuple[list[Way], list[Check], list[str]]:
    ways: list[Way] = [subject.plain()]
    checks: list[Check] = []
    notes: list[str] = []
    if subject.draft is None:
        notes.append(f"no draft for the {subject.label} model: it is only decoded plainly")
        return ways, checks, notes
    drafted: list[Decoder] = [subject.speculating(tree=settings.tree), subject.speculating(tree="auto")]
    for way in drafted:
        check = check_way(way, prompts, settings.max_new_tokens)
        checks.append(check)
        say(f"{way.name}: {check.texts - check.ties - len(check.faults)} of {check.texts} texts as the plain loop's"
            + (f", {check.ties} part at a near-tie" if check.ties else ""))  # fmt: skip
        if check.faults:
            notes.append(f"{way.name} is not timed, its text is wrong: {check.faults[0]}")
        else:
            ways.append(way)
    return ways, checks, notes


def _subject(label: str, path: Path, settings: BenchSettings, draft: str | None) -> Subject:
    device = choose_device(settings.device)
    chosen = choose_draft(path, draft)
    model = load(path, device=device, progress=sys.stderr.isatty())
    capacity = min(settings.max_prompt_tokens + settings.max_new_tokens + MARGIN, model.config.max_position_embeddings)
    target = make_target(
        model, backend=settings.backend, precision=settings.precision, capacity=capacity,
        screen_head=settings.screen_head,
    )  # fmt: skip
    return Subject(label, model, target, chosen, settings.priced)


def _check_twin(tokenizer: PreTrainedTokenizerBase, sparse: Subject, twin: Subject, path: Path) -> None:
    if twin.model.config.vocab_size != sparse.model.config.vocab_size:
        raise ValueError(
            f"the dense model has {twin.model.config.vocab_size} tokens and the sparse one "
            f"{sparse.model.config.vocab_size}; a twin shares the tokenizer"
        )
    if load_tokenizer(model_folder(path)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{path} has another tokenizer than the sparse model; a twin shares it")


def _about_model(subject: Subject) -> str:
    counts = parameter_counts(subject.model.config)
    return f"{counts.total / 1e6:.0f} M parameters, {counts.non_embedding / 1e6:.0f} M without embeddings"


def _about(subjects: Sequence[Subject], prompts: Sequence[EncodedPrompt], settings: BenchSettings) -> dict[str, Any]:
    tasks: dict[str, int] = {}
    for prompt in prompts:
        tasks[prompt.task] = tasks.get(prompt.task, 0) + 1
    models = {}
    for subject in subjects:
        config, counts = subject.model.config, parameter_counts(subject.model.config)
        models[subject.label] = {
            "name": Path(str(subject.model.name_or_path)).name,
            "target": type(subject.target).__name__,
            "parameters": counts.total,
            "non_embedding_parameters": counts.non_embedding,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_experts": config.num_experts if config.ffn_type == "moe" else None,
            "draft": subject.draft,
            "simulated_acceptance": (subject.draft or "").startswith(ORACLE),
        }
    return {
        "machine": {
            "device": describe_machine(subjects[0].model.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "models": models,
        "prompts": tasks,
        "settings": asdict(settings),
    }
