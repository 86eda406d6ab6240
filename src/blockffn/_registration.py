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
from collections.abc import Sequence
from types import ModuleType

# The module that registers itself once the auto class it registers with is there.
_REGISTRANTS = {
    "transformers.models.auto.configuration_auto": "blockffn.configuration",
    "transformers.models.auto.modeling_auto": "blockffn.models.causal_lm",
    "transformers.quantizers.auto": "blockffn.checkpoints.quantizer",
}


class _LoaderThenRegistrant(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, registrant: str) -> None:
        self._loader, self._registrant = loader, registrant

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # Where the registrant is itself being imported, this does nothing: it registers when its own import ends.
        importlib.import_module(self._registrant)


class _AutoClassFinder(importlib.abc.MetaPathFinder):
    """Finds the auto modules as Python would, and imports the registrant after each has executed."""

    def __init__(self) -> None:
        self._waiting = dict(_REGISTRANTS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        registrant = self._waiting.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegistrant(spec.loader, registrant)
        return spec


def install() -> None:
    """Register now with what is already imported, and with the rest when it is."""
    for name, registrant in _REGISTRANTS.items():
        if name in sys.modules:
            importlib.import_module(registrant)
    if any(name not in sys.modules for name in _REGISTRANTS):
        sys.meta_path.insert(0, _AutoClassFinder())
