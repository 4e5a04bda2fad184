"""The seam between models and attention kernels (vLLM: `v1/attention/backend.py`).

A backend says what it supports, gives the cache's shape and an implementation. Metadata is built once a step by the
model runner and passed down explicitly: no global forward context.

Legend: T tokens in the step, B requests, H heads, Hkv KV heads, D head size, Nb blocks, Bs block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch


@dataclass
class AttentionMetadata:
    """Where each token of the step sits. Valid for one forward pass; shared by all layers, changed by none.

    The tokens of request b are rows query_start_loc[b] to query_start_loc[b + 1]; they are the last ones of its
    seq_lens[b] tokens, so row i of its q_len rows sees seq_lens[b] - q_len + i + 1 tokens.
    """

    num_actual_tokens: int
    """T."""
    num_reqs: int
    """B."""
    max_query_len: int
    """Most tokens of one request in this step; 1 means a pure decode step."""
    max_seq_len: int
    """Longest context of the step."""
    query_start_loc: torch.Tensor
    """[B + 1] int32 on the device."""
    seq_lens: torch.Tensor
    """[B] int32 on the device, the step's tokens included."""
    block_table: torch.Tensor
    """[B, max blocks] int32 on the device: block ids of each request, in order."""
    slot_mapping: torch.Tensor
    """[T] int64 on the device: block id * Bs + offset, where each token's key and value go."""
    query_start_loc_cpu: list[int]
    """query_start_loc on the host, so that no backend has to wait for the device."""
    seq_lens_cpu: list[int]
    """seq_lens on the host."""
    output_rows: torch.Tensor | None = field(default=None, kw_only=True)
    """[n] int64 or int32 on the device, ascending: tokens whose hidden states are read after the last layer; None: all.

    The last layer computes keys and values of the others, and leaves it at that. vLLM computes all, then selects.
    """


class AttentionImpl(ABC):
    """One layer's attention."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int) -> None:
        """`scale` multiplies the scores, usually D ** -0.5; num_heads must be a multiple of num_kv_heads."""
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write `key` and `value` [T, Hkv, D] into `kv_cache`, then attend with `query` [T, H, D].

        On its `written_kv_device` a backend also accepts None for both: they are in the cache already.

        Mutates kv_cache at metadata.slot_mapping, and `out` [T, H, D], which it returns.
        """


class AttentionBackend(ABC):
    """What the selector and the worker need to know of a backend before any layer exists."""

    written_kv_device: ClassVar[str | None] = None
    """Type of device on which attention may run on keys and values that a fused kernel has written to the cache."""
    reads_fp8: ClassVar[bool] = False
    """Whether the cache may be float8_e4m3fn."""

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """Return the name users select it by."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return the implementation."""

    @classmethod
    @abstractmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """Return why this backend cannot run such a model here; empty if it can."""

    @classmethod
    def build_metadata(cls, common: AttentionMetadata, block_size: int, dtype: torch.dtype) -> AttentionMetadata:
        """Return `common` with whatever this backend works out once a step for all layers; nothing by default."""
        return common

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """Return one layer's cache shape: [2 (keys, values), Nb, Bs, Hkv, D]."""
        return (2, num_blocks, block_size, num_kv_heads, head_size)
