"""What a run must know of other processes: who it is, how to wrap the model, how to add numbers up.

Everything is a no-op in a single process. Under torchrun the environment says what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all. `size` 1 means no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes, if any, and leave it at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but this torch sees no CUDA device; use device 'cpu'")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {kind!r}")
    local = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    started_here = size > 1 and not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield World(rank=rank, size=size, device=local)
    finally:
        if started_here:
            dist.destroy_process_group()


def wrap(module: nn.Module, layers: nn.ModuleList, world: World, *, parallel: str, precision: str) -> nn.Module:
    """`module` (a `TrainingModel`) for training on all ranks: as it is, in DDP, or sharded by layer with FSDP2."""
    if world.size == 1:
        return module
    if parallel == "ddp":
        # Layers are compiled one by one, so gradients come layer by layer, and the exchange overlaps with backward
        # already. Without this, dynamo would cut every layer in two at the bounds of DDP's buckets.
        torch._dynamo.config.optimize_ddp = False
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    half = precision == "bfloat16"
    # Inputs are not cast: the counts that divide the losses must stay exact.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    register_fsdp_forward_method(module, "score")
    return module


@contextlib.contextmanager
def gradient_sync(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Exchange gradients in backward only if `enabled`: all micro-batches but the last go without.

    With FSDP, a step of several micro-batches then gathers its parameters once, not twice for each of them: the whole
    gradients that such a step holds between its micro-batches take more memory than the parameters.
    """
    if isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled)
            module.set_reshard_after_backward(enabled)
            if not enabled:
                module.set_reshard_after_forward(False)
        yield
