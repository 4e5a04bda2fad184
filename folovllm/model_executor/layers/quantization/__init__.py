"""Number formats of linear layers: the seam (base.py) and GPTQ (gptq.py, packing.py)."""

from __future__ import annotations

from folovllm.model_executor.layers.quantization.base import (
    LinearMethodBase,
    QuantizationConfig,
    get_quantization_config,
)

__all__ = ["LinearMethodBase", "QuantizationConfig", "get_quantization_config"]
