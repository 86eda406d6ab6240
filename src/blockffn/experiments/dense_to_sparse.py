"""A dense model to a sparse one, recovered from its own predictions, and measured beside the original: as commands.

Every stage is a command in a process of its own and leaves a file or folder; what is there is not made again, and
training goes on from its checkpoint. The record is one JSON file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.experiments.command import RECORDS, WORK_LEFT
from blockffn.experiments.records import machine_facts, read_json
from blockffn.experiments.schedule import Task, device_slots, run_tasks
from blockffn.experiments.stages import BLOCKFFN, Stage

SUITE = "dense-to-sparse"
# Fields of `Recovery` that are options of the command line and belong to a record.
OPTIONS = ("experts", "num_experts", "start_sparsity", "sparsity", "chunk_sparsity", "documents", "new_tokens",
           "write_batch_size", "own_share", "steps", "batch_size", "micro_batch_size", "sequence_length")  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """What is to be made, and of what.

    Attributes:
        model: the dense model, a folder or a `.gguf` file.
        text: sources for `blockffn prepare`; valid: sources that are held out.
        experts, num_experts, start_sparsity: as `blockffn convert --from-dense` takes them.
        sparsity, chunk_sparsity: of a token and of eight in a row, which training steers to, in percent.
        documents, new_tokens, write_batch_size: how much text the dense model writes, and how many documents at once.
        own_share: share of that text in training; with 0 none is written.
        steps, batch_size, micro_batch_size, sequence_length: of training.
        changes: further settings, `KEY=VALUE`.
    """

    model: Path
    text: tuple[Path, ...]
    valid: tuple[Path, ...]
    work: Path
    eval_data: Path | None = None
    experts: str = "gated"
    num_experts: int = 24
    start_sparsity: float = 40.0
    sparsity: float = 65.0
    chunk_sparsity: float = 50.0
    documents: int = 4096
    new_tokens: int = 240
    write_batch_size: int = 2048
    own_share: float = 0.3
    steps: int = 2400
    batch_size: int = 16
    micro_batch_size: int = 8
    sequence_length: int = 2048
    eval_limit: int | None = None
    device: str | None = None
    changes: tuple[str, ...] = ()
    program: tuple[str, ...] = BLOCKFFN


def stages(recovery: Recovery) -> list[Stage]:
    """All stages in order, done or not."""
    r, work = recovery, recovery.work
    dense, sparse, run, books, own = (work / name for name in ("dense", "sparse", "run", "text", "own"))
    found = [
        _stage(r, "dense", dense / "config.json", "convert", r.model, "--from-dense", "--experts", "none",
               "--dtype", "bfloat16", "--out", dense),
        _stage(r, "text", books, "prepare", *r.text, *_repeated("--valid", r.valid), "--tokenizer", dense,
               "--out", books, device=False),
        _stage(r, "write", work / "own.jsonl", "write", dense, "--data", books, "--documents", r.documents,
               "--max-new-tokens", r.new_tokens, "--batch-size", r.write_batch_size, "--out", work / "own.jsonl"),
        _stage(r, "own text", own, "prepare", work / "own.jsonl", "--tokenizer", dense, "--out", own, device=False),
        _stage(r, "convert", sparse / "config.json", "convert", dense, "--from-dense", "--experts", r.experts,
               "--num-experts", r.num_experts, "--sparsity", r.start_sparsity, "--data", books, "--out", sparse,
               "--json", work / "receipt.json"),
        _training(r, sparse, dense, run, {books: 1 - r.own_share, own: r.own_share}),
    ]  # fmt: skip
    if not r.own_share:
        found = [stage for stage in found if stage.name not in ("write", "own text")]
    for name, path in (("dense", dense), ("recovered", run)):
        against = ("--against", dense) if name == "recovered" else ()
        out = work / f"{name}-evaluation.json"
        found.append(_stage(r, f"evaluate {name}", out, "evaluate", path, "--data", books, "--sequence-length",
                            r.sequence_length, "--max-rows", 128, *against, "--json", out))  # fmt: skip
    for name, path in (("dense", dense), ("recovered", run)):
        if r.eval_data is not None:
            out, limit = work / f"{name}-zero-shot.json", () if r.eval_limit is None else ("--limit", r.eval_limit)
            found.append(_stage(r, f"zero-shot {name}", out, "zero-shot", path, "--tasks-dir", r.eval_data, *limit,
                                "--json", out))  # fmt: skip
    out = work / "decode.json"
    found.append(_stage(r, "decode", out, "bench", "decode", run, "--dense", dense, "--draft", "none", "--per-task", 1,
                        "--max-prompt-tokens", 64, "-n", 64, "--json", out))  # fmt: skip
    return found


def summary(work: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The record: the receipt of all stages, and the two models side by side."""
    receipt = read_json(work / "receipt.json")
    # The two took turns in one run: medians over the kinds of prompts.
    rates = {
        way["way"]: statistics.median(rate["tokens_per_second"] for rate in way["rates"])
        for way in read_json(work / "decode.json")["results"]
    }
    models: dict[str, Any] = {}
    for name in ("dense", "recovered"):
        measured = read_json(work / f"{name}-evaluation.json")
        row = {key: measured.get(key) for key in ("perplexity", "bits_per_byte", "tls", "reuse_ratio", "against")}
        row |= {"cls8": measured.get("cls", {}).get("8"), "cost": measured["cost"]}
        row["decode_tokens_per_second"] = rates["dense, plain" if name == "dense" else "sparse, plain"]
        scores = work / f"{name}-zero-shot.json"
        if scores.is_file():
            tasks = read_json(scores)["tasks"]
            row["zero_shot"] = {
                task: {key: value for key, value in one.items() if isinstance(value, (int, float))}
                for task, one in tasks.items()
            }
        models[name] = {key: value for key, value in row.items() if value is not None}
    trained = read_json(work / "run" / "train.json")
    training = {key: trained[key] for key in ("step", "tokens", "seconds")}
    return {"outcome": "done", **facts, "receipt": receipt, "training": training, "models": models}


def main(description: str, arguments: Sequence[str] | None = None, *, program: tuple[str, ...] = BLOCKFFN) -> int:
    """Run what is left, as the command line says; returns the exit status (0 done, 1 failed, 3 time is up)."""
    given = _parse(description, arguments)
    recovery = Recovery(
        **{name: value for name, value in vars(given).items() if name in Recovery.__dataclass_fields__},
        program=program,
    )  # fmt: skip
    left = [stage for stage in stages(recovery) if not stage.makes.exists()]
    if given.list:
        print("\n".join(f"{stage.name}: {shlex.join(stage.command)}" for stage in left))
        return 0
    record = given.records / SUITE / f"{given.name}.json"
    facts = {"name": given.name, "model": given.model.name, "settings": _settings(recovery),
             **machine_facts(gpu=given.device != "cpu")}  # fmt: skip

    def finish() -> None:
        record.parent.mkdir(parents=True, exist_ok=True)
        found = _without(str(recovery.work), summary(recovery.work, facts))
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if left:
        task = Task(given.name, [(s.name, s.command) for s in left], log=recovery.work / "log.txt", finish=finish)
        slot = device_slots(0 if given.device == "cpu" else 1, 1)
        outcome = run_tasks([task], slot, stop_after=given.stop_after, say=_say)
        if outcome.failed:
            return 1
        if outcome.stopped or outcome.waiting:
            print("time is up; the same command goes on")
            return WORK_LEFT
    else:
        finish()
    print(f"recorded in {record}")
    return 0


def _settings(recovery: Recovery) -> str:
    """The kind of experts, and every setting that is not the default, as the command line takes it."""
    changed = [
        word
        for name in OPTIONS[1:]
        if getattr(recovery, name) != Recovery.__dataclass_fields__[name].default
        for word in (_flag(name), f"{getattr(recovery, name):.12g}")
    ]
    return shlex.join([recovery.experts, *changed, *recovery.changes])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _without(work: str, value: Any) -> Any:
    """The same data, in which paths below the work folder begin with WORK."""
    if isinstance(value, dict):
        return {key: _without(work, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without(work, one) for one in value]
    if isinstance(value, str) and (value == work or value.startswith(f"{work}/")):
        return "WORK" + value[len(work) :]
    return value


def _training(r: Recovery, sparse: Path, dense: Path, run: Path, data: dict[Path, float]) -> Stage:
    ends = ("--out", run, "--json", run / "train.json")
    if any((run / "checkpoints").glob("step-*/state.json")):
        return _stage(r, "train", run / "model", "train", "--resume", *ends)
    ramp = {"kind": "set_point", "interval": 10, "response_steps": 100, "target_ramp_steps": r.steps // 2,
            "warmup_steps": min(50, r.steps // 4)}  # fmt: skip
    # Entropy makes single tokens sparse. Chunk sparsification, steered this far, switches experts off for all of them
    # (docs/log.md), so that of the preset is off; so does locality, which is therefore bounded, and dead experts are
    # lifted. Learning from the teacher makes the router denser at first, so entropy does not start low.
    terms: dict[str, Any] = {
        "chunk_sparsification": None,
        "router_entropy": {**ramp, "initial": 0.02, "maximum": 0.3, "target": r.sparsity, "observes": "tls"},
        "activation_locality": {
            **ramp,
            "initial": 1e-4,
            "maximum": 2e-3,
            "target": r.chunk_sparsity,
            "observes": "cls8",
        },
        "dead_experts": {"kind": "constant", "value": 0.01},
    }
    settings = (
        f"steps={r.steps}", f"batch_size={r.batch_size}", f"micro_batch_size={r.micro_batch_size}",
        f"data.sequence_length={r.sequence_length}", "optimizer.learning_rate=0.0005", "optimizer.weight_decay=0.01",
        "optimizer.router_learning_rate=0.001", f"schedule.warmup_steps={min(100, r.steps // 10)}",
        f"checkpoint_every={max(1, r.steps // 8)}", f"objectives.terms={json.dumps(terms)}",
    )  # fmt: skip
    mixture = [f"{folder}={share:g}" for folder, share in data.items() if share > 0]
    return _stage(r, "train", run / "model", "train", "--preset", "mini", "--start-from", sparse, "--teacher", dense,
                  *_repeated("--data", mixture), *ends, *settings, *r.changes)  # fmt: skip


def _stage(r: Recovery, name: str, makes: Path, *words: Any, device: bool = True) -> Stage:
    where = ["--device", r.device] if device and r.device is not None else []
    return Stage(name, [*r.program, *map(str, words), *where], makes)


def _repeated(option: str, values: Sequence[Any]) -> list[Any]:
    return [word for value in values for word in (option, value)]


def _parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings of training to change")
    parser.add_argument("--model", type=Path, required=True, help="the dense model: a folder, or a .gguf file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="as blockffn prepare takes it")
    parser.add_argument("--valid", type=Path, nargs="*", default=[], help="text that is held out")
    parser.add_argument("--name", default="smollm2-135m", help="of the record")
    parser.add_argument("--work", type=Path, default=Path("runs/dense-to-sparse"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--eval-data", type=Path, help="folder with blimp.jsonl.xz and lambada.jsonl.xz")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="then stop with a checkpoint")
    parser.add_argument("--list", action="store_true", help="say what is left to do, and stop")
    defaults = Recovery.__dataclass_fields__
    for name in OPTIONS:
        default = defaults[name].default
        parser.add_argument(_flag(name), type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--eval-limit", type=int, help="first so many pairs and passages only")
    given = parser.parse_intermixed_args(arguments)
    if not 0 <= given.own_share <= 1:
        parser.error(f"--own-share must lie between 0 and 1, got {given.own_share}")
    given.text, given.valid, given.changes = tuple(given.text), tuple(given.valid), tuple(given.changes)
    return given


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
