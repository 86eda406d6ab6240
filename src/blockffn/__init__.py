"""blockffn: sparse language models with differentiable ReLU routing.

`import blockffn` registers the model with Hugging Face's `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`. Names
are loaded when first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

from blockffn import _registration

__version__ = "0.1.0"

_EXPORTS = {
    "BlockFFNConfig": "blockffn.configuration",
    "Routing": "blockffn.routing",
    "preset_config": "blockffn.presets",
    "BlockFFN": "blockffn.models.moe",
    "BlockFFNModel": "blockffn.models.causal_lm",
    "BlockFFNForCausalLM": "blockffn.models.causal_lm",
    "load": "blockffn.checkpoints.load",
    "sparse_ffn": "blockffn.ops.sparse_ffn",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'blockffn' has no attribute {name!r}")


_registration.install()
