"""Where a model runs, as a user names it."""

from __future__ import annotations

import torch


def choose_device(device: str | None) -> str:
    """`device` once it is known to be there; by default a GPU, if there is one.

    Raises:
        ValueError: it is no device of PyTorch's, or this machine, or this build of PyTorch, lacks it.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; choose cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; choose cpu")
    return device
