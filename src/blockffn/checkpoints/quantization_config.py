"""The `quantization_config` of config.json: which parts of a model are packed, and how.

Parts are the FFN (experts, or the dense control's matrices), attention, embeddings and the language-model head. Router
and norms stay as they are: they are small, and the router decides which experts are computed at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from blockffn.ops.quantization import DEFAULT_GROUP_SIZE, GROUP_SIZES

QUANT_METHOD = "blockffn"
PACKING = 1  # of the bytes; raised when the layout in blockffn.ops.quantization changes
FORMATS = ("int8", "int4")
PARTS = ("ffn", "attention", "embeddings", "lm_head")


@dataclass
class BlockFFNQuantizationConfig(QuantizationConfigMixin):
    """How a folder's weights are packed. Each part is `int8`, `int4` or `None` (left as it is).

    Attributes:
        group_size: weights along a row that share a scale: 32, 64 or 128.
        lm_head: without effect where the head is tied to the embeddings.
        packing: version of the bytes' layout.

    Raises:
        ValueError: an unknown part, format, group size or packing.
    """

    ffn: str | None = "int8"
    attention: str | None = "int8"
    embeddings: str | None = "int8"
    lm_head: str | None = "int8"
    group_size: int = DEFAULT_GROUP_SIZE
    packing: int = PACKING
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # the base class knows built-in methods only

    def __post_init__(self) -> None:
        for part in PARTS:
            if getattr(self, part) not in (None, *FORMATS):
                raise ValueError(f"{part} must be {', '.join(FORMATS)} or None, got {getattr(self, part)!r}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size!r}")
        if self.packing != PACKING:
            raise ValueError(f"weights are packed in layout {self.packing!r}, this version reads {PACKING}; upgrade")

    @classmethod
    def preset(cls, format: str, **overrides: Any) -> BlockFFNQuantizationConfig:
        """The default parts of a format: `int4` keeps embeddings and head, where errors are seen most, in int8."""
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
        return cls(**{"ffn": format, "attention": format, **overrides})
