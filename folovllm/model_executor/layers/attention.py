"""Attention: one layer's place in the model, and its part of the KV cache (vLLM: `attention/layer.py`)."""

from __future__ import annotations

import torch
from torch import nn

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata


class Attention(nn.Module):
    """Hands queries, keys and values of a step to the backend, with this layer's cache.

    `kv_cache` [2, Nb, Bs, Hkv, D] is bound by the worker once it knows the number of blocks; until then it is empty
    and forward must not be called.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        attn_backend: type[AttentionBackend],
        prefix: str,
    ) -> None:
        """`prefix` is the layer's full name, by which its cache is known."""
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.layer_name = prefix
        self.written_kv_device = attn_backend.written_kv_device
        self.impl = attn_backend.get_impl_cls()(num_heads, head_size, scale, num_kv_heads)
        self.kv_cache = torch.empty(0)
        self.k_scale = self.v_scale = 1.0
        """An fp8 cache holds key / k_scale and value / v_scale. Simplified (vLLM: calibrated scales): always 1."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Return the attended values [T, H * D] for query [T, H, D], key and value [T, Hkv, D].

        None for both means that they are in the cache already (AttentionBackend.written_kv_device).
        """
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        return self.impl.forward(query, key, value, self.kv_cache, attn_metadata, out).flatten(1)
