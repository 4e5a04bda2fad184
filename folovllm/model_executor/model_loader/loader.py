"""Stream a source's tensors into a model, with a progress bar (vLLM: `model_loader/default_loader.py`).

At any moment the host holds the model (if it is on the CPU) and one tensor of the checkpoint, never two
models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from folovllm.model_executor.model_loader.source import ModelSource
from folovllm.model_executor.model_loader.weight_utils import default_weight_loader, initialize_dummy_weights

__all__ = ["default_weight_loader", "initialize_dummy_weights", "load_weights"]


def load_weights(model: nn.Module, source: ModelSource, *, use_tqdm: bool = True) -> float:
    """Load every tensor of `source` into `model` and return the seconds it took.

    `model.load_weights(iterable of (name, tensor)) -> set of loaded parameter names` does the naming (see
    `models/utils.py`); the parameters already exist in their final dtype and on their final device.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or there twice (all are listed), or a
            file is bad.
    """
    start = time.perf_counter()
    dtypes = {param.dtype for param in model.parameters() if param.dtype.is_floating_point}
    # Expanding quantized tensors straight to the model's type halves what is held besides the model.
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    with tqdm(
        total=source.num_weight_bytes(dtype),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=not use_tqdm,
    ) as bar:
        load: Any = model.load_weights
        loaded: set[str] = load(_counted(source.weights(dtype), bar))
    missing = sorted({name for name, _ in model.named_parameters()} - loaded)
    if missing:
        raise ValueError(f"model={source.name!r}: {describe('parameters were not loaded', missing)}.")
    return time.perf_counter() - start


def _counted(weights: Iterator[tuple[str, torch.Tensor]], bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on and move the bar after each."""
    for name, tensor in weights:
        nbytes = tensor.nbytes
        yield name, tensor
        del tensor  # before the next one is read
        bar.update(nbytes)


def describe(what: str, names: list[str], limit: int = 20) -> str:
    """Return "3 <what>: a, b, c", with at most `limit` of the names."""
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return f"{len(names)} {what}: {', '.join(names[:limit])}{more}"
