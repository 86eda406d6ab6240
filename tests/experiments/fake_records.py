"""Records with made-up numbers that look like real ones: `python -m tests.experiments.fake_records FOLDER`."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from blockffn.experiments.suite import Experiment

WINDOWS = (1, 2, 4, 8, 16, 32, 64)
# perplexity, TLS, CLS8
METHODS = {
    "blockffn": (27.4, 81.0, 72.0), "dense": (27.3, None, None), "topk": (29.9, 83.3, 48.0),
    "deepseek": (28.8, 83.3, 50.0), "grin": (28.6, 83.3, 51.5), "remoe": (27.5, 80.2, 42.4), "deco": (27.6, 80.1, 55.0),
}  # fmt: skip
SETTINGS = {
    "cs": (28.4, 81.7, 67.6), "al": (27.4, 63.6, 52.6), "none": (27.3, 48.6, 14.9), "al-l1": (28.2, 79.9, 65.2),
    "al-entropy": (28.8, 81.1, 69.1), "l1": (27.6, 79.4, 45.1), "entropy": (27.7, 79.0, 45.8),
    "relu": (27.9, 79.5, 69.0), "gated": (27.8, 28.4, 25.4),
}  # fmt: skip


def write_fake_record(
    records: Path, experiment: Experiment, *, steps: int = 2000, zero_shot: bool = True, layers: int = 8
) -> Path:
    """Write a finished record and return its folder."""
    key = experiment.name.partition("-")[2]
    perplexity, tls, cls8 = SETTINGS.get(key) or METHODS.get(experiment.method, (28.0, 80.0, 70.0))
    draw = random.Random(experiment.name)
    perplexity *= 1 + draw.gauss(0, 0.002)
    loss = math.log(perplexity)
    folder = records / experiment.suite / experiment.name
    folder.mkdir(parents=True)
    experts = next((int(c.split("=")[1]) for c in experiment.changes if c.startswith("model.num_experts=")), 48)
    cls = {} if tls is None else {str(w): max(0.0, tls - (tls - cls8) / 3 * math.log2(w)) for w in WINDOWS}
    layer = {"tls": tls, "cls": cls, "reuse_ratio": 88.0, "dead_experts": 1, "expert_use": [20.0] * experts}
    evaluation = {
        "heldout_loss": loss, "perplexity": perplexity, "bits_per_byte": 1.2, "tokens": 1_000_000, "tls": tls,
        "cls": cls, "reuse_ratio": None if tls is None else 88.0, "layers": [] if tls is None else [layer] * layers,
        "cost": {"non_embedding_parameters": 34_000_000, "active_parameters": 34e6 * (1 if tls is None else 0.4)},
    }  # fmt: skip
    record = {
        "outcome": "done", "label": experiment.label, "method": experiment.method, "size": experiment.size,
        "seed": experiment.seed, "command": "blockffn train …", "data": {"name": "books", "fingerprint": "0" * 64},
        "date": "2026-01-02", "gpu": "NVIDIA H100", "machine": "Linux x86_64", "python": "3.12.1", "torch": "2.11.0",
        "runs_per_device": 2, "steps": steps, "tokens": steps * 131072, "seconds": 512.3, "tokens_per_second": 511_876,
    }  # fmt: skip
    rows = []
    for step in range(20, steps + 1, 20):
        t = step / steps
        fall = 4 * math.exp(-14 * t) + 0.6 * math.exp(-3 * t) + draw.gauss(0, 0.01)
        row = {"step": step, "tokens": step * 131072, "language_model_loss": loss + fall, "tokens_per_second": 5e5}
        if tls is not None and cls8 is not None:
            rise = 1 - 0.6 * math.exp(-5 * t)
            row |= {"tls": tls * rise + draw.gauss(0, 0.4), "cls8": cls8 * rise**2 + draw.gauss(0, 0.4)}
        rows.append(row)
    files = {"evaluation.json": json.dumps(evaluation), "record.json": json.dumps(record),
             "config.yaml": f"size: {experiment.size}\nmethod: {experiment.method}\nmodel:\n  num_experts: {experts}\n",
             "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}  # fmt: skip
    if zero_shot:
        tasks = {"blimp": {"accuracy": 63.0 + draw.random()}, "lambada": {"accuracy": 11.0 + draw.random()}}
        files["zero_shot.json"] = json.dumps({"tasks": tasks})
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def write_failed_record(records: Path, experiment: Experiment, error: str) -> None:
    folder = records / experiment.suite / experiment.name
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"outcome": "failed", "error": error}))


def write_all(records: Path, experiments: Sequence[Experiment]) -> None:
    for experiment in experiments:
        if not (records / experiment.suite / experiment.name).exists():
            write_fake_record(records, experiment)


if __name__ == "__main__":
    sys.path.insert(0, "experiments")
    import ablation
    import quality

    write_all(Path(sys.argv[1]), [*quality.experiments(), *ablation.experiments()])
