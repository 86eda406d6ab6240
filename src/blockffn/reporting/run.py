"""A run folder, read and checked once, as plain values.

    config.yaml      the resolved configuration; shown as it is
    metrics.jsonl    one object per logged step: step, tokens, seconds, tokens_per_second, lr, loss, grad_norm,
                     language_model_loss, terms {name: value}, coefficients {name: value}, tls, cls8, dead_experts
    evaluation.json  heldout_loss, perplexity, bits_per_byte, tokens, tls, cls {window: value}, reuse_ratio,
                     layers [{tls, cls, reuse_ratio, expert_use, dead_experts}], sources {name: the same fields}
    sample.json      prompt, tokens [{text, generated, active_experts, active_share}], num_experts, tokens_per_second
    summary.json     flat headline numbers

Losses are in nats per token; `tls`, `cls`, `reuse_ratio`, `expert_use` and `active_share` are percentages. A dense run
has null or absent sparsity fields. Every file is optional, a folder with none of them is not a run.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("config.yaml", "metrics.jsonl", "evaluation.json", "sample.json", "summary.json")


@dataclass(frozen=True)
class Layer:
    """Sparsity of one layer on held-out text, in percent; `expert_use` is the share of tokens that use each expert."""

    tls: float | None
    cls: dict[int, float]
    reuse_ratio: float | None
    expert_use: list[float]
    dead_experts: int | None


@dataclass(frozen=True)
class Evaluation:
    """Quality and sparsity on held-out text, of the whole model, of each layer and of each source."""

    heldout_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: float | None
    tls: float | None
    cls: dict[int, float]
    reuse_ratio: float | None
    layers: list[Layer]
    sources: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SampleToken:
    """One token; `active_experts` is the mean over layers, `active_share` the same in percent; `None` when dense."""

    text: str
    generated: bool
    active_experts: float | None
    active_share: float | None


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, token by token."""

    tokens: list[SampleToken]
    num_experts: int | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `None` for a file that is not there. `notes` are remarks the reader should see."""

    name: str
    config: str | None
    metrics: list[dict[str, Any]] | None
    evaluation: Evaluation | None
    sample: Sample | None
    summary: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def headline(self) -> dict[str, Any]:
        """The summary's numbers, with those of the evaluation and of the log for what the summary does not hold."""
        rates = [row["tokens_per_second"] for row in (self.metrics or [])[1:] if row.get("tokens_per_second")]
        found: dict[str, Any] = {"tokens_per_second": statistics.median(rates)} if rates else {}
        if self.evaluation is not None:
            names = ("heldout_loss", "perplexity", "bits_per_byte", "tls", "reuse_ratio")
            found |= {name: getattr(self.evaluation, name) for name in names}
            found["cls8"] = self.evaluation.cls.get(8)
        return found | {key: value for key, value in (self.summary or {}).items() if value is not None}

    @property
    def dense(self) -> bool:
        """Whether the files say that nothing was routed: there are measurements, and none of them of sparsity."""
        measured = self.evaluation is not None or bool(self.metrics)
        sparse_log = any(row.get("tls") is not None for row in self.metrics or [])
        return measured and not sparse_log and self.headline.get("tls") is None


def load_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: no such folder, or none of the files in it, or a file is garbled (names file, line and field).
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run folder at {path}; give the folder that `blockffn train` wrote")
    if not any((path / name).is_file() for name in FILES):
        raise ValueError(f"{path} is not a run folder: it holds none of {', '.join(FILES)}")
    metrics, notes = _read_metrics(path / "metrics.jsonl")
    evaluation, sample = _read_object(path / "evaluation.json"), _read_object(path / "sample.json")
    file = path / "config.yaml"
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    return Run(
        name=path.resolve().name,
        config=config,
        metrics=metrics,
        evaluation=None if evaluation is None else _evaluation(evaluation, "evaluation.json"),
        sample=None if sample is None else _sample(sample, "sample.json"),
        summary=_read_object(path / "summary.json"),
        notes=notes + _early_end(config, metrics),
    )


def _early_end(config: str | None, metrics: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    """A remark if the log ends before the steps that were planned: for want of time, stopped, or still running."""
    planned = re.search(r"^steps: (\d+)$", config or "", re.MULTILINE)
    if planned is None or not metrics or metrics[-1]["step"] >= int(planned[1]):
        return ()
    return (f"Training is logged up to step {metrics[-1]['step']:,} of {int(planned[1]):,} that were planned.",)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    if not path.is_file():
        return None, ()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    lines = path.read_bytes().split(b"\n")  # the element after the last newline is empty unless the file was cut
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                notes.append(
                    f"The last line of {path.name} (line {number}) is cut off and was skipped: the run was killed."
                )
                break
            raise ValueError(f"{path}:{number}: not JSON ({error}); delete the line or restore the file") from None
        _check_metrics_row(row, f"{path}:{number}")
        if rows and row["step"] <= rows[-1]["step"]:
            # A resumed run repeats the steps after its checkpoint; the later log is the one that led to the result.
            notes.append(f"The run was resumed and logged step {row['step']} again; the curves show the later values.")
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
        rows.append(row)
    return rows, tuple(notes)


def _check_metrics_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_short(row)}")
    for name in ("step", "language_model_loss"):
        if _number(row, name, where) is None:
            raise ValueError(f"{where}: the field {name!r} is missing; every logged step needs it")
    for name in ("tls", "cls8", "tokens_per_second"):
        _number(row, name, where)
    for name in ("terms", "coefficients"):
        _numbers(row, name, where)


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete the file and make it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_short(data)}")
    return data


def _evaluation(data: dict[str, Any], where: str) -> Evaluation:
    sources = _mapping(data, "sources", where)
    return Evaluation(
        heldout_loss=_number(data, "heldout_loss", where),
        perplexity=_number(data, "perplexity", where),
        bits_per_byte=_number(data, "bits_per_byte", where),
        tokens=_number(data, "tokens", where),
        **_sparsity(data, where),
        layers=[_layer(row, f"{where}: layers[{i}]") for i, row in enumerate(_list(data, "layers", where))],
        sources={name: _source(_mapping(sources, name, where), f"{where}: source {name}") for name in sources},
    )


def _source(data: dict[str, Any], where: str) -> dict[str, Any]:
    names = ("tokens", "loss", "perplexity", "bits_per_byte")
    return {name: _number(data, name, where) for name in names} | _sparsity(data, where)


def _layer(row: Any, where: str) -> Layer:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {_short(row)}")
    use = _list(row, "expert_use", where)
    if not all(isinstance(value, int | float) for value in use):
        raise ValueError(f"{where}: expert_use must be a list of percentages, got {_short(use)}")
    dead = _number(row, "dead_experts", where)
    return Layer(**_sparsity(row, where), expert_use=use, dead_experts=None if dead is None else int(dead))


def _sparsity(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        cls = {int(window): value for window, value in _numbers(data, "cls", where).items()}
    except ValueError as error:
        raise ValueError(f"{where}: the keys of cls must be window lengths ({error})") from None
    return {"tls": _number(data, "tls", where), "cls": cls, "reuse_ratio": _number(data, "reuse_ratio", where)}


def _sample(data: dict[str, Any], where: str) -> Sample:
    tokens = []
    for i, token in enumerate(_list(data, "tokens", where)):
        if not isinstance(token, dict) or not isinstance(token.get("text"), str):
            raise ValueError(f"{where}: tokens[{i}] must be an object with a text, got {_short(token)}")
        experts, share = (_number(token, name, f"{where}: tokens[{i}]") for name in ("active_experts", "active_share"))
        tokens.append(SampleToken(token["text"], bool(token.get("generated")), experts, share))
    num_experts = _number(data, "num_experts", where)
    return Sample(tokens, None if num_experts is None else int(num_experts), _number(data, "tokens_per_second", where))


def _number(data: Mapping[str, Any], name: str, where: str) -> float | None:
    value = data.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {name} must be a number or null, got {_short(value)}")


def _numbers(data: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    """A mapping of numbers, without those that are null."""
    inner = _mapping(data, name, where)
    found = {key: _number(inner, key, f"{where}: {name}") for key in inner}
    return {key: value for key, value in found.items() if value is not None}


def _mapping(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object, got {_short(value)}")
    return value or {}


def _list(data: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {_short(value)}")
    return value or []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
