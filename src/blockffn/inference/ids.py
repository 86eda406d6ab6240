"""Token ids and indices, as loops hand them on: a list, or a tensor where one is at hand.

Steps are of a few tokens, and between two of them a CPU's caches hold nothing but weights: a list is a fraction of the
work that a tensor is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Ids = Sequence[int] | Tensor


def listed(ids: Ids) -> list[int]:
    """As a list, which is given back as it is; a tensor `[T]` is read, which waits for its device.

    Raises:
        ValueError: a tensor of another shape.
    """
    if isinstance(ids, list):
        return ids
    if not isinstance(ids, Tensor):
        return list(ids)
    found: list[int] = _checked(ids).tolist()
    return found


def on_host(ids: Ids) -> list[int] | Tensor:
    """As a list, but a tensor of a device as it is, which is not waited for.

    Raises:
        ValueError: as `listed`.
    """
    return _checked(ids) if isinstance(ids, Tensor) and ids.device.type != "cpu" else listed(ids)


def _checked(ids: Tensor) -> Tensor:
    if ids.ndim != 1:
        raise ValueError(f"tokens and indices are given as [T], got the shape {tuple(ids.shape)}")
    return ids
