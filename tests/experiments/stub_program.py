"""Stands in for `blockffn`: leaves the files that it would leave, at once. What a run should do is in its overrides.

`seed=13` fails; `seed=7` waits for SIGINT, leaves a checkpoint, and succeeds when resumed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

FACTS = {"step": 4, "tokens": 4096, "seconds": 2.0}


def train(run: Path, configs: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    if "seed=13" in sys.argv:
        sys.exit("error: the loss is nan at step 3")
    shutil.copy(configs / f"{run.name}.yaml", run / "config.yaml")
    row = {"step": 4, "tokens": 4096, "language_model_loss": 2.5, "tokens_per_second": 2000.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    if "seed=7" in sys.argv:
        signal.signal(signal.SIGINT, lambda *_: checkpoint_and_stop(run))
        (run / "waiting").touch()
        time.sleep(60)
    (run / "model").mkdir()
    (run / "train.json").write_text(json.dumps(FACTS))


def checkpoint_and_stop(run: Path) -> None:
    state = run / "checkpoints" / "step-00000004" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    sys.exit(130)


if __name__ == "__main__":
    configs, verb, *arguments = sys.argv[1:]
    if verb == "train":
        train(Path(arguments[arguments.index("--out") + 1]), Path(configs))
    elif verb == "evaluate":
        (Path(arguments[0]) / "evaluation.json").write_text(json.dumps({"heldout_loss": 2.5, "perplexity": 12.18}))
    elif verb == "analyze":
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({"findings": {"reuse_ratio": 91.5}}))
    elif verb == "zero-shot":
        scores = {"model": "x", "tasks": {"blimp": {"accuracy": 60.5, "paradigms": {"a": {}}}}}
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(scores))
