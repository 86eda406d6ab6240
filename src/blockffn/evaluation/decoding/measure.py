"""About a minute of measuring for `blockffn advise`: memory, steps on real text, drafts, acceptance."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from blockffn.evaluation.decoding.advice import SIZES, DraftMeasurement, Recorded, TargetMeasurement, replay
from blockffn.evaluation.decoding.prompts import EncodedPrompt
from blockffn.evaluation.decoding.ways import greedy
from blockffn.inference.decode import generate
from blockffn.inference.speculative.cost import milliseconds_per_level
from blockffn.inference.speculative.decode import Shaper, Speculation, speculative_generate
from blockffn.inference.speculative.drafters import Drafter
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import DraftTree, no_tree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.statistics import GenerationStatistics, bits_per_weight
from blockffn.inference.target import Step, Target
from blockffn.metrics.cost import weight_bytes_per_token
from blockffn.models.causal_lm import BlockFFNForCausalLM

READ_BYTES = 256 << 20
TREES = 4  # recorded trees that steps are timed on


def read_bandwidth(device: torch.device, *, rounds: int = 5) -> float:
    """Bytes per second of a plain read of much memory by all threads; of a copy, both ways counted, on a GPU."""
    source = torch.ones(READ_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        if device.type == "cuda":
            source.clone()
            torch.cuda.synchronize()
        else:
            source.sum()
        best = min(best, time.perf_counter() - begin)
    return (2 if device.type == "cuda" else 1) * READ_BYTES / best


@dataclass
class TreeRecorder(Shaper):
    """A shaper that leaves trees as they are and keeps them with what was accepted."""

    most: Budget
    rounds: list[Recorded] = field(default_factory=list)

    def budget(self, most: Budget) -> Budget:
        return Budget(min(most.nodes, self.most.nodes), min(most.depth, self.most.depth))

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        self.rounds.append(Recorded(tree, tuple(verdict.path)))


@dataclass(frozen=True)
class Acceptance:
    """What became of a draft's trees, by kind of text."""

    draft: str
    by_task: dict[str, tuple[Recorded, ...]]
    draft_seconds: float
    rounds: int

    @property
    def all(self) -> list[Recorded]:
        return [round_ for rounds in self.by_task.values() for round_ in rounds]


def record_acceptance(
    target: Target, name: str, drafter: Drafter, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int, most: Budget
) -> Acceptance:
    """Decode prompts with the draft's whole trees.

    Raises:
        ValueError: a drafter that draws at random, whose trees cannot be cut afterwards.
    """
    by_task: dict[str, tuple[Recorded, ...]] = {}
    seconds, rounds = 0.0, 0
    for prompt in prompts:
        recorder = TreeRecorder(most)
        speculation = Speculation(drafter, recorder, most)
        generation = speculative_generate(target, speculation, prompt.ids, greedy(max_new_tokens))
        # The last trees are cut short by the end of the text.
        own = tuple(recorder.rounds[:-1] or recorder.rounds)
        by_task[prompt.task] = by_task.get(prompt.task, ()) + own
        seconds += generation.statistics.draft_seconds
        rounds += len(recorder.rounds)
    return Acceptance(name, by_task, seconds, rounds)


def measure_draft(target: Target, drafter: Drafter, acceptance: Acceptance, *, most: Budget) -> DraftMeasurement:
    """The draft as the decision needs it. n-grams cost a round, not a level."""
    recorded = acceptance.all
    sizes = [size for size in SIZES if size <= most.nodes]
    replayed = {size: replay(recorded, size) for size in sizes}
    level = 0.0 if acceptance.draft == "ngram" else milliseconds_per_level(target, drafter, most)
    overhead = 1000 * acceptance.draft_seconds / acceptance.rounds if acceptance.draft == "ngram" else 0.0
    return DraftMeasurement(
        acceptance.draft,
        {size: tokens for size, (tokens, _) in replayed.items()},
        {size: levels for size, (_, levels) in replayed.items()},
        level,
        overhead,
    )


def measure_target(
    model: BlockFFNForCausalLM,
    target: Target,
    prompt: EncodedPrompt,
    trees: Sequence[DraftTree],
    *,
    backend: str,
    precision: str,
    rounds: int = 3,
) -> TargetMeasurement:
    """Time steps behind a prompt: one token, and the best nodes of recorded trees, in turns."""
    plain = generate(target, prompt.ids, greedy(8))
    last = plain.token_ids[-1]
    largest = max((len(tree) for tree in trees), default=0)
    sizes = [0, *(size for size in SIZES if size <= largest and size + 1 < target.capacity - target.length)]
    chosen = sorted(trees, key=len)[-TREES:] or [no_tree()]
    times: dict[int, list[float]] = {}
    for round_ in range(rounds + 1):
        for tree in chosen:
            for size in sizes:
                part = tree.best(size)
                tokens, parents = part.behind(last)
                begin = time.perf_counter()
                step = target.extend(tokens, parents)
                float(step.logits[-1].argmax())  # waits for a device that works asynchronously
                spent = 1000 * (time.perf_counter() - begin)
                target.commit([])
                if round_:  # what is done once was done in the first
                    times.setdefault(len(tokens), []).append(spent)
    medians = {tokens: statistics.median(values) for tokens, values in times.items()}
    return TargetMeasurement(backend, precision, medians, _bytes(model, target, plain.statistics))


def _bytes(model: BlockFFNForCausalLM, target: Target, measured: GenerationStatistics) -> float:
    """Of weights that a step of one token reads, as `target` holds them."""
    bits = bits_per_weight(model, model.config, target)
    experts = measured.active_experts
    tls = None if experts is None else 100 * (1 - experts / model.config.num_experts)
    return weight_bytes_per_token(model.config, bits_per_weight=bits, tls_percent=tls)
