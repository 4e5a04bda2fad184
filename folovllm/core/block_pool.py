"""BlockPool: which blocks are free, who holds the others, and which cached content is forgotten first.

vLLM: `v1/core/block_pool.py`. Every block is in exactly one state, and "cached" is independent of it:

                 get_new_blocks (its old content is forgotten)
        free  ------------------------------------------------>  held by ref_cnt >= 1 requests
     ref_cnt 0 <------------------------------------------------
                 free_blocks, by the last holder                  touch: one more holder (a prefix cache hit),
        in the free queue; still cached if it has a hash          out of the free queue if it lay there
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from folovllm.core.kv_cache_utils import (
    BlockHash,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from folovllm.core.prefix_cache import BlockHashToBlockMap
from folovllm.request import Request
from folovllm.utils.common import init_logger

__all__ = ["BlockHashToBlockMap", "BlockPool"]

logger = init_logger(__name__)


class BlockPool:
    """All KV cache blocks. Block 0 is the null block: never allocated, so that 0 can mean "no block".

    Simplified (vLLM: KV events, metrics collector): `event_sink` alone sees what happens to blocks.
    """

    def __init__(self, num_gpu_blocks: int, enable_caching: bool, hash_block_size: int) -> None:
        """
        Args:
            num_gpu_blocks: blocks in the KV tensors, the null block included; at least 1.
            enable_caching: whether blocks may carry hashes.
            hash_block_size: tokens per hash; the same as tokens per block.
        """
        if num_gpu_blocks < 1:
            raise ValueError(f"num_gpu_blocks={num_gpu_blocks} must be at least 1: block 0 is the null block.")
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.hash_block_size = hash_block_size
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_gpu_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.null_block = self.free_block_queue.popleft()
        self.null_block.is_null = True
        self.event_sink: Callable[[str, list[int]], None] | None = None
        """Called with what happened (allocate, hit, release, free, cache, evict, reset) and to which block ids.

        A block that loses a holder is in "free" if that was its last one, else in "release". The order of the ids in
        "free" is that in which the uncached join the head of the free queue, and the cached its tail.
        """

    def get_cached_block(
        self, block_hash: BlockHash, kv_cache_group_ids: Sequence[int] = (0,)
    ) -> list[KVCacheBlock] | None:
        """Return the oldest cached block of `block_hash` for each group, or None where any group has none."""
        found: list[KVCacheBlock] = []
        for group_id in kv_cache_group_ids:
            key = make_block_hash_with_group_id(block_hash, group_id)
            block = self.cached_block_hash_to_block.get_one_block(key)
            if block is None:
                return None
            found.append(block)
        return found

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
    ) -> None:
        """Give blocks[num_cached_blocks:num_full_blocks] their hashes and make them findable.

        Called when a step that fills them is scheduled, before it has run: whoever hits them runs in the same
        or a later step, and a step writes all its keys and values before it reads any.

        Args:
            request: whose `block_hashes` names the blocks; it must know at least num_full_blocks.
            blocks: all blocks of the request, in order.
            num_cached_blocks: how many of them have their hash already.
            num_full_blocks: how many of them are full.
            block_size: tokens per block.
            kv_cache_group_id: part of the key.
        """
        assert block_size == self.hash_block_size
        if num_cached_blocks >= num_full_blocks:
            return
        hashes = request.block_hashes
        assert len(hashes) >= num_full_blocks
        for index in range(num_cached_blocks, num_full_blocks):
            block = blocks[index]
            if block.is_null:
                continue
            key = make_block_hash_with_group_id(hashes[index], kv_cache_group_id)
            block.set_block_hash(key)
            self.cached_block_hash_to_block.insert(key, block)
        if self.event_sink is not None:
            self.event_sink("cache", [b.block_id for b in blocks[num_cached_blocks:num_full_blocks]])

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take `num_blocks` from the head of the free queue, forget what they held, set their ref_cnt to 1.

        Raises:
            ValueError: fewer are free; nothing has changed.
        """
        if num_blocks > self.free_block_queue.num_free_blocks:
            raise ValueError(
                f"Cannot get {num_blocks} free blocks from the pool: "
                f"{self.free_block_queue.num_free_blocks} of {self.num_gpu_blocks} are free"
            )
        blocks = self.free_block_queue.popleft_n(num_blocks)
        for block in blocks:
            if block.block_hash is not None:
                self._maybe_evict_cached_block(block)
            block.ref_cnt = 1
        if self.event_sink is not None:
            self.event_sink("allocate", [b.block_id for b in blocks])
        return blocks

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        """Forget the content of `block` alone (equal blocks stay); return whether it was cached."""
        key = block.block_hash
        if key is None:
            return False
        block.reset_hash()
        if self.cached_block_hash_to_block.pop(key, block.block_id) is None:
            return False
        if self.event_sink is not None:
            self.event_sink("evict", [block.block_id])
        return True

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Forget the content of these blocks; who holds them keeps them."""
        for block_id in block_ids:
            self._maybe_evict_cached_block(self.blocks[block_id])

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add a holder to each block: a prefix cache hit. A free one leaves the free queue."""
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1
        if blocks and self.event_sink is not None:
            self.event_sink("hit", [b.block_id for b in blocks])

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Remove a holder from each block; those without any rejoin the free queue.

        Blocks without hash can never be hit again and go to the head, to be reused first; cached ones go to
        the tail, so that the least recently freed are forgotten first. Both keep the given order: pass a
        request's blocks in reverse, so that its tail is forgotten before the prefix that others may share.
        """
        cached: list[KVCacheBlock] = []
        uncached: list[KVCacheBlock] = []
        still_held: list[KVCacheBlock] = []
        for block in ordered_blocks:
            if block.is_null:
                continue
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (uncached if block.block_hash is None else cached).append(block)
            else:
                still_held.append(block)
        self.free_block_queue.prepend_n(uncached)
        self.free_block_queue.append_n(cached)
        if self.event_sink is not None:
            for kind, blocks in (("release", still_held), ("free", uncached + cached)):
                if blocks:
                    self.event_sink(kind, [block.block_id for block in blocks])

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. False, and no change, while any block but the null block is held."""
        num_used = self.num_gpu_blocks - 1 - self.get_num_free_blocks()
        if num_used:
            logger.warning("The prefix cache was not reset: %d blocks are in use.", num_used)
            return False
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        for block in self.blocks:
            block.reset_hash()
        if self.event_sink is not None:
            self.event_sink("reset", [])
        return True

    def get_num_free_blocks(self) -> int:
        """Return how many blocks can be allocated."""
        return self.free_block_queue.num_free_blocks

    def get_usage(self) -> float:
        """Return the share of blocks (without the null block) that requests hold, 0 to 1."""
        num_usable = self.num_gpu_blocks - 1
        return 1.0 - self.get_num_free_blocks() / num_usable if num_usable else 0.0
