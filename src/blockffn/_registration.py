"""Registers the model with Hugging Face's auto classes the moment those are imported, and not before.

Importing transformers takes seconds; `blockffn --help` must not pay for it, and `import blockffn` must still be enough
for `AutoModelForCausalLM.from_pretrained`. Hence a post-import hook. See docs/decisions/0001-lazy-registration.md.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from blockffn.configuration import BlockFFNConfig

    AutoConfig.register("blockffn", BlockFFNConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from blockffn.configuration import BlockFFNConfig
    from blockffn.models.causal_lm import BlockFFNForCausalLM, BlockFFNModel

    AutoModel.register(BlockFFNConfig, BlockFFNModel, exist_ok=True)
    AutoModelForCausalLM.register(BlockFFNConfig, BlockFFNForCausalLM, exist_ok=True)


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _LoaderWithCallback(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, callback: Callable[[], None]) -> None:
        self._loader, self._callback = loader, callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._callback()


class _AutoClassFinder(importlib.abc.MetaPathFinder):
    """Finds the two auto modules as Python would, and runs the registration after each has executed."""

    def __init__(self) -> None:
        self._waiting = dict(_AFTER_IMPORT)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        callback = self._waiting.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithCallback(spec.loader, callback)
        return spec


def install() -> None:
    """Register now what is already imported, and the rest when it is."""
    missing = [name for name in _AFTER_IMPORT if name not in sys.modules]
    for name in _AFTER_IMPORT:
        if name not in missing:
            _AFTER_IMPORT[name]()
    if missing:
        sys.meta_path.insert(0, _AutoClassFinder())
