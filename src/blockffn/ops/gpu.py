"""Whether Triton kernels can run on a device, and what it offers. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def refuses_device(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, or `None`.

    With `TRITON_INTERPRET=1`, set before Triton is imported, they run anywhere (slowly; bfloat16 products are wrong).
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs tensors on a CUDA device, got {device}"
    # torch.compile cannot trace these queries; where they would refuse, the launch itself fails.
    return None if torch.compiler.is_compiling() else _lacks(device)


@functools.cache
def _lacks(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'blockffn[gpu]'"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {capability}"
    return None


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
