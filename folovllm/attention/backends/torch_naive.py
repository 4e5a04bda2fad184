"""Attention as its definition, one request at a time: the oracle that every other backend is tested against.

For each request: gather its pages, score every query against every earlier key in float32, mask the future,
softmax, weigh the values. vLLM's counterpart is `v1/attention/backends/cpu_attn.py`.
"""

from __future__ import annotations

import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from folovllm.attention.ops import gather_kv_cache, write_kv_cache

QUERY_CHUNK = 256
"""Queries scored at once, so that the [H, queries, context] scores of a long prompt stay small."""


class TorchNaiveBackend(AttentionBackend):
    """Runs everywhere torch does."""

    @staticmethod
    def get_name() -> str:
        """Return "torch_naive"."""
        return "torch_naive"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return TorchNaiveImpl."""
        return TorchNaiveImpl

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """Return []: any device, dtype, head size and block size will do."""
        return []


class TorchNaiveImpl(AttentionImpl):
    """The definition."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See AttentionImpl.forward."""
        assert key is not None and value is not None
        write_kv_cache(key, value, kv_cache, metadata.slot_mapping)
        starts = metadata.query_start_loc_cpu
        for b, seq_len in enumerate(metadata.seq_lens_cpu):
            keys, values = gather_kv_cache(kv_cache, metadata.block_table[b], seq_len)
            keys, values = keys.float(), values.float()
            first_position = seq_len - (starts[b + 1] - starts[b])
            for start in range(starts[b], starts[b + 1], QUERY_CHUNK):
                end = min(start + QUERY_CHUNK, starts[b + 1])
                position = first_position + start - starts[b]
                out[start:end] = self._attend(query[start:end], keys, values, position)
        return out

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int) -> torch.Tensor:
        """Attend with `query` [q, H, D], at positions `position`, `position` + 1, ..., to [S, Hkv, D] keys, values.

        Head h reads KV head h // (H / Hkv): the g query heads of a group share one.
        """
        num_queries, num_keys = query.shape[0], keys.shape[0]
        grouped = query.float().view(num_queries, self.num_kv_heads, -1, self.head_size)  # [q, Hkv, g, D]
        scores = torch.einsum("qkgd,skd->kgqs", grouped * self.scale, keys)
        if num_queries > 1:
            query_positions = torch.arange(position, position + num_queries, device=query.device)
            future = torch.arange(num_keys, device=query.device) > query_positions[:, None]  # [q, S]
            scores.masked_fill_(future, float("-inf"))
        attended = torch.einsum("kgqs,skd->qkgd", scores.softmax(dim=-1), values)
        return attended.reshape(num_queries, self.num_heads, self.head_size).to(query.dtype)
