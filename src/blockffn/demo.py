"""The first five minutes: train a small sparse model on Python's own standard library, measure it, let it write."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockffn.settings import merge
from blockffn.training.config import train_settings
from blockffn.wording import counted

PROMPT = "def read_lines(path):\n"
MARKER = "demo.json"
VOCAB_SIZE = 2048
MAX_TRAINING_SECONDS = 170.0  # of the five minutes, whatever the machine


def run_demo(
    out: Path,
    *,
    with_dense: bool = False,
    changes: dict[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo in `out` and return its summary (losses in nats a token, shares in percent, times in seconds).

    Args:
        with_dense: train the dense twin too: same size, tokens, seed and schedule.
        changes: settings of the run to change, nested as in `train_settings`.
        say: receives a line of text at each stage.

    Raises:
        ValueError: `out` holds something that is not an earlier demo.
    """
    from blockffn.data.prepare import load_manifest, prepare
    from blockffn.evaluation.run import evaluate_run, load_run
    from blockffn.evaluation.sample import generate_sample
    from blockffn.reporting import write_report
    from blockffn.training.loop import train

    begin = time.perf_counter()
    for key in ("size", "method"):
        if key in (changes or {}):
            raise ValueError(f"the demo decides {key} itself; to choose it, use blockffn train")
    base = {"data": {"folders": {str(out / "data"): 1.0}}, "max_seconds": MAX_TRAINING_SECONDS}
    methods = ["blockffn", "dense"] if with_dense else ["blockffn"]
    # Before an earlier demo is removed: a misspelt setting must not cost it.
    chosen = {method: train_settings("nano", method, merge(base, changes or {})) for method in methods}
    _make_room(out)
    if (out / "data" / "manifest.json").is_file():
        say("reading the text prepared by an earlier demo")
    else:
        say("tokenising the Python standard library")
        prepare(["stdlib"], out / "data", vocab_size=VOCAB_SIZE, progress=False)
    split = load_manifest(out / "data").splits["train"]
    say(f"{counted(split.tokens, 'token')} of training text, {split.bytes / 1e6:.1f} MB")

    summary: dict[str, Any] = {}
    for method, settings in chosen.items():
        run = out / method
        if method == "dense":  # the same tokens, however many the time sufficed for
            settings = replace(settings, steps=summary["steps"], max_seconds=None)
        say(
            f"training {method}: {counted(settings.steps, 'step')}; the first compiles the model, which takes "
            "half a minute"
        )
        result = train(settings, run, progress=progress)
        if result.interrupted:
            raise KeyboardInterrupt
        if result.step < settings.steps:
            say(f"stopped after {result.step} of {counted(settings.steps, 'step')} to stay within five minutes")
        say("scoring held-out text")
        evaluation = evaluate_run(run, max_rows=settings.evaluate_rows * 8)
        (run / "evaluation.json").write_text(json.dumps(evaluation.to_dict(), indent=1))
        if method == "dense":
            summary["dense_heldout_loss"] = evaluation.heldout_loss
            summary["dense_perplexity"] = evaluation.perplexity
            summary["loss_difference"] = 100 * (summary["heldout_loss"] / evaluation.heldout_loss - 1)
            twin = {"heldout_loss": evaluation.heldout_loss, "perplexity": evaluation.perplexity,
                    "tokens_per_second": _median_rate(run)}  # fmt: skip
            (run / "summary.json").write_text(json.dumps(twin, indent=1))
            continue
        model, tokenizer = load_run(run)
        say("writing a sample")
        sample = generate_sample(model, tokenizer, PROMPT, max_new_tokens=160)
        (run / "sample.json").write_text(json.dumps(sample, indent=1))
        report = evaluation.sparsity
        assert report is not None
        summary |= {
            "heldout_loss": evaluation.heldout_loss,
            "perplexity": evaluation.perplexity,
            "bits_per_byte": evaluation.bits_per_byte,
            "tls": report.tls,
            "cls8": report.cls[8],
            "reuse_ratio": report.reuse_ratio,
            "tokens_per_second": _median_rate(run),
            "generated_tokens_per_second": sample["tokens_per_second"],
            "parameters": evaluation.cost["parameters"],
            "steps": result.step,
            "training_tokens": result.tokens,
            "sample": sample["text"],
        }
    summary["seconds"] = time.perf_counter() - begin
    (out / "blockffn" / "summary.json").write_text(json.dumps(summary, indent=1))  # which the report reads
    page = write_report(out / "blockffn", twin=out / "dense" if with_dense else None, title="blockffn demo")
    summary |= {"report": str(page), "seconds": time.perf_counter() - begin}
    (out / MARKER).write_text(json.dumps(summary, indent=1))
    return summary


def _make_room(out: Path) -> None:
    """Remove the runs of an earlier demo; refuse a folder that is not one."""
    if not out.exists():
        out.mkdir(parents=True)
    elif any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"{out} is not empty and not an earlier demo; choose another folder with --out")
    (out / MARKER).write_text("{}")
    for method in ("blockffn", "dense"):
        shutil.rmtree(out / method, ignore_errors=True)


def _median_rate(run: Path) -> float:
    """Tokens a second of training; the first line, in which the model compiles, does not count."""
    from blockffn.training.results import read_metrics

    records = read_metrics(run)
    rates = sorted(record["tokens_per_second"] for record in records[1:] or records)
    return rates[len(rates) // 2]
