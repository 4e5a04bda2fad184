"""get_model: from a config to a model ready to run (vLLM: `model_loader/base_loader.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import BatchInvariantLinearMethod, LinearBase, UnquantizedLinearMethod
from folovllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from folovllm.model_executor.model_loader.loader import initialize_dummy_weights, load_weights
from folovllm.model_executor.models.registry import get_model_class

if TYPE_CHECKING:
    from folovllm.attention.backends.abstract import AttentionBackend
    from folovllm.config import ModelConfig
    from folovllm.model_executor.layers.quantization import QuantizationConfig
    from folovllm.model_executor.model_loader.source import ModelSource
    from folovllm.model_executor.models.llama import LlamaForCausalLM


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default inside the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def get_model(
    model_config: ModelConfig,
    source: ModelSource,
    attn_backend: type[AttentionBackend],
    quant_config: QuantizationConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    use_tqdm: bool = True,
) -> LlamaForCausalLM:
    """Build the model of `model_config` on `device`, fill it from `source`, repack its weights for speed.

    Parameters are allocated once, in their final dtype and place; tensors stream into them one at a time.

    Raises:
        ValueError: unknown architecture, or tensors missing, unexpected or wrongly shaped.
    """
    model_class = get_model_class(model_config.architecture)
    with default_dtype(dtype), device:
        model = model_class(model_config, attn_backend, quant_config)
    if model_config.load_format == "dummy":
        initialize_dummy_weights(model, model_config.seed)
    else:
        load_weights(model, source, use_tqdm=use_tqdm)
    process_weights_after_loading(model)
    if model_config.deterministic:
        make_batch_invariant(model)
    return model.eval()


def make_batch_invariant(model: nn.Module) -> None:
    """Multiply with one tile for every number of rows, in all layers and the LM head.

    Raises:
        ValueError: a layer is quantized: its kernels have no such mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            if type(module.quant_method) is not UnquantizedLinearMethod:
                raise ValueError(f"deterministic=True: {name} is quantized, which has no batch-invariant kernel.")
            module.quant_method = BatchInvariantLinearMethod()
        elif isinstance(module, ParallelLMHead):
            module.deterministic = True


def process_weights_after_loading(model: nn.Module) -> None:
    """Let every layer repack its weights, one layer at a time so that peak memory grows by one layer only."""
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
        elif isinstance(module, (ParallelLMHead, RMSNorm)):
            module.process_weights_after_loading()
