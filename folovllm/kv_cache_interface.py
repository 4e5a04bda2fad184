"""What the KV cache looks like, as the scheduler and the worker agree on it (vLLM: `v1/kv_cache_interface.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FullAttentionSpec:
    """One layer's cache: every earlier token is kept. Simplified (vLLM: KVCacheSpec tree): full attention only."""

    block_size: int
    """Tokens per block (Bs)."""
    num_kv_heads: int
    """Hkv."""
    head_size: int
    """D."""
    dtype: torch.dtype
    """Element type of keys and values."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block of this layer: keys and values."""
        return 2 * self.block_size * self.num_kv_heads * self.head_size * self.dtype.itemsize


@dataclass
class KVCacheTensor:
    """One allocation."""

    size: int
    """Bytes."""
    shared_by: list[str]
    """Layer names that use it; one here."""


@dataclass
class KVCacheGroupSpec:
    """Layers that share one block table."""

    layer_names: list[str]
    """Names of the attention layers of the group."""
    kv_cache_spec: FullAttentionSpec
    """Their common spec."""


@dataclass
class KVCacheConfig:
    """The whole cache of one worker."""

    num_blocks: int
    """Blocks in the pool, the null block included."""
    kv_cache_tensors: list[KVCacheTensor] = field(default_factory=list)
    """One per layer."""
    kv_cache_groups: list[KVCacheGroupSpec] = field(default_factory=list)
    """One group: all our models' layers use full attention."""
