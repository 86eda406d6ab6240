"""Trees cut by cost against fixed trees and chains, decoding for real: `tree_simulation.py` is the simulation.

    python benchmarks/tree_sweep.py /tmp/synthetic-0.8b --dense /tmp/synthetic-0.8b-dense --precisions bf16 int4 \\
        --drafts oracle:0.4 oracle:0.75 oracle:0.9 oracle:0.97,0.03 --json tree-sweep.json --plot tree-sweep.png
    python benchmarks/tree_sweep.py models/mini-books --precisions int4 --drafts ngram models/mini-books/draft

A regime is a model, a precision and a draft: one that is right at some rate (simulated acceptance, the time of a real
head of random weights), or at several in turn, a passage of the text each; n-grams; or a trained draft's folder. In
every regime plain decoding, trees and chains of several fixed sizes and the tree that is cut by cost take turns on the
same prompts; all drafts are right at the same places. `gain` is the tree by cost over the best fixed size or chain of
the regime, which nobody knows in advance and which plain decoding is one of, and over plain decoding.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from blockffn.checkpoints.load import load
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.evaluation.decoding.modes import BY_COST, FIXED, PLAIN, Subject
from blockffn.evaluation.decoding.prompts import EncodedPrompt, Prompt, encode_prompts, own_prompts, text_pieces
from blockffn.evaluation.decoding.rounds import Rate, WayResult, time_ways
from blockffn.evaluation.machine import describe_machine
from blockffn.inference.backends import make_target
from blockffn.reporting import chart
from blockffn.reporting.chart import BLUE, GREEN, GREY, MUTED, styled

FIXED_SIZES = ("1", "3", "7", "15", "31", "chain:2", "chain:3", "chain:5", "chain:8")


@dataclass(frozen=True)
class Sweep:
    """A regime's result. Rates are new tokens per second.

    Attributes:
        fixed: by draft tokens or `chain:N`, and `plain`. by_cost: of the tree that is cut. tree_size: its mean.
        best_fixed: the size with the highest rate. gain, gain_over_plain: of the tree by cost, medians of the rounds'.
        gain_of_rounds: the lowest and the highest.
    """

    model: str
    precision: str
    draft: str
    fixed: dict[str, float]
    by_cost: float
    tree_size: float
    acceptance_length: float
    best_fixed: str
    gain: float
    gain_over_plain: float
    gain_of_rounds: tuple[float, float]


def summarise(model: str, precision: str, draft: str, results: Sequence[WayResult]) -> Sweep:
    """From the timed ways of a regime, the tree by cost being the baseline of their ratios."""
    fixed: dict[str, float] = {}
    rates: dict[str, Rate] = {}
    cut = next(result for result in results if result.way.endswith(BY_COST))
    for result in results:
        if result is cut:
            continue
        size = PLAIN if result.way.endswith(PLAIN) else result.way.rpartition(f"{FIXED} ")[2]
        fixed[size], rates[size] = result.overall.tokens_per_second, result.overall
    ratios = {size: _known(rate.ratio) for size, rate in rates.items()}
    best = max(ratios, key=lambda size: ratios[size])
    assert cut.tree_size is not None
    assert cut.overall.acceptance_length is not None
    return Sweep(
        model,
        precision,
        draft,
        fixed,
        cut.overall.tokens_per_second,
        cut.tree_size,
        cut.overall.acceptance_length,
        best,
        gain=1 / ratios[best],
        gain_over_plain=1 / ratios[PLAIN],
        gain_of_rounds=(1 / _known(rates[best].highest_ratio), 1 / _known(rates[best].lowest_ratio)),
    )


def _known(ratio: float | None) -> float:
    assert ratio is not None
    return ratio


def sweep_regime(
    subject: Subject, precision: str, draft: str, prompts: Sequence[EncodedPrompt], *, tokens: int, rounds: int,
    sizes: Sequence[str] = FIXED_SIZES,
) -> Sweep:  # fmt: skip
    """Time one regime."""
    subject.draft = draft
    ways = [subject.plain(), *(subject.speculating(tree=size) for size in sizes), subject.speculating(tree="auto")]
    for way in ways:
        text = way.run(prompts[0].ids, tokens).token_ids  # also what is done once
        if text != subject.continuations[prompts[0].ids]:
            raise ValueError(f"{way.name} says something else than plain decoding; it is not timed")
    results = time_ways(ways, prompts, max_new_tokens=tokens, rounds=rounds, baseline=ways[-1].name)
    return summarise(subject.label, precision, draft, results)


@styled
def draw(rows: Sequence[dict[str, Any]], machine: str) -> Figure:
    """One panel a model and precision: rates by draft, fixed sizes thin, the tree by cost thick."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["precision"]), []).append(row)
    figure = chart.blank(0.4 + 2.4 * -(-len(groups) // 2))
    panels = figure.subplots(-(-len(groups) // 2), min(2, len(groups)), squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, ((model, precision), own) in zip(panels.flat, groups.items()):
        x = list(range(len(own)))
        ends = []
        for size in own[0]["fixed"]:
            y = [row["fixed"][size] for row in own]
            color = BLUE if size == PLAIN else GREY
            axes.plot(x, y, "o-", color=color, markersize=2.5, linewidth=1.0)
            ends.append((y[-1], size, color))
        y = [row["by_cost"] for row in own]
        axes.plot(x, y, "o-", color=GREEN, markersize=4, linewidth=2.2)
        ends.append((y[-1], "by cost", GREEN))
        axes.set_ylim(0, 1.1 * max(max(*row["fixed"].values(), row["by_cost"]) for row in own))
        axes.set_title(f"{model}, {precision}: new tokens per second")
        axes.set_xticks(x, [row["draft"] for row in own])
        axes.set_xlabel("draft; of a simulated one the rate at which its first choice is right")
        chart.end_labels(axes, ends)
    figure.supxlabel(f"numbers: draft tokens of a fixed tree. {machine}", size=7, color=MUTED)
    return figure


def chosen_prompts(options: argparse.Namespace) -> list[Prompt]:
    """Our own, one of each kind, and pieces of a text."""
    pieces = [] if options.text is None else text_pieces(options.text, count=options.prompts, characters=600)
    return [*own_prompts(per_task=1)[: options.prompts], *pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dense", type=Path, help="a dense model, swept as well")
    parser.add_argument("--drafts", nargs="+", default=[f"oracle:{rate}" for rate in ("0.4", "0.6", "0.8", "0.9")])
    parser.add_argument("--precisions", nargs="+", default=["auto"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sizes", nargs="+", default=list(FIXED_SIZES), metavar="N|chain:N")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--text", type=Path, help="a text whose pieces are continued as well, as many as --prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = []
    machine = describe_machine(torch.device("cpu" if not torch.cuda.is_available() else "cuda"))
    columns = "".join(f"{size:>8}" for size in (PLAIN, *options.sizes))
    print(f"{'new tokens/s':<32}{columns}{'by cost (nodes)':>18}{'over best':>11}{'over plain':>11}")
    for path in (options.model, *([options.dense] if options.dense else [])):
        model = load(path, device="cuda" if torch.cuda.is_available() else "cpu")
        label = "dense" if model.config.ffn_type == "dense" else "sparse"
        prompts = encode_prompts(load_tokenizer(path), chosen_prompts(options), max_tokens=160)
        for precision in options.precisions:
            capacity = 160 + options.tokens + 64
            target = make_target(model, backend=options.backend, precision=precision, capacity=capacity)
            subject = Subject(label, model, target)
            subject.learn(prompts, options.tokens)
            for draft in options.drafts:
                row = sweep_regime(
                    subject, precision, draft, prompts, tokens=options.tokens, rounds=options.rounds,
                    sizes=options.sizes,
                )  # fmt: skip
                rows.append(asdict(row))
                rates = "".join(f"{row.fixed[size]:>8.1f}" for size in (PLAIN, *options.sizes))
                cut = f"{row.by_cost:.1f} ({row.tree_size:.1f})"
                gains = f"{row.gain:>10.2f}×{row.gain_over_plain:>10.2f}×"
                print(f"{f'{label}, {precision}, {draft}':<32}{rates}{cut:>18}{gains}", flush=True)
    over = [row["gain"] for row in rows]
    print(f"over the best fixed size: {min(over):.2f} … {max(over):.2f}, median {statistics.median(over):.2f}")
    if options.json is not None:
        about = {"device": machine, "torch": torch.__version__, "python": platform.python_version(),
                 "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
        settings = {"tokens": options.tokens, "prompts": options.prompts, "rounds": options.rounds,
                    "model": options.model.name, "backend": options.backend,
                    "text": None if options.text is None else options.text.name}  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1) + "\n")
    if options.plot is not None:
        draw(rows, machine).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
