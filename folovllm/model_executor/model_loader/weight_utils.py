"""The default way to fill a parameter, and random weights (vLLM: `model_loader/weight_utils.py`)."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

NOISE_LENGTH = 1_000_003
"""Random numbers of a dummy weight: enough to look random, prime so that no row length divides it and no two rows are
alike."""
_SCALE = 0.02


class InvalidTensor(ValueError):
    """Raised by weight loaders: the shape is right, but the type or the numbers cannot be used."""


def default_weight_loader(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
    """Copy a tensor into a parameter of the same shape, converting to its dtype and device (vLLM: same name).

    Raises:
        ValueError: the shapes differ.
    """
    if param.shape != loaded_weight.shape:
        raise ValueError(f"expected shape {tuple(param.shape)}, got {tuple(loaded_weight.shape)}")
    param.data.copy_(loaded_weight)


@torch.no_grad()
def initialize_dummy_weights(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter in place with small random numbers that depend on `seed` and its name only.

    Matrices get uniform noise in [-0.02, 0.02), vectors called "...norm.weight" ones plus that noise, integer
    tensors zeros. The noise is drawn once per parameter on the CPU and repeated, so that large models take
    seconds and every device and dtype has the same weights up to rounding (vLLM: same name, drawn on the
    device). A parameter that has an attribute `fill_dummy` is left to `fill_dummy(param, generator)`.
    """
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        fill: Any = getattr(param, "fill_dummy", None)
        if fill is not None:
            fill(param, generator)
            continue
        if not param.dtype.is_floating_point:
            param.zero_()
            continue
        length = min(param.numel(), NOISE_LENGTH)
        noise = (torch.rand(length, generator=generator) * 2 - 1) * _SCALE
        if name.endswith("norm.weight"):
            noise += 1
        noise = noise.to(device=param.device, dtype=param.dtype)
        flat = param.view(-1)
        for start in range(0, flat.numel(), NOISE_LENGTH):
            part = flat[start : start + NOISE_LENGTH]
            part.copy_(noise[: part.numel()])
