"""With FSDP a step of several micro-batches gathers its parameters once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from blockffn.training.distributed import World, gradient_sync, wrap


@pytest.fixture
def lone_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layers(nn.Sequential):
    def score(self) -> None:
        """As a `TrainingModel` has it."""


@pytest.mark.usefixtures("lone_process")
def test_fsdp_keeps_parameters_gathered_between_the_micro_batches_of_a_step() -> None:
    layers = Layers(nn.Linear(4, 4), nn.Linear(4, 4))
    world = World(rank=0, size=2, device=torch.device("cpu"))
    module = wrap(layers, layers, world, parallel="fsdp", precision="float32")

    def are_gathered() -> list[bool]:
        return [not isinstance(layer.weight, DTensor) for layer in layers]

    for micro_batches in (1, 3, 3):
        for number in range(1, micro_batches + 1):
            is_last = number == micro_batches
            with gradient_sync(module, enabled=is_last):
                loss = module(torch.randn(2, 4)).sum()
                assert are_gathered() == [micro_batches > 1] * 2
                loss.backward()
            assert are_gathered() == [not is_last] * 2
        assert all(isinstance(parameter.grad, DTensor) for parameter in module.parameters())
