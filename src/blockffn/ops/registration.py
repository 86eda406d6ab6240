"""Registers the package's ops with `torch.library`, so that `torch.compile`, CUDA graphs and `opcheck` see them.

`Library.define/impl` and not the `custom_op` decorator: it costs 4 µs a call instead of 10, and a decode step calls an
op per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_LIBRARY = torch.library.Library("blockffn", "DEF")


def define(schema: str, implementations: Mapping[str, Callable[..., Any]], *, fake: Callable[..., Any]) -> None:
    """Define `torch.ops.blockffn.<name>` from `schema`, e.g. `"linear(Tensor x) -> Tensor"`.

    Args:
        implementations: by dispatch key (`CPU`, `CUDA`, `CompositeExplicitAutograd`).
        fake: gives the shapes and dtypes of the results; it must not read data.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    for key, function in implementations.items():
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"blockffn::{name}", fake, lib=_LIBRARY)
