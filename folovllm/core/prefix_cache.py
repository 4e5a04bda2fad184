"""The lookup side of prefix caching: block hash -> blocks with that content, and the longest cached prefix.

vLLM has these in `v1/core/block_pool.py` (BlockHashToBlockMap) and `single_type_kv_cache_manager.py`
(find_longest_cache_hit). The hashes themselves are made in kv_cache_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from folovllm.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
)


class BlockHashToBlockMap:
    """Key -> the blocks that hold this content, oldest first.

    Two requests that compute the same tokens side by side fill two blocks with one hash. Both are kept:
    replacing one by the other would rewrite a block table that the worker already has, and tables only ever
    grow. Such duplicates are rare, so a key normally maps to the block itself; only from the second block on
    to a dict id -> block (which then stays a dict). That spares the garbage collector one dict per cached
    block.
    """

    def __init__(self) -> None:
        self._cache: dict[BlockHashWithGroupId, KVCacheBlock | dict[int, KVCacheBlock]] = {}

    def get_one_block(self, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        """Return the block that was inserted first under `key`, or None."""
        entry = self._cache.get(key)
        if isinstance(entry, dict):
            return next(iter(entry.values()))
        return entry

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        """Add `block` under `key`."""
        entry = self._cache.get(key)
        if entry is None:
            self._cache[key] = block
        elif isinstance(entry, dict):
            entry[block.block_id] = block
        else:
            self._cache[key] = {entry.block_id: entry, block.block_id: block}

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        """Remove and return the block `block_id` under `key`; None, and no change, where it is not there."""
        entry = self._cache.get(key)
        if entry is None:
            return None
        if isinstance(entry, dict):
            block = entry.pop(block_id, None)
            if not entry:
                del self._cache[key]
            return block
        if entry.block_id != block_id:
            return None
        del self._cache[key]
        return entry

    def __len__(self) -> int:
        """Return the number of distinct keys."""
        return len(self._cache)

    def items(self) -> Iterator[tuple[BlockHashWithGroupId, KVCacheBlock]]:
        """Yield every (key, block) pair, duplicates one by one (O(n); for checks)."""
        for key, entry in self._cache.items():
            if isinstance(entry, dict):
                for block in entry.values():
                    yield key, block
            else:
                yield key, entry


def find_longest_cache_hit(
    block_map: BlockHashToBlockMap, block_hashes: Sequence[BlockHash], max_num_blocks: int, group_id: int = 0
) -> list[KVCacheBlock]:
    """Return the cached blocks of the longest prefix of `block_hashes`, at most `max_num_blocks` of them.

    Changes nothing. O(length of the hit): a hash names the whole prefix up to its block, so the first miss
    ends the search.
    """
    # A long prompt looks up hundreds of blocks: get_one_block, without its calls.
    lookup = block_map._cache.get
    group = group_id.to_bytes(4, "big")
    hits: list[KVCacheBlock] = []
    for block_hash in block_hashes[:max_num_blocks]:
        entry = lookup(BlockHashWithGroupId(block_hash + group))
        if entry is None:
            break
        hits.append(next(iter(entry.values())) if isinstance(entry, dict) else entry)
    return hits
