"""Decoding on a GPU: a sparse model and its dense twin of as many parameters, both through CUDA graphs.

    python benchmarks/decode_gpu.py --json benchmarks/results/decode-gpu-h100.json
    python benchmarks/decode_gpu.py --device cpu --tiny      # a rehearsal: the same path, sizes of a toy

First, greedy text of small float32 models must be that of the model's own modules; otherwise nothing is timed. The
models that are timed have random weights in bfloat16, made on the device. Routers are shifted until the wanted share of
experts is active, with an own offset for each expert, so that neighbouring tokens share experts as trained ones do; the
share and the union that steps then have are printed. Sparse and dense take turns. Tables:

    text    tokens a second of greedy decoding, prompt apart, through the same loop that users call
    steps   time of a step of 1 token and of trees; floor: bytes of the weights and of the cache that it must read, at
            the bandwidth of a copy of one gigabyte; above floor: the share of the time beyond that, which is all that
            the engine adds
    parts   the same for parts of the step, timed alone on the inputs that they have in it; rest: what is left of the
            step (embedding, counts of experts, gaps)
    products  on a GPU: our kernel for few tokens against cuBLAS, on cold weights

A step's time is that of its graph; tokens a second also have the host's work between steps. With --seconds, what no
longer fits is left out, and said so.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockffn.inference.decode import GenerationSettings, generate
from blockffn.inference.graph_target import GraphTarget
from blockffn.inference.kv_cache import row_widths
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.target import prefill
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.moe import BlockFFN
from blockffn.ops.decode.inputs import StepInputs
from blockffn.presets import preset_config

# Rows of 10965 numbers, as the preset has them, begin at odd addresses, which slows any product.
DENSE_WIDTH = 10960
TINY = {"num_hidden_layers": 3, "vocab_size": 301, "max_position_embeddings": 256}
CHECKED = [("nano", "blockffn", {}), ("nano", "dense", {}),
           ("mini", "blockffn", {"num_hidden_layers": 4, "vocab_size": 2048})]  # fmt: skip
CONSTANT = 1.0  # in the first column of the embeddings: what routers' offsets multiply


@dataclass(frozen=True)
class TextRow:
    model: str
    engine: str
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class PartRow:
    model: str
    num_tokens: int
    part: str
    microseconds: float
    megabytes: float
    floor_microseconds: float
    above_floor: float
    active_share: float | None
    union_share: float | None


class Clock:
    """Times on a device: on a GPU between events, of a CUDA graph where something can be captured."""

    def __init__(self, device: torch.device, rounds: int, seconds: float) -> None:
        self.device, self.rounds = device, rounds
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{self.left:5.0f} s left] {text}", flush=True)

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run` as one launch."""
        if self.device.type != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        return lambda: (graph.replay(), kept)

    def medians(self, runs: dict[Any, Callable[[], object]], repeats: int = 3) -> dict[Any, float]:
        """Median microseconds of each; all take turns."""
        times: dict[Any, list[float]] = {name: [] for name in runs}
        for turn in range(self.rounds + 2):
            for name, run in runs.items():
                elapsed = self._once(run, repeats)
                if turn >= 2:
                    times[name].append(elapsed)
        return {name: statistics.median(values) for name, values in times.items()}

    def _once(self, run: Callable[[], object], repeats: int) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - begin) * 1e6 / repeats
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / repeats

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy of one gigabyte (64 MiB on a CPU)."""
        size = 1 << (30 if self.device.type == "cuda" else 26)
        source = torch.randint(0, 100, (size,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (self.medians({"copy": lambda: target.copy_(source)})["copy"] * 1e-6)


def check(clock: Clock) -> None:
    """Greedy float32 text of graphs and of modules, token for token; trees to rounding. Exits on a difference."""
    settings = GenerationSettings(temperature=0.0, max_new_tokens=100)
    wrong = False
    for size, method, changes in CHECKED:
        with clock.device:
            model = BlockFFNForCausalLM(preset_config(size, method, **changes)).eval()
        targets = (ModelTarget(model, capacity=256), GraphTarget(model, capacity=256))
        texts = [generate(target, list(range(1, 30)), settings).token_ids for target in targets]
        steps = [target.extend(torch.arange(8), torch.tensor(tree_of(8))) for target in targets]
        error = float((steps[1].logits - steps[0].logits).norm() / steps[0].logits.norm())
        equal = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), len(texts[0]))
        clock.say(
            f"float32 {size} {method}, {model.config.attention_type}: {equal} of {len(texts[0])} greedy tokens equal; "
            f"logits of a tree differ by {error:.1e}"
        )
        wrong |= equal < len(texts[0]) or not error < 1e-4
    if wrong:
        raise SystemExit("graphs and modules disagree; nothing is timed")


@torch.no_grad()
def random_model(method: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> BlockFFNForCausalLM:
    changes: dict[str, Any] = dict(TINY) if tiny else {}
    if method == "dense" and not tiny:
        changes["intermediate_size"] = DENSE_WIDTH
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return BlockFFNForCausalLM(preset_config("nano" if tiny else "3b", method, **changes)).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def shift_routers(model: BlockFFNForCausalLM, *, share: float, locality: float) -> None:
    """Give each router offsets with which ReLU leaves `share` of the experts, mostly the same for all tokens.

    One column of the residual stream is made constant; routers multiply it by their offsets, which vary `locality`
    times as much among experts as the rest of a logit varies among tokens. Layers follow each other: each is set on
    what the ones before it, already set, give.
    """
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.routed_experts.down_proj[:, :, 0] = 0

    def set_router(module: BlockFFN, args: tuple[Tensor, ...]) -> None:
        h, weight = args[0].flatten(0, -2).float(), module.router.proj.weight
        weight[:, 0] = 0
        varying = h @ weight.float().T / h[:, :1]
        offsets = locality * varying.std() * torch.randn(len(weight), device=weight.device)
        reached = (varying + offsets).flatten().sort().values
        weight[:, 0] = (offsets - reached[int((1 - share) * len(reached))]).to(weight.dtype)

    hooks = [layer.mlp.register_forward_pre_hook(set_router) for layer in model.model.layers]
    model(random_tokens(model, 256).to(model.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()


def random_tokens(model: BlockFFNForCausalLM, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator)


def tree_of(num_tokens: int) -> list[int]:
    """Parents of a tree of width two: token t hangs on token t // 2 - 1."""
    return [t // 2 - 1 for t in range(num_tokens)]


class Bench:
    """One model with its graphs, ready to be timed after a prompt of `context` random tokens."""

    def __init__(self, name: str, model: BlockFFNForCausalLM, clock: Clock, context: int) -> None:
        self.name, self.model, self.clock = name, model, clock
        self.prompt = random_tokens(model, context).tolist()
        self.target = GraphTarget(model, capacity=min(2 * context + 256, model.config.max_position_embeddings))

    def text(self, num_tokens: int) -> float:
        """Tokens per second of greedy decoding."""
        settings = GenerationSettings(temperature=0.0, max_new_tokens=num_tokens)
        rate = generate(self.target, self.prompt, settings).statistics.decode_tokens_per_second
        assert rate is not None
        return rate

    def prepare(self, num_tokens: int) -> Parts:
        self.target.reset()
        prefill(self.target, torch.tensor(self.prompt))
        return Parts(self, num_tokens)


class Parts:
    """A step of `num_tokens` tokens and its parts, each on the inputs that it has in the step."""

    @torch.no_grad()
    def __init__(self, bench: Bench, num_tokens: int) -> None:
        self.bench, self.plan, self.num_tokens = bench, bench.target.plan, num_tokens
        self.layers = bench.model.model.layers
        self.inputs = StepInputs(num_tokens, bench.clock.device)
        self.inputs.fill(len(bench.prompt), random_tokens(bench.model, num_tokens).tolist(), tree_of(num_tokens))
        plan, x, branch = self.plan, self.plan.embed(self.inputs), None
        self.before: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        weights = plan.routing_weights(num_tokens)
        self.weights = [None] * len(self.layers) if weights is None else list(weights)
        for i in range(len(self.layers)):
            middle, attended = plan.attend(i, x, branch, self.inputs)
            self.before.append((x, branch, middle, attended))
            x, branch = plan.feed_forward(i, middle, attended, self.inputs, self.weights[i])
        self.last = (x, branch)
        self.union = self.active = None
        if weights is not None:
            counts = plan.ops.count_active(weights).double()
            self.union, self.active = float(counts[:, 0].mean()), float(counts[:, 1:].mean())
            self.normed = [
                plan.ops.add_norm(m, layer.post_attention_layernorm.weight, eps=1e-5, branch=a, scale=plan.scale)[1]
                for layer, (_, _, m, a) in zip(self.layers, self.before, strict=True)
            ]

    def runs(self) -> dict[str, Callable[[], object]]:
        found = {"step": self.step, "attention": self.attention, "ffn": self.ffn, "head": self.head}
        return found if self.union is None else found | {"experts of it": self.experts}

    @torch.no_grad()
    def step(self) -> object:
        return self.plan.step(self.inputs)

    @torch.no_grad()
    def attention(self) -> object:
        return [self.plan.attend(i, x, branch, self.inputs) for i, (x, branch, _, _) in enumerate(self.before)]

    @torch.no_grad()
    def ffn(self) -> object:
        return [
            self.plan.feed_forward(i, middle, attended, self.inputs, self.weights[i])
            for i, (_, _, middle, attended) in enumerate(self.before)
        ]

    @torch.no_grad()
    def experts(self) -> object:
        own = zip(self.layers, self.normed, self.weights, strict=True)
        return [layer.mlp.routed_experts(normed, weights) for layer, normed, weights in own]

    @torch.no_grad()
    def head(self) -> object:
        return self.plan.head(*self.last)

    def bytes_of(self) -> dict[str, float]:
        """What each part must read."""
        model, config = self.bench.model, self.bench.model.config
        size = model.lm_head.weight.element_size()
        attention = sum(p.numel() for layer in self.layers for p in layer.self_attn.parameters()) * size
        rows = len(self.bench.prompt) + self.num_tokens
        attention += config.num_hidden_layers * rows * sum(row_widths(config)) * size
        head = model.lm_head.weight.numel() * size
        if self.union is None:
            ffn = sum(p.numel() for layer in self.layers for p in layer.mlp.parameters()) * size
            return {"step": attention + ffn + head, "attention": attention, "ffn": ffn, "head": head}
        expert = 2 * config.hidden_size * config.moe_intermediate_size
        experts = config.num_hidden_layers * self.union * expert * size
        ffn = experts + config.num_hidden_layers * config.num_experts * config.hidden_size * size
        return {"step": attention + ffn + head, "attention": attention, "ffn": ffn, "head": head,
                "experts of it": experts}  # fmt: skip

    def rows(self, times: dict[str, float], bandwidth: float) -> Iterator[PartRow]:
        parts = {name: times[name] for name in self.runs()}
        parts["rest"] = parts["step"] - parts["attention"] - parts["ffn"] - parts["head"]
        shares = [None if n is None else n / self.bench.model.config.num_experts for n in (self.active, self.union)]
        sizes = self.bytes_of()
        for name, microseconds in parts.items():
            floor = sizes.get(name, 0.0) / bandwidth * 1e6
            yield PartRow(
                self.bench.name, self.num_tokens, name, microseconds, sizes.get(name, 0.0) / 1e6, floor,
                1 - floor / microseconds, *shares,
            )  # fmt: skip


def time_steps(benches: list[Bench], num_tokens: int, bandwidth: float) -> list[PartRow]:
    """Steps and parts of all models, taking turns."""
    clock = benches[0].clock
    parts = [bench.prepare(num_tokens) for bench in benches]
    runs = {(p.bench.name, name): clock.graph(run) for p in parts for name, run in p.runs().items()}
    times = clock.medians(runs)
    rows: list[PartRow] = []
    for part in parts:
        rows += part.rows({name: us for (model, name), us in times.items() if model == part.bench.name}, bandwidth)
    return rows


@dataclass(frozen=True)
class ProductRow:
    product: str
    num_tokens: int
    kernel_microseconds: float
    cublas_microseconds: float
    floor_microseconds: float


@torch.no_grad()
def time_products(benches: list[Bench], bandwidth: float) -> list[ProductRow]:
    """A product of each layer's own weights, by our kernel and by cuBLAS, in microseconds a layer."""
    from blockffn.ops.decode.triton_linear import dot_linear, row_linear

    sparse, dense = (list(bench.model.model.layers) for bench in benches)
    products = {
        "output": [layer.self_attn.o_proj.weight for layer in sparse],
        "dense gate": [layer.mlp.gate_proj.weight for layer in dense],
        "dense down": [layer.mlp.down_proj.weight for layer in dense],
    }

    @torch.no_grad()
    def each(way: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [way(x, weight) for weight in weights]

    clock, rows = benches[0].clock, []
    for name, weights in products.items():
        for T in (1, 2, 4, 8):
            x = torch.randn(T, weights[0].shape[1], device=clock.device, dtype=weights[0].dtype)
            runs: dict[Any, Callable[[], object]] = {
                way: clock.graph(functools.partial(each, way, x, weights))
                for way in (row_linear if T == 1 else dot_linear, torch.nn.functional.linear)
            }
            ours, cublas = (time / len(weights) for time in clock.medians(runs).values())
            floor = weights[0].nbytes / bandwidth * 1e6
            rows.append(ProductRow(name, T, ours, cublas, floor))
            print(
                f"  {name:<11}{T:>3} tokens  kernel {ours:>6.1f} us  cuBLAS {cublas:>6.1f} us  floor {floor:>6.1f} us"
            )
    return rows


def print_parts(rows: list[PartRow]) -> None:
    for r in rows:
        shares = "" if r.active_share is None else f"  active {r.active_share:.1%}, union {r.union_share:.1%}"
        print(
            f"  {r.model:<7}{r.num_tokens:>3} tokens  {r.part:<14}{r.microseconds:>9.1f} us{r.megabytes:>9.1f} MB"
            f"  floor {r.floor_microseconds:>8.1f} us  above floor {r.above_floor:>6.1%}"
            f"{shares if r.part == 'step' else ''}"
        )
    steps = {r.model: r.microseconds for r in rows if r.part == "step"}
    if len(steps) == 2:
        print(
            f"  {rows[0].num_tokens} tokens: sparse step {steps['dense'] / steps['sparse']:.2f} times as fast as dense"
        )


def time_text(benches: list[Bench], num_tokens: int, rounds: int) -> list[TextRow]:
    rates: dict[str, list[float]] = {bench.name: [] for bench in benches}
    for turn in range(rounds + 1):
        for bench in benches:
            rate = bench.text(num_tokens)
            if turn:
                rates[bench.name].append(rate)
    rows = [TextRow(name, "graphs", num_tokens, statistics.median(values)) for name, values in rates.items()]
    for row in rows:
        spread = f"{min(rates[row.model]):.0f} to {max(rates[row.model]):.0f}"
        print(f"  {row.model:<7}{row.tokens_per_second:>9.1f} tokens/s (median of {rounds}; {spread})")
    sparse, dense = (row.tokens_per_second for row in rows)
    print(f"  sparse text {sparse / dense:.2f} times as fast as dense")
    return rows


def time_peer(bench: Bench, num_tokens: int, begin: int = 2) -> TextRow:
    """Hugging Face's `generate` on the same model: the time of tokens after the first few."""
    prompt = torch.tensor([bench.prompt], device=bench.model.device)
    seconds = []
    for count in (begin, begin, begin + num_tokens):  # the first warms up
        start = time.perf_counter()
        bench.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        if bench.clock.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    row = TextRow(bench.name, "Hugging Face generate", num_tokens, num_tokens / (seconds[2] - seconds[1]))
    print(f"  {row.model:<7}{row.tokens_per_second:>9.1f} tokens/s ({row.engine})")
    return row


def arguments_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes in float32")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32], help="tokens of a step; powers of two")
    parser.add_argument("--context", type=int, help="tokens of the prompt; default 512, or 32 with --tiny")
    parser.add_argument("--new-tokens", type=int, help="of a text; default 200, or 8 with --tiny")
    parser.add_argument("--share", type=float, default=0.16, help="of experts that are active")
    parser.add_argument("--locality", type=float, default=3.0, help="how far neighbouring tokens share experts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120.0, help="leave out what no longer fits")
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    options = parser.parse_args()
    if any(not 1 <= T <= 64 or T & (T - 1) for T in options.tokens):
        parser.error(f"--tokens takes powers of two up to 64, got {options.tokens}")
    return options


def main() -> None:
    options = arguments_of_command()
    torch.manual_seed(0)
    device = torch.device(options.device)
    clock = Clock(device, options.rounds, options.seconds - 10)  # the last seconds are for the way out
    context = options.context or (32 if options.tiny else 512)
    new_tokens = options.new_tokens or (8 if options.tiny else 200)
    check(clock)

    benches = []
    for name, method in (("sparse", "blockffn"), ("dense", "dense")):
        model = random_model(method, device, torch.float32 if options.tiny else torch.bfloat16, tiny=options.tiny)
        if name == "sparse":
            shift_routers(model, share=options.share, locality=options.locality)
        benches.append(Bench(name, model, clock, context))
        clock.say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    bandwidth = clock.copy_bandwidth()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    clock.say(f"{name}, copy {bandwidth / 1e9:.0f} GB/s, prompt of {context} tokens")

    text: list[TextRow] = []
    parts: list[PartRow] = []
    products: list[ProductRow] = []
    left_out: list[str] = []
    jobs: list[tuple[str, float, Callable[[], None]]] = [
        ("greedy text", 15, lambda: text.extend(time_text(benches, new_tokens, min(options.rounds, 5)))),
        *((f"steps of {T}", 12, lambda T=T: add_parts(T)) for T in options.tokens),  # type: ignore[misc]
        *(
            [("products", 15, lambda: products.extend(time_products(benches, bandwidth)))]
            if device.type == "cuda"
            else []
        ),
        ("Hugging Face", 8, lambda: text.append(time_peer(benches[1], min(new_tokens, 24)))),
    ]

    def add_parts(T: int) -> None:
        rows = time_steps(benches, T, bandwidth)
        print_parts(rows)
        parts.extend(rows)
        save(options.json, {"text": text, "parts": parts, "products": products}, machine, left_out)

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = {"device": name, "copy_bandwidth": bandwidth, "context": context, **versions, "date": date,
               "share": options.share, "locality": options.locality, "tiny": options.tiny}  # fmt: skip
    for what, needs, run in jobs:
        if clock.left < needs:
            left_out.append(what)
            clock.say(f"{what}: left out, no time")
            continue
        clock.say(f"{what}:")
        run()
    print_gaps(text, parts)
    save(options.json, {"text": text, "parts": parts, "products": products}, machine, left_out)


def print_gaps(text: list[TextRow], parts: list[PartRow]) -> None:
    """What a token of text takes beyond the step's graph: choosing it, and the host between steps."""
    steps = {row.model: row.microseconds for row in parts if row.part == "step" and row.num_tokens == 1}
    for row in text:
        if row.engine == "graphs" and row.model in steps:
            whole = 1e6 / row.tokens_per_second
            between = whole - steps[row.model]
            print(
                f"  {row.model:<7} {whole:.0f} us a token, {between:.0f} of them ({between / whole:.1%}) between steps"
            )


def save(path: Path | None, tables: dict[str, list[Any]], machine: dict[str, Any], left_out: list[str]) -> None:
    if path is None:
        return
    data = {"machine": machine, "left_out": left_out} | {k: [asdict(r) for r in rows] for k, rows in tables.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
