"""Token ids as lists and as tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blockffn.inference.ids import Ids, listed, on_host
from blockffn.inference.model_target import Pending


@pytest.mark.parametrize("ids", [[3, 1], (3, 1), torch.tensor([3, 1]), range(3, -1, -2)])
def test_ids_are_listed_whatever_holds_them(ids: Ids) -> None:
    assert listed(ids) == on_host(ids) == [3, 1]


def test_a_list_is_not_copied() -> None:
    ids = [1, 2]
    assert listed(ids) is ids


@pytest.mark.parametrize("read", [listed, on_host])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_of_another_shape_is_refused(read: Callable[[Ids], object], device: str) -> None:
    with pytest.raises(ValueError, match=r"given as \[T\], got the shape \(1, 2\)"):
        read(torch.empty(1, 2, dtype=torch.int64, device=device))


def test_a_tensor_of_a_device_is_not_read() -> None:
    ids = torch.empty(2, dtype=torch.int64, device="meta")
    assert on_host(ids) is ids


def test_more_than_a_step_had_is_not_kept_wherever_it_lies() -> None:
    with pytest.raises(ValueError, match="5 tokens cannot be kept of 2"):
        Pending(2).keeps_first(torch.empty(5, dtype=torch.int64, device="meta"))
