"""What reading the head coarsely first brings: greedy decoding with a screened head and with the whole one.

    python benchmarks/screened_head.py /tmp/synthetic-0.8b --heads bf16:int8 bf16:int4 int8:int4 --precision bf16
    python benchmarks/screened_head.py models/mini-books --unpack --text book.txt --heads bf16:int4 int8:int4

One target decodes both ways in turns on the same prompts, so that weights, memory and machine are the same, and says
the same tokens, which is checked. `read` is the share of the head that a step read as it is stored, beside the screen;
`whole` counts steps that fell back to the whole head. With `--ask N` steps need the N largest logits, as sampling with
top-k does.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from blockffn.checkpoints.load import load
from blockffn.checkpoints.quantize import unpack_model
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.evaluation.decoding.prompts import EncodedPrompt, encode_prompts, own_prompts, text_pieces
from blockffn.evaluation.decoding.rounds import time_ways
from blockffn.evaluation.decoding.ways import Decoder, Run
from blockffn.evaluation.machine import describe_machine
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.target import Step, Target
from blockffn.models.causal_lm import BlockFFNForCausalLM


class Asking(Target):
    """A target of which steps ask for so many of the largest logits; `None`: all."""

    def __init__(self, target: NativeTarget, best: int | None) -> None:
        self._target, self._best, self.vocab_size = target, best, target.vocab_size

    @property
    def length(self) -> int:
        return self._target.length

    @property
    def capacity(self) -> int:
        return self._target.capacity

    def reset(self) -> None:
        self._target.reset()
        self._target.ask_best(self._best)

    def prefill(self, tokens: Tensor) -> Step:
        return self._target.prefill(tokens)

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Step:
        return self._target.extend(tokens, parents)

    def commit(self, kept: Tensor) -> None:
        self._target.commit(kept)


@dataclass(frozen=True)
class Gain:
    """Rates are new tokens per second; the ratio is the median of the rounds'. Steps are of the screened way."""

    precision: str
    head: str
    screen: str
    whole_rate: float
    screened_rate: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    head_share: float
    whole_heads: int
    steps: int


def compare(
    model: BlockFFNForCausalLM,
    prompts: Sequence[EncodedPrompt],
    *,
    precision: str,
    head: str,
    screen: str,
    ask: int,
    max_new_tokens: int,
    rounds: int,
) -> Gain:
    """Time both ways.

    Raises:
        RuntimeError: a text differs.
    """
    capacity = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    format = None if precision == "auto" else precision
    target = NativeTarget(model, capacity=capacity, format=format, head_format=head, screen_head=screen)
    texts: dict[tuple[int, ...], list[int]] = {}
    screened: list[Run] = []

    def check(way: str, prompt: EncodedPrompt, run: Run) -> None:
        if texts.setdefault(prompt.ids, run.token_ids) != run.token_ids:
            raise RuntimeError(f"with the head in {head} screened in {screen} the text is another: {prompt.task}")
        if way == "screened":
            screened.append(run)

    ways = [Decoder("whole", Asking(target, None)), Decoder("screened", Asking(target, ask))]
    whole, other = time_ways(
        ways, prompts, max_new_tokens=max_new_tokens, rounds=rounds, baseline="whole", on_run=check
    )  # fmt: skip
    statistics = [run.statistics for run in screened if run.statistics is not None]
    steps = sum(s.steps for s in statistics)
    share = sum((s.head_share or 0.0) * s.steps for s in statistics) / steps
    rate = other.overall
    assert rate.ratio is not None
    assert rate.lowest_ratio is not None
    assert rate.highest_ratio is not None
    return Gain(
        precision, head, screen, whole.overall.tokens_per_second, rate.tokens_per_second, rate.ratio,
        rate.lowest_ratio, rate.highest_ratio, share, sum(s.whole_heads for s in statistics), steps,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--heads", nargs="+", default=["bf16:int8", "bf16:int4", "int8:int4"], help="HEAD:SCREEN")
    parser.add_argument("--precision", default="auto", help="of the other weights; auto: as they are stored")
    parser.add_argument("--unpack", action="store_true", help="a quantised model's weights become bf16 first")
    parser.add_argument("--text", type=Path, help="continue pieces of it instead of the package's own prompts")
    parser.add_argument("--prompts", type=int, default=2, help="of each kind, or of the text")
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", "-n", type=int, default=64)
    parser.add_argument("--ask", type=int, default=1, help="how many of the largest logits a step needs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load(options.model)
    if options.unpack:
        unpack_model(model, torch.bfloat16)
    count = options.prompts
    prompts = own_prompts(per_task=count) if options.text is None else text_pieces(options.text, count=count)
    encoded = encode_prompts(load_tokenizer(options.model), prompts, max_tokens=options.max_prompt_tokens)
    gains = []
    print("head   screen   whole tok/s  screened tok/s   ratio (of rounds)    read    whole of steps")
    for pair in options.heads:
        head, _, screen = pair.partition(":")
        with torch.no_grad():
            gain = compare(
                model, encoded, precision=options.precision, head=head, screen=screen, ask=options.ask,
                max_new_tokens=options.max_new_tokens, rounds=options.rounds,
            )  # fmt: skip
        gains.append(gain)
        print(
            f"{head:<6} {screen:<6} {gain.whole_rate:13.1f} {gain.screened_rate:15.1f}   {gain.ratio:.2f} "
            f"({gain.lowest_ratio:.2f}–{gain.highest_ratio:.2f})  {gain.head_share:8.1%}  "
            f"{gain.whole_heads} of {gain.steps}",
            flush=True,
        )
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
        settings |= {"model": options.model.name, "text": None if options.text is None else options.text.name}
        about = {
            "device": describe_machine(torch.device("cpu")), "torch": torch.__version__,
            "python": platform.python_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        report = {"machine": about, "settings": settings, "gains": [asdict(gain) for gain in gains]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
