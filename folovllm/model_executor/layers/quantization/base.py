"""The seam between layers and number formats: a layer owns a quant method, and models never mention one.

vLLM: `model_executor/layers/quantization/base_config.py`. A method makes a layer's parameters, may repack them once
they are loaded, and multiplies with them. A quantization format adds a QuantizationConfig and its method beside this
file; the layers do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from folovllm.utils import cpu_kernels

if TYPE_CHECKING:
    from folovllm.model_executor.layers.quantization.triton_gptq import PackedWeight


class LinearMethodBase(ABC):
    """How a linear layer stores its weight and multiplies with it."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, input_size: int, output_size: int) -> None:
        """Register the layer's parameters, in the current default dtype and device.

        A parameter that does not lie in memory like a weight [N, K] brings a `weight_loader` of its own (see
        models/utils.py); the others get the layer's.
        """

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack the parameters for speed; called once, after every weight is loaded."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x @ weight^T + bias, [T, output_size], for x [T, input_size]."""

    def cpu_weight(self, layer: nn.Module) -> cpu_kernels.CPUWeight | None:
        """Return the weight and bias as the CPU kernels of models/cpu_decoder.py take them; None: they do not."""
        return None

    def packed_weight(self, layer: nn.Module) -> PackedWeight | None:
        """Return the weight as the products of quantization/triton_gptq.py take it, to be fused; None: they do not."""
        return None


class QuantizationConfig(ABC):
    """One format, as a checkpoint's config describes it."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method for the layer called `prefix`; None: its weight is a plain one in this checkpoint.

        Raises:
            ValueError: the format cannot be used for this layer; the message names it.
        """


def get_quantization_config(hf_config: dict[str, Any]) -> QuantizationConfig | None:
    """Return the format that `hf_config` asks for; None for plain weights.

    Raises:
        ValueError: the checkpoint is quantized in a way that cannot be run.
    """
    config = hf_config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method == "gptq":
        from folovllm.model_executor.layers.quantization.gptq import GPTQConfig

        return GPTQConfig.from_config(config)
    raise ValueError(
        f"quantization_config: quant_method={method!r} cannot be run; use a GPTQ checkpoint (quant_method='gptq'), an "
        "unquantized one (safetensors in float32, float16 or bfloat16) or a GGUF file, whose weights are dequantized "
        "at load."
    )
