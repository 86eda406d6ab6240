"""Names what a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

BUSY = 0.5  # of all cores, by other programs: measurements then say little


def describe_machine(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def busy(device: torch.device) -> list[str]:
    """A remark if other programs used the cores in the last minute: steps of ours then wait for their turns."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return []
    return [
        f"other programs used {load:.1f} of {cores} cores in the last minute: steps may take many times as long as "
        "on a quiet machine; measure again when they are done"
    ]
