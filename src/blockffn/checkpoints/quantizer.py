"""Makes `from_pretrained` and `save_pretrained` take packed weights, through Hugging Face's registry of quantizers.

Registered by `import blockffn`. What is imported here is light, because transformers' own modules are half imported
when this one is.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from blockffn.checkpoints.quantization_config import QUANT_METHOD, BlockFFNQuantizationConfig


class BlockFFNQuantizer(HfQuantizer):
    """Loads packed folders, or packs a plain one while it is loaded (`quantization_config=` given by the caller).

    On a device other than the CPU there are no kernels for packed weights: the model is unpacked there, to its dtype,
    with a warning.
    """

    requires_calibration = False
    quantization_config: BlockFFNQuantizationConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from blockffn.checkpoints.quantize import check_model, replace_with_empty

        check_model(model)
        if self.pre_quantized:
            replace_with_empty(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from blockffn.checkpoints.quantize import pack_model, settle

        if not self.pre_quantized:
            pack_model(model, self.quantization_config)
        settle(model)
        if model.device.type not in ("cpu", "meta"):
            warnings.warn(
                f"there are no kernels for packed weights on {model.device.type}: unpacked to {model.dtype}",
                stacklevel=2,
            )
            self.dequantize(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from blockffn.checkpoints.quantize import unpack_model

        unpack_model(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        model.config._is_quantized = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(BlockFFNQuantizer)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(BlockFFNQuantizationConfig)
