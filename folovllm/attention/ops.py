"""Reading and writing the paged KV cache (vLLM: `csrc/cache_kernels.cu`, `v1/attention/ops/`).

A layer's cache is [2, Nb, Bs, Hkv, D]. A token's slot is block id * Bs + offset inside the block, so that with blocks
and offsets merged into one dimension, where memory allows that, a slot is a row.
"""

from __future__ import annotations

import torch


def write_kv_cache(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store `key` and `value` [T, Hkv, D] in rows `slot_mapping` [T] (int64, all valid) of `kv_cache`, in place."""
    _, num_blocks, block_size, num_kv_heads, head_size = kv_cache.shape
    if not kv_cache.is_contiguous():  # blocks of this layer between those of others: blocks and offsets do not merge
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        kv_cache[0].index_put_((blocks, offsets), key)
        kv_cache[1].index_put_((blocks, offsets), value)
        return
    rows = kv_cache.view(2, num_blocks * block_size, num_kv_heads, head_size)
    rows[0].index_copy_(0, slot_mapping, key)
    rows[1].index_copy_(0, slot_mapping, value)


def gather_kv_cache(kv_cache: torch.Tensor, block_ids: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `seq_len` keys and values of the request that owns `block_ids`, each [seq_len, Hkv, D].

    A request that fits one block (a contiguous cache) gets views, others copies.
    """
    block_size = kv_cache.shape[2]
    num_blocks = -(-seq_len // block_size)
    if num_blocks == 1:
        pages = kv_cache[:, int(block_ids[0])]
    else:
        pages = kv_cache.index_select(1, block_ids[:num_blocks]).flatten(1, 2)
    return pages[0, :seq_len], pages[1, :seq_len]
