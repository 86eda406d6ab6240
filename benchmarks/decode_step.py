"""Decode on the CPU with random weights: the native step beside the model's own modules and Hugging Face's `generate`.

    python benchmarks/decode_step.py --size 0.8b --formats bf16 int8 --json benchmarks/results/decode-step.json

The model has the shape of a preset and random weights; a routing threshold lets each token activate the wanted share of
experts. Contestants take turns, `--rounds` times; each turn decodes `--steps` steps of `--tokens` tokens after a prompt
of `--context` tokens. Columns:

    ms          a step, median over rounds
    tok/s       tokens of a step by its time (drafted ones included where a step has several)
    MB          bytes of weights and cache that a step reads
    % read      these bytes per second, of what all threads read from a large buffer just before and after the turn
    parts       where the native step's time went, in percent (see `blockffn.ops.native.PARTS`)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from on_cpu import machine, read_bandwidth

from blockffn.inference.model_target import ModelTarget
from blockffn.inference.native_target import NativeTarget
from blockffn.inference.target import Target, prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.rotary import RotaryEmbedding
from blockffn.ops import native
from blockffn.ops.quantization import MatrixLayout
from blockffn.presets import preset_config

FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """What one contestant took; times in milliseconds."""

    contestant: str
    tokens: int
    context: int
    milliseconds: float
    best_milliseconds: float
    tokens_per_second: float
    active_share: float | None
    union_share: float | None
    megabytes: float | None
    percent_of_read: float | None
    bandwidth: float
    parts: dict[str, float]


@torch.no_grad()
def random_model(size: str, method: str, active_share: float, dtype: torch.dtype) -> BlockFFNForCausalLM:
    """A model of random weights; its threshold leaves about `active_share` of the experts to each token."""
    config = preset_config(size, method)
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config)
    model.to(dtype).to_empty(device="cpu")
    noise = torch.randn((1 << 22) + 1).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
        copies = -(-parameter.numel() // noise.numel())
        parameter.view(-1).copy_(noise.repeat(copies)[: parameter.numel()]).mul_(std)
    model.tie_weights()
    model.model.rotary_emb = RotaryEmbedding(config)
    if config.ffn_type == "moe":
        # Logits are normal: a share is above its quantile, and the norm divides by sqrt(E[relu(z)^2]) = sqrt(1 / 2).
        quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - active_share))
        model.set_threshold(float(quantile / 0.5**0.5))
    return model.eval()


def bytes_read(target: NativeTarget, union: list[int], positions: int) -> float:
    """Bytes of weights and cache that a step must read, each once; `union` by layer with experts."""
    model, total = target.weights.description, 0.0
    experts = iter(union)
    for i in range(model.num_layers):
        layer = model.layers[i]
        matrices = [layer.in_proj, layer.out_proj, layer.query_proj, layer.router]
        total += sum(matrix_bytes(matrix) for matrix in matrices)
        total += model.num_heads * sum(matrix_bytes(matrix) for matrix in (layer.to_latent, layer.to_values))
        total += layer.experts.expert_bytes * (next(experts) if layer.router.data else 1)
    total += matrix_bytes(model.head)
    return total + target.weights.cache_bytes / model.capacity * positions


def matrix_bytes(matrix: native.Matrix) -> int:
    if not matrix.data:
        return 0
    format = list(native.FORMATS)[matrix.format]
    return MatrixLayout(format, matrix.outputs, matrix.inputs, matrix.group).num_bytes


class Contestant:
    """A target that is timed step by step."""

    def __init__(self, name: str, target: Target, prompt: torch.Tensor, tokens: int) -> None:
        self.name, self.target, self.tokens = name, target, tokens
        self.times: list[float] = []
        self.shares: list[tuple[float, float]] = []
        self.percents: list[float] = []
        self.megabytes: list[float] = []
        self.bandwidths: list[float] = []
        self.context = len(prompt)
        prefill(target, prompt)

    def turn(self, steps: int, flush: torch.Tensor) -> None:
        """Time so many steps; nothing of them is committed, so that all see the same context."""
        nothing = torch.arange(0)
        before = read_bandwidth(flush)
        times, sizes = [], []
        for _ in range(steps):
            tokens = torch.randint(0, self.target.vocab_size, (self.tokens,))
            start = time.perf_counter()
            step = self.target.extend(tokens)
            int(step.logits[-1].argmax())
            times.append(time.perf_counter() - start)
            self.target.commit(nothing)
            if step.union is not None and step.active is not None:
                self.shares.append((float(step.active.double().mean()), float(step.union.double().mean())))
            if isinstance(self.target, NativeTarget):
                union = [] if step.union is None else step.union.tolist()
                sizes.append(bytes_read(self.target, union, self.context + self.tokens))
        bandwidth = (before + read_bandwidth(flush)) / 2
        self.bandwidths.append(bandwidth)
        self.times += times
        if sizes:
            self.megabytes.append(statistics.mean(sizes) / 1e6)
            self.percents.append(100 * statistics.mean(sizes) / statistics.median(times) / bandwidth)

    def row(self, num_experts: int) -> Row:
        median = statistics.median(self.times)
        seconds = self.target.seconds if isinstance(self.target, NativeTarget) else {}
        whole = sum(seconds.values()) or 1.0
        active = statistics.mean(a for a, _ in self.shares) / num_experts if self.shares else None
        union = statistics.mean(u for _, u in self.shares) / num_experts if self.shares else None
        return Row(
            self.name, self.tokens, self.context, 1e3 * median, 1e3 * min(self.times), self.tokens / median,
            active, union,
            statistics.mean(self.megabytes) if self.megabytes else None,
            statistics.median(self.percents) if self.percents else None, statistics.median(self.bandwidths),
            {part: 100 * value / whole for part, value in seconds.items()} if whole != 1.0 else {},
        )  # fmt: skip


def time_generate(model: BlockFFNForCausalLM, prompt: torch.Tensor, steps: int) -> float:
    """Seconds of a step of Hugging Face's `generate`: the difference of two lengths."""

    def run(count: int) -> float:
        start = time.perf_counter()
        model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    run(2)
    return (run(steps + 2) - run(2)) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--method", default="blockffn")
    parser.add_argument("--active", type=float, default=0.16, help="share of experts that a token activates")
    parser.add_argument("--formats", nargs="*", default=["bf16", "int8", "int4"], help="of the native step")
    parser.add_argument("--head", help="format of the head; default: as make_target chooses it")
    parser.add_argument("--tokens", type=int, default=1, help="in a step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-model", action="store_true", help="only the native step")
    parser.add_argument("--generate", action="store_true", help="also time Hugging Face's generate")
    parser.add_argument("--parts", action="store_true", help="time the parts of the native step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.float32 if options.formats == ["f32"] else torch.bfloat16
    model = random_model(options.size, options.method, options.active, dtype)
    prompt = torch.randint(0, model.config.vocab_size, (options.context,))
    capacity = options.context + options.tokens + 8
    makers: dict[str, Callable[[], Target]] = {} if options.without_model else {
        f"model {str(dtype)[6:]}": lambda: ModelTarget(model, capacity=capacity)
    }  # fmt: skip
    for format in options.formats:
        makers[f"native {format}"] = lambda format=format: NativeTarget(
            model, capacity=capacity, format=format, head_format=options.head
        )
    flush = native.empty_huge(FLUSH_BYTES).fill_(1)
    with torch.inference_mode():
        contestants = [Contestant(name, make(), prompt, options.tokens) for name, make in makers.items()]
        for contestant in contestants:
            contestant.turn(2, flush)
            contestant.__dict__.update(times=[], shares=[], percents=[], megabytes=[], bandwidths=[])
            if isinstance(contestant.target, NativeTarget):
                contestant.target.times = options.parts
        for _ in range(options.rounds):
            for contestant in contestants:
                contestant.turn(options.steps, flush)
    rows = [contestant.row(model.config.num_experts) for contestant in contestants]
    if options.generate:
        seconds = [time_generate(model, prompt, options.steps) for _ in range(max(options.rounds // 2, 1))]
        rows.append(
            Row("generate", 1, options.context, 1e3 * statistics.median(seconds), 1e3 * min(seconds),
                1 / statistics.median(seconds), None, None, None, None, 0.0, {})
        )  # fmt: skip
    for row in rows:
        share = "" if row.active_share is None else f"  active {row.active_share:.1%}, union {row.union_share:.1%}"
        reading = "" if row.megabytes is None else f"  {row.megabytes:7.1f} MB  {row.percent_of_read:5.1f} % of read"
        parts = "  " + ", ".join(f"{part} {value:.0f}" for part, value in row.parts.items()) if row.parts else ""
        print(
            f"{row.contestant:<16}{row.milliseconds:9.3f} ms (best {row.best_milliseconds:8.3f})"
            f"{row.tokens_per_second:9.1f} tok/s{reading}  memory {row.bandwidth / 1e9:.1f} GB/s{share}{parts}"
        )
    if options.json:
        settings: dict[str, Any] = {k: v for k, v in vars(options).items() if k != "json"}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"machine": machine() | {"date": date}, "settings": settings, "rows": [asdict(row) for row in rows]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
