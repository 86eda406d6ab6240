"""Time training steps: tokens per second, model FLOPs utilisation, and what the objectives cost.

    python benchmarks/training.py --size 0.1b --rows 12 --json benchmarks/results/training_h100.json

The step is that of `blockffn train`: packed rows, all objectives, clipping, optimiser. Rows are random tokens in
documents of a given length, so no data is needed. Steps with and without objectives take turns. Columns:

    tokens/s    positions a second
    MFU         FLOPs of the model's matrix products (dense-equivalent: all experts, forward and backward, nothing
                computed twice) over the time and over the rate of a large matrix product measured in the same run
    objectives  share of the step that the objectives and the counting of active experts take
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockffn.data.batch import Batch
from blockffn.metrics.cost import flops_per_token
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.presets import METHODS, SIZES, preset_config
from blockffn.settings import parse_overrides
from blockffn.training.coefficients import make_coefficient
from blockffn.training.config import TrainSettings, train_settings
from blockffn.training.distributed import World
from blockffn.training.gradients import step_gradients
from blockffn.training.optimizer import clip_gradients, make_optimizer
from blockffn.training.step import MicroBatchLoss, TrainingModel


@dataclass(frozen=True)
class Result:
    size: str
    method: str
    tokens_per_step: int
    sequence_length: int
    milliseconds: float
    tokens_per_second: float
    flops_per_token: float
    utilisation: float
    objectives_share: float
    peak_memory_gigabytes: float


class Steps:
    """Runs whole training steps of one model, with or without its objectives."""

    def __init__(self, settings: TrainSettings, world: World, document_length: int) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.world = settings, world
        self.config = preset_config(settings.size, settings.method, **settings.model)
        model = BlockFFNForCausalLM(self.config)
        model.to(device=world.device)
        model.train()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.module = TrainingModel(model, settings.objectives, precision=settings.precision, compile=settings.compile)
        self.coefficients = {name: make_coefficient(spec) for name, spec in settings.objectives.terms.items()}
        self.optimizer = make_optimizer(model, settings.optimizer)
        self.batch = random_batch(settings, self.config.vocab_size, document_length)

    def __call__(self, *, objectives: bool = True) -> None:
        module: Any = self.module if objectives else LanguageModelOnly(self.module)
        step_gradients(module, self.batch, self.settings, self.coefficients, 1, self.world)
        clip_gradients(self.optimizer, self.settings.optimizer.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class LanguageModelOnly(torch.nn.Module):
    """The training model without its objectives and counts; the layers still return their routing."""

    def __init__(self, module: TrainingModel) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor, counts: dict[str, Tensor],
        offsets: Tensor,
    ) -> MicroBatchLoss:  # fmt: skip
        loss, _ = self.module.language_model(ids, labels, documents, positions, offsets)
        return MicroBatchLoss(loss / counts["num_targets"], {})


def random_batch(settings: TrainSettings, vocab_size: int, document_length: int) -> Batch:
    rows, length = settings.batch_size, settings.data.sequence_length
    ids = torch.randint(3, vocab_size, (rows, length))
    positions = torch.arange(length).expand(rows, -1)
    documents = (positions // document_length).int()
    return Batch(ids, ids, positions % document_length, documents, torch.zeros(rows, length, dtype=torch.int16))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)][2:]
    return 2 * n**3 / statistics.median(times)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(settings: TrainSettings, world: World, *, rounds: int, document_length: int, peak: float) -> Result:
    steps = Steps(settings, world, document_length)
    device = world.device
    sparse = steps.config.ffn_type != "dense"
    for _ in range(3):  # compile, warm up
        steps()
        if sparse:
            steps(objectives=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole, bare = [], []
    for _ in range(rounds):
        whole.append(seconds(steps, device))
        if sparse:
            bare.append(seconds(lambda: steps(objectives=False), device))
    time_of_step = statistics.median(whole)
    length = settings.data.sequence_length
    tokens = settings.batch_size * length
    flops = flops_per_token(steps.config, context=(min(document_length, length) + 1) / 2, training=True)
    return Result(
        size=settings.size,
        method=settings.method,
        tokens_per_step=tokens,
        sequence_length=length,
        milliseconds=time_of_step * 1e3,
        tokens_per_second=tokens / time_of_step,
        flops_per_token=flops,
        utilisation=flops * tokens / time_of_step / peak,
        objectives_share=1 - statistics.median(bare) / time_of_step if sparse else 0.0,
        peak_memory_gigabytes=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0,
    )


def profile(settings: TrainSettings, world: World, document_length: int) -> str:
    steps = Steps(settings, world, document_length)
    for _ in range(3):
        steps()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(2):
            steps()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
    return table


def print_results(results: list[Result], peak: float) -> None:
    print(f"\nlarge matrix product: {peak / 1e12:.0f} TFLOP/s")
    print(f"{'size':<8}{'method':<10}{'tokens/step':>12}{'ms/step':>10}{'tokens/s':>12}{'MFU':>8}{'objectives':>12}")
    for r in results:
        print(
            f"{r.size:<8}{r.method:<10}{r.tokens_per_step:>12,}{r.milliseconds:>10.1f}{r.tokens_per_second:>12,.0f}"
            f"{r.utilisation:>8.1%}{r.objectives_share:>12.1%}"
        )


def settings_of(arguments: argparse.Namespace, size: str, method: str) -> TrainSettings:
    changes: Mapping[str, Any] = {
        "batch_size": arguments.rows,
        "micro_batch_size": arguments.micro_rows,
        "gradient_checkpointing": False,
        **parse_overrides(arguments.settings),
    }
    return train_settings(size, method, dict(changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings as for blockffn train: model.num_experts=24")
    parser.add_argument("--size", nargs="+", default=["nano"], choices=SIZES)
    parser.add_argument("--method", nargs="+", default=["blockffn"], choices=METHODS)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro-rows", type=int, help="rows of a forward pass (default: all)")
    parser.add_argument("--document-length", type=int, default=1 << 30, help="default: a document fills its row")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", type=Path, help="write what is printed as data")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, size=1, device=device)
    peak = matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    results = []
    for size in arguments.size:
        for method in arguments.method:
            settings = settings_of(arguments, size, method)
            options = {"document_length": arguments.document_length}
            results.append(measure(settings, world, rounds=arguments.rounds, peak=peak, **options))
            if arguments.profile:
                print(profile(settings, world, **options))
    print_results(results, peak)
    if arguments.json:
        machine = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
            "matmul_flops": peak,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
