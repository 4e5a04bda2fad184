"""Rotary position embedding, RoFormer (Su et al. 2021), with the scalings that long-context models need.

vLLM: `model_executor/layers/rotary_embedding/`. Pair (i, i + D/2) of a head is turned by the angle
position * inv_freq[i]. inv_freq[i] = base ** (-2 i / D), changed by the scaling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


def compute_inv_freq(
    head_size: int, base: float, rope_scaling: dict[str, Any] | None, factors: list[float] | None = None
) -> torch.Tensor:
    """Return inv_freq [D / 2] float32.

    Args:
        head_size: D.
        base: rope_theta.
        rope_scaling: the config's, or None; `rope_type` (old name `type`) is one of SUPPORTED_ROPE_TYPES.
        factors: D / 2 divisors, which GGUF files of Llama 3.x carry in place of the scaling's parameters.

    Raises:
        ValueError: another rope type, or a missing parameter.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size
    inv_freq = 1.0 / (base**exponent)
    if factors is not None:
        return inv_freq / torch.tensor(factors, dtype=torch.float32, device="cpu")
    if rope_scaling is None:
        return inv_freq
    rope_type = rope_scaling.get("rope_type") or rope_scaling.get("type") or "default"
    if rope_type == "default":
        return inv_freq
    if rope_type == "linear":
        return inv_freq / _parameter(rope_scaling, "factor")
    if rope_type == "llama3":
        return _llama3_inv_freq(inv_freq, rope_scaling)
    raise ValueError(
        f"rope_scaling: rope_type={rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}."
    )


def _parameter(rope_scaling: dict[str, Any], name: str) -> float:
    value = rope_scaling.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"rope_scaling: {name}={value!r} must be a number above 0.")
    return float(value)


def _llama3_inv_freq(inv_freq: torch.Tensor, rope_scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths divided by factor, short ones kept, those between interpolated."""
    factor = _parameter(rope_scaling, "factor")
    low_freq_factor = _parameter(rope_scaling, "low_freq_factor")
    high_freq_factor = _parameter(rope_scaling, "high_freq_factor")
    original_len = _parameter(rope_scaling, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    # 0 where a wavelength exceeds original_len / low_freq_factor, 1 where it is below original_len / high_freq_factor.
    smooth = (original_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


class RotaryEmbedding(nn.Module):
    """Turns queries and keys; one object serves all layers of a model."""

    def __init__(self, head_size: int, max_position: int, inv_freq: torch.Tensor) -> None:
        """Make the tables of cosines and sines [max_position, D] once: float32 arithmetic, default dtype."""
        super().__init__()
        self.head_size = head_size
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device="cpu"), inv_freq)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        # The sine's first half is negated so that rotating is x * cos + swapped halves of x * sin.
        cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
        sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
        self.register_buffer("cos_sin_cache", torch.stack((cos, sin)).to(device, dtype), persistent=False)
        self.cos_sin_cache: torch.Tensor

    def gather(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [T, 1, D] at positions [T] (int64), once a step for all layers."""
        cos, sin = self.cos_sin_cache[:, positions].unsqueeze(2)
        return cos, sin

    def forward(self, cos: torch.Tensor, sin: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Return `heads` [T, n, D], n heads, turned by their tokens' angles; cos and sin come from gather."""
        first, second = heads.chunk(2, dim=-1)
        return torch.addcmul(heads * cos, torch.cat((second, first), dim=-1), sin)
