"""Run folders with made-up numbers that look like a real run's; `python fake_runs.py FOLDER` writes two."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

CONFIG = """\
preset: nano
method: blockffn
model:
  hidden_size: 192
  num_hidden_layers: 4
  num_experts: 32
  router_type: relu_rmsnorm
data:
  corpus: stdlib
  sequence_length: 256
training:
  steps: 1200
  learning_rate: 0.01
  objectives:
    activation_locality: 0.002
    chunk_sparsification: 0.05
seed: 2345
"""
WINDOWS = (1, 2, 4, 8, 16, 32, 64)
PROMPT = "def read_lines(path):\n"
CONTINUATION = (
    '    """Return the lines of *path* as a list of strings."""\n'
    "    lines = []\n"
    "    with open(path, encoding='utf-8') as file:\n"
    "        for line in file:\n"
    "            if not line.strip():\n"
    "                continue\n"
    "            lines.append(line.rstrip('\\n'))\n"
    "    return lines\n\n\n"
    "class Reader(Base):\n"
    "\tdef __init__(self, stream, *, limit=None):\n"
    "        if limit is not None and limit < 0:\n"
    '            raise ValueError(f"limit must be positive, got {limit}; costs $5 & <b>more</b>")\n'
    "        self._stream = stream\n"
)


def write_fake_run(
    folder: Path,
    *,
    dense: bool = False,
    layers: int = 4,
    experts: int = 32,
    steps: int = 1200,
    continuation: str = CONTINUATION,
    seed: int = 1,
) -> Path:
    """Write all five files of a run and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(seed)
    (folder / "config.yaml").write_text(CONFIG.replace("method: blockffn", "method: dense") if dense else CONFIG)
    rows = [metrics_row(step, dense) for step in range(10, steps + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = evaluation_data(dense, layers, experts)
    summary = {
        "heldout_loss": evaluation["heldout_loss"], "perplexity": evaluation["perplexity"], "tls": evaluation["tls"],
        "cls8": None if dense else evaluation["cls"]["8"], "reuse_ratio": evaluation["reuse_ratio"],
        "tokens_per_second": 22843.7 if dense else 19214.2, "seconds": 231.4, "parameters": 2_790_912, "steps": steps,
    }  # fmt: skip
    for name, data in (
        ("evaluation", evaluation),
        ("sample", sample_data(dense, experts, continuation)),
        ("summary", summary),
    ):
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def metrics_row(step: int, dense: bool = False) -> dict[str, Any]:
    t = step / 1200
    loss = 2.31 + 5.3 * math.exp(-9 * t) + 0.5 * math.exp(-2 * t) + random.gauss(0, 0.05) - (0.03 if dense else 0)
    row: dict[str, Any] = {"step": step, "tokens": step * 4096, "seconds": step * 0.19, "tokens_per_second": 21000.0,
                           "lr": 0.01, "loss": loss, "language_model_loss": loss, "terms": {}, "coefficients": {},
                           "tls": None, "cls8": None, "dead_experts": 0, "grad_norm": 0.8}  # fmt: skip
    if not dense:
        tls = 79 - 31 * math.exp(-4 * t) + random.gauss(0, 0.6)
        locality, chunk = 0.1 + 0.35 * math.exp(-3 * t) + random.gauss(0, 0.01), 0.42 + 0.3 * math.exp(-3 * t)
        factor = min(0.05 * 1.05 ** (step // 100), 0.08)
        row |= {"terms": {"activation_locality": locality, "chunk_sparsification": chunk}, "tls": tls,
                "coefficients": {"activation_locality": 0.002, "chunk_sparsification": factor},
                "cls8": tls - 16 - 14 * math.exp(-3 * t) + random.gauss(0, 0.8)}  # fmt: skip
        row["loss"] = loss + 0.002 * locality + 0.05 * chunk
    return row


def evaluation_data(dense: bool, layers: int, experts: int) -> dict[str, Any]:
    loss = 2.284 if dense else 2.327
    data: dict[str, Any] = {
        "heldout_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 2.9,
        "tokens": 262144, "tls": None, "cls": None, "reuse_ratio": None, "layers": [], "sources": {},
    }  # fmt: skip
    for name, share in (("stdlib", 0.7), ("stdlib tests", 0.2), ("docs", 0.1)):
        data["sources"][name] = {"tokens": int(262144 * share), "loss": loss + random.gauss(0, 0.2)}
    if dense:
        return data
    per_layer = []
    for layer in range(layers):
        use = sorted((min(97.0, 100 * random.betavariate(0.5, 1.8)) for _ in range(experts)), reverse=True)
        if layer == 1:
            use[-2:] = [0.0, 0.0]
        random.shuffle(use)
        tls = 100 - sum(use) / experts
        per_layer.append({"tls": tls, "cls": fake_cls(tls), "reuse_ratio": 84 + 3 * random.random() + layer / layers,
                          "expert_use": use, "dead_experts": sum(value == 0 for value in use)})  # fmt: skip
    data["layers"] = per_layer
    data["tls"] = sum(layer["tls"] for layer in per_layer) / layers
    data["cls"] = fake_cls(data["tls"])
    data["reuse_ratio"] = sum(layer["reuse_ratio"] for layer in per_layer) / layers
    for source in data["sources"].values():
        tls = data["tls"] + random.gauss(0, 2)
        source |= {"tls": tls, "cls": fake_cls(tls), "reuse_ratio": 86.0}
    return data


def fake_cls(tls: float) -> dict[str, float]:
    return {str(window): tls - 5.6 * math.log2(window) for window in WINDOWS}


def sample_data(dense: bool, experts: int, continuation: str) -> dict[str, Any]:
    tokens = []
    for text, generated in ((PROMPT, False), (continuation, True)):
        while text:
            size = random.choice((1, 2, 3, 4, 5))
            piece, text = text[:size], text[size:]
            share = None if dense else min(60.0, max(8.0, random.gauss(30 if piece.strip().isidentifier() else 16, 5)))
            active = None if share is None else share / 100 * experts
            tokens.append({"text": piece, "generated": generated, "active_experts": active, "active_share": share})
    return {"prompt": PROMPT, "tokens": tokens, "num_experts": None if dense else experts, "tokens_per_second": 412.7}


if __name__ == "__main__":
    write_fake_run(Path(sys.argv[1]) / "run")
    write_fake_run(Path(sys.argv[1]) / "dense", dense=True, seed=2)
