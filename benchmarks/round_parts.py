"""Where the time of a round of speculative decoding goes, part by part, on the CPU's native backend.

    python benchmarks/round_parts.py /tmp/synthetic-0.8b --dense /tmp/synthetic-0.8b-dense --precision int4 \\
        --screen-head int4 --draft oracle:0.75 --sizes 2 3 5 7 --json round-parts.json

Plain decoding and fixed trees of several sizes take turns on the same prompts; what they say is checked first. Of each
a line: milliseconds of a step or round, of which drafting, running the model and choosing tokens, tokens a round, and
runs of the draft's network. Drafting and the model are split into the parts of the native step (`ops.native.PARTS`) and
`python`, which is all that is not in the native call. `floor` is the time that the bytes of the weights read need
at the bandwidth of a plain read beside the timings.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from decode_step import FLUSH_BYTES, bytes_read, matrix_bytes
from on_cpu import read_bandwidth
from screened_head import Asking
from torch import Tensor

from blockffn.checkpoints.load import load
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.evaluation.decoding.modes import Subject
from blockffn.evaluation.decoding.prompts import EncodedPrompt, encode_prompts, own_prompts
from blockffn.evaluation.decoding.ways import Decoder, Run, greedy
from blockffn.evaluation.machine import describe_machine
from blockffn.inference.backends import make_target
from blockffn.inference.decode import generate
from blockffn.inference.native_draft import NativeDraft
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.statistics import GenerationStatistics
from blockffn.inference.target import Step


@dataclass(frozen=True)
class Parts:
    """A way of decoding; times in milliseconds of a step or round, medians over rounds of the benchmark.

    Attributes:
        ratio: its tokens per second over those of the first way, median of the rounds'.
        tokens: per round. runs: of the draft's network, per round.
        draft, model: time by part. choosing: of choosing tokens, and of accepting drafts.
        floor: of reading the model's and the draft's weights once a run.
    """

    way: str
    tokens_per_second: float
    ratio: float
    tokens: float
    milliseconds: float
    draft_milliseconds: float
    model_milliseconds: float
    choosing_milliseconds: float
    runs: float
    floor_milliseconds: float
    union: float | None
    draft: dict[str, float] = field(default_factory=dict)
    model: dict[str, float] = field(default_factory=dict)


class _Prompt(Asking):
    """Remembers what the parts had taken when the prompt was done, `of_prompt`: rounds are what comes after it."""

    def prefill(self, tokens: Tensor) -> Step:
        step = super().prefill(tokens)
        self.of_prompt = model_seconds(self._target)
        return step


class Timed:
    """A way of decoding, with what its turns took."""

    def __init__(self, decoder: Decoder, target: NativeTarget, *, screened: bool) -> None:
        self.name = decoder.name + (", screened" if screened else "")
        self.target, self.screened = target, screened
        self._asking = _Prompt(target, 1 if screened else None)
        self.way = Decoder(self.name, self._asking, decoder.speculation)
        self.network = None if decoder.speculation is None else draft_network(decoder.speculation.drafter)
        self.turns: list[dict[str, Any]] = []

    def check(self, prompt: EncodedPrompt, tokens: int, expected: list[int]) -> None:
        """Raises `ValueError` unless it says what the plain loop says with the whole head."""
        if self.way.run(prompt.ids, tokens).token_ids != expected:
            raise ValueError(f"{self.name} says something else than plain decoding ({prompt.task}); it is not timed")

    def turn(self, prompts: Sequence[EncodedPrompt], tokens: int) -> None:
        """All prompts once, with the times of their parts, prompts and their first tokens left out."""
        totals: dict[str, float] = {}
        for prompt in prompts:
            before = self._seconds()
            run = self.way.run(prompt.ids, tokens)
            after, of_prompt = self._seconds(), self._asking.of_prompt
            assert run.statistics is not None
            for key in after:
                own = after[key] - of_prompt.get(key, before[key])
                totals[key] = totals.get(key, 0.0) + own
            for key, value in counted(run, run.statistics).items():
                totals[key] = totals.get(key, 0.0) + value
        self.turns.append(totals)

    def _seconds(self) -> dict[str, float]:
        seconds = model_seconds(self.target)
        if self.network is not None:
            seconds |= {f"draft.{part}": value for part, value in self.network.seconds.items()}
            seconds["runs"] = self.network.runs
        return seconds


def model_seconds(target: NativeTarget) -> dict[str, float]:
    return {f"model.{part}": value for part, value in target.seconds.items()}


def counted(run: Run, of: GenerationStatistics) -> dict[str, float]:
    """What is added up over prompts."""
    return {
        "new": run.timed_tokens, "steps": of.steps, "draft": of.draft_seconds, "decode": of.decode_seconds,
        "sampling": of.sampling_seconds, "union": (of.union_experts or 0.0) * of.steps,
    }  # fmt: skip


def draft_network(drafter: Any) -> NativeDraft:
    """The network that runs for a drafter, real or priced."""
    drafter = getattr(drafter, "_price", drafter)
    network = getattr(drafter, "draft", None)
    if not isinstance(network, NativeDraft):
        raise ValueError(f"only native drafts tell their parts, got {type(drafter).__name__}")
    return network


def draft_bytes(network: NativeDraft) -> int:
    """Bytes of weights that a run reads."""
    model = network.description
    total = matrix_bytes(model.fusion) + matrix_bytes(model.head)
    for i in range(model.num_layers):
        layer = model.layers[i]
        total += matrix_bytes(layer.in_proj) + matrix_bytes(layer.out_proj) + layer.experts.expert_bytes
    return total


def model_bytes(target: NativeTarget, union: float, positions: int, *, screened: bool) -> float:
    """Bytes that a step reads whose tokens activate `union` experts a layer; of a screened head its screen alone."""
    layers = [union] * len(target.weights.layers_with_experts)
    total = bytes_read(target, layers, positions)  # type: ignore[arg-type]
    if screened and target.weights.screen is not None:
        total += target.weights.screen.matrix.data.nbytes - target.weights.head.data.nbytes
    return total


def summarise(timed: Timed, base: Timed, bandwidth: float, positions: int) -> Parts:
    """From the turns of a way and of the first way. `bandwidth` in bytes a second."""

    def each(key: str) -> float:
        return statistics.median(1000 * turn.get(key, 0.0) / turn["steps"] for turn in timed.turns)

    def rates(of: Timed) -> list[float]:
        return [turn["new"] / (turn["draft"] + turn["decode"] + turn["sampling"]) for turn in of.turns]

    def parts(whole: str, prefix: str) -> dict[str, float]:
        found = {key.removeprefix(prefix): each(key) for key in timed.turns[0] if key.startswith(prefix)}
        return found | {"python": each(whole) - sum(found.values())}

    steps, new = (sum(turn[key] for turn in timed.turns) for key in ("steps", "new"))
    runs = sum(turn.get("runs", 0.0) for turn in timed.turns) / steps
    union = sum(turn["union"] for turn in timed.turns) / steps
    total = model_bytes(timed.target, union, positions, screened=timed.screened)
    if timed.network is not None:
        total += runs * draft_bytes(timed.network)
    return Parts(
        way=timed.name,
        tokens_per_second=statistics.median(rates(timed)),
        ratio=statistics.median(a / b for a, b in zip(rates(timed), rates(base))),
        tokens=new / steps,
        milliseconds=each("draft") + each("decode") + each("sampling"),
        draft_milliseconds=each("draft"),
        model_milliseconds=each("decode"),
        choosing_milliseconds=each("sampling"),
        runs=runs,
        floor_milliseconds=1000 * total / bandwidth,
        union=union or None,
        draft={} if timed.network is None else parts("draft", "draft."),
        model=parts("decode", "model."),
    )


def print_parts(rows: Sequence[Parts]) -> None:
    print(
        f"{'':<28}{'tok/s':>7}{'ratio':>7}{'tokens':>8}{'ms':>7}{'floor':>7}{'draft':>7}{'model':>7}{'choose':>7}{'runs':>6}"
    )
    for row in rows:
        print(
            f"{row.way:<28}{row.tokens_per_second:>7.1f}{row.ratio:>6.2f}×{row.tokens:>8.2f}{row.milliseconds:>7.2f}"
            f"{row.floor_milliseconds:>7.2f}{row.draft_milliseconds:>7.2f}{row.model_milliseconds:>7.2f}"
            f"{row.choosing_milliseconds:>7.2f}{row.runs:>6.2f}"
        )
    for name in ("model", "draft"):
        print(f"\n{name}, ms of a round")
        for row in rows:
            values: dict[str, float] = getattr(row, name)
            if values:
                print(f"{row.way:<28}" + "  ".join(f"{part} {value:.2f}" for part, value in values.items()))


def make_ways(options: argparse.Namespace) -> tuple[list[Timed], list[EncodedPrompt]]:
    """Plain decoding of the dense and the sparse model, then trees; with the screened head as well, by one target."""
    ways: list[Timed] = []
    prompts: list[EncodedPrompt] = []
    for path in ([options.dense] if options.dense else []) + [options.model]:
        label = "sparse" if path == options.model else "dense"
        model = load(path, device="cpu")
        prompts = encode_prompts(load_tokenizer(path), own_prompts(per_task=1)[: options.prompts], max_tokens=160)
        target = make_target(
            model, backend="native", precision=options.precision, capacity=160 + options.tokens + 64,
            screen_head=options.screen_head,
        )  # fmt: skip
        assert isinstance(target, NativeTarget)
        subject = Subject(label, model, target, options.draft)
        subject.learn(prompts, options.tokens)
        sizes = options.sizes if label == "sparse" else options.dense_sizes
        decoders = [subject.plain(), *(subject.speculating(tree=int(s) if s.isdecimal() else s) for s in sizes)]
        for decoder in decoders:
            ways.append(Timed(decoder, target, screened=False))
            if options.screen_head:
                ways.append(Timed(decoder, target, screened=True))
    for target in {id(way.target): way.target for way in ways}.values():
        for prompt in prompts:
            expected = generate(Asking(target, None), prompt.ids, greedy(options.tokens)).token_ids
            for way in ways:
                if way.target is target:
                    way.check(prompt, options.tokens, expected)
    return ways, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dense", type=Path, help="a dense model; its plain decoding is what ratios refer to")
    parser.add_argument("--draft", default="oracle:0.75", help="as `blockffn bench decode` takes it, but n-grams")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--screen-head", help="each way with this screen of the head as well")
    parser.add_argument("--sizes", nargs="*", default=["2", "3", "5", "7", "chain:2", "chain:3"], help="N or chain:N")
    parser.add_argument("--dense-sizes", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways, prompts = make_ways(options)
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8)
    bandwidths = []
    for way in ways:
        way.target.times = True
        if way.network is not None:
            way.network.times = True
    for round_ in range(options.rounds):
        first = round_ % len(ways)
        for way in (*ways[first:], *ways[:first]):
            bandwidths.append(read_bandwidth(flush))
            way.turn(prompts, options.tokens)
        # After every round, so that a run that is cut short leaves what it has.
        bandwidth = statistics.median(bandwidths)
        positions = statistics.mean(len(prompt.ids) for prompt in prompts) + options.tokens / 2
        rows = [summarise(way, ways[0], bandwidth, round(positions)) for way in ways]
        if options.json is not None:
            write_json(options, rows, bandwidth, rounds=round_ + 1)
    print(f"plain read: {bandwidth / 1e9:.1f} GB/s ({min(bandwidths) / 1e9:.1f} … {max(bandwidths) / 1e9:.1f})\n")
    print_parts(rows)


def write_json(options: argparse.Namespace, rows: Sequence[Parts], bandwidth: float, *, rounds: int) -> None:
    """The rows of so many rounds, with the machine and the settings."""
    about = {"device": describe_machine(torch.device("cpu")), "torch": torch.__version__,
             "python": platform.python_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
             "bandwidth": bandwidth}  # fmt: skip
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings |= {"rounds": rounds, "model": options.model.name, "dense": options.dense and options.dense.name}
    settings.pop("json")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": about, "settings": settings, "rows": [asdict(row) for row in rows]}
    options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
