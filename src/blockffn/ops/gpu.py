"""Whether Triton kernels can run on a device, and what it offers. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def refuses_device(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, or `None`.

    With `TRITON_INTERPRET=1`, set before Triton is imported, they run anywhere (slowly; bfloat16 products are wrong).
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'blockffn[gpu]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0 or newer, this GPU has {capability}"


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
