"""Free queue, hash -> block map, block pool: order of reuse, reference counts, eviction."""

from __future__ import annotations

import random

import pytest

from folovllm.core.block_pool import BlockHashToBlockMap, BlockPool
from folovllm.core.kv_cache_utils import (
    BlockHash,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from tests.core_utils import make_request

BLOCK_SIZE = 4


def make_queue(n: int) -> tuple[FreeKVCacheBlockQueue, list[KVCacheBlock]]:
    blocks = [KVCacheBlock(i) for i in range(n)]
    return FreeKVCacheBlockQueue(blocks), blocks


def ids(blocks: list[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def free_ids(pool: BlockPool) -> list[int]:
    return ids(pool.free_block_queue.get_all_free_blocks())


def key(name: str, group_id: int = 0) -> bytes:
    return make_block_hash_with_group_id(BlockHash(name.encode()), group_id)


# --- the queue ---


def test_queue_starts_in_the_given_order_between_its_sentinels() -> None:
    queue, blocks = make_queue(3)
    assert queue.num_free_blocks == 3
    assert queue.get_all_free_blocks() == blocks
    assert queue.fake_free_list_head.next_free_block is blocks[0]
    assert blocks[0].prev_free_block is queue.fake_free_list_head
    assert queue.fake_free_list_tail.prev_free_block is blocks[2]
    assert blocks[2].next_free_block is queue.fake_free_list_tail


def test_empty_queue_links_its_sentinels_and_refuses_popleft() -> None:
    queue, _ = make_queue(0)
    assert queue.fake_free_list_head.next_free_block is queue.fake_free_list_tail
    with pytest.raises(ValueError, match=r"^No free blocks available$"):
        queue.popleft()
    with pytest.raises(ValueError, match="No free blocks available"):
        make_queue(2)[0].popleft_n(3)


def test_popleft_takes_from_the_front_and_clears_links() -> None:
    queue, blocks = make_queue(2)
    assert queue.popleft() is blocks[0]
    assert blocks[0].prev_free_block is None and blocks[0].next_free_block is None
    assert queue.popleft() is blocks[1]
    assert queue.num_free_blocks == 0
    assert queue.fake_free_list_tail.prev_free_block is queue.fake_free_list_head


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_popleft_n_keeps_order(n: int) -> None:
    queue, blocks = make_queue(5)
    popped = queue.popleft_n(n)
    assert popped == blocks[:n]
    assert all(b.prev_free_block is None and b.next_free_block is None for b in popped)
    assert queue.get_all_free_blocks() == blocks[n:]
    assert queue.num_free_blocks == 5 - n


def test_remove_from_front_middle_and_end() -> None:
    queue, blocks = make_queue(5)
    for i in (2, 0, 4):
        queue.remove(blocks[i])
        assert blocks[i].prev_free_block is None and blocks[i].next_free_block is None
    assert ids(queue.get_all_free_blocks()) == [1, 3]
    assert queue.num_free_blocks == 2
    with pytest.raises(RuntimeError, match="not in the free queue"):
        queue.remove(blocks[2])


def test_append_and_prepend_keep_the_given_order() -> None:
    queue, blocks = make_queue(6)
    queue.popleft_n(6)
    queue.append(blocks[0])
    queue.append_n([blocks[3], blocks[2]])
    queue.prepend_n([blocks[5], blocks[4]])
    queue.append_n([])
    queue.prepend_n([])
    assert ids(queue.get_all_free_blocks()) == [5, 4, 0, 3, 2]
    assert queue.num_free_blocks == 5


def test_append_n_to_a_broken_tail_changes_nothing() -> None:
    queue, _ = make_queue(0)
    block = KVCacheBlock(7)
    queue.fake_free_list_tail.prev_free_block = None
    with pytest.raises(AssertionError):
        queue.append_n([block])
    assert queue.num_free_blocks == 0
    assert block.prev_free_block is None and block.next_free_block is None
    assert queue.fake_free_list_head.next_free_block is queue.fake_free_list_tail


def test_queue_equals_a_plain_list_under_random_operations() -> None:
    rng = random.Random(0)
    queue, blocks = make_queue(20)
    model = list(blocks)
    for _ in range(2000):
        n = rng.randint(0, 4)
        outside = [b for b in blocks if b not in model]
        match rng.randrange(4):
            case 0 if n <= len(model):
                assert queue.popleft_n(n) == model[:n]
                del model[:n]
            case 1 if model:
                block = rng.choice(model)
                queue.remove(block)
                model.remove(block)
            case 2:
                queue.append_n(outside[:n])
                model += outside[:n]
            case 3:
                queue.prepend_n(outside[:n])
                model[:0] = outside[:n]
        assert queue.get_all_free_blocks() == model
        assert queue.num_free_blocks == len(model)


def test_blocks_are_slotted_compared_by_identity_and_print_briefly() -> None:
    _, blocks = make_queue(3)
    assert not hasattr(blocks[0], "__dict__")
    assert KVCacheBlock(1) != KVCacheBlock(1)
    assert "prev=0" in repr(blocks[1]) and "next=2" in repr(blocks[1])
    blocks[0].set_block_hash(key("a"))
    with pytest.raises(AssertionError):
        blocks[0].set_block_hash(key("b"))
    blocks[0].reset_hash()
    assert blocks[0].block_hash is None


# --- the map ---


def test_map_holds_the_block_itself_then_a_dict_that_stays_one() -> None:
    cache = BlockHashToBlockMap()
    a, b, k = KVCacheBlock(3), KVCacheBlock(1), key("k")
    cache.insert(k, a)
    assert cache._cache == {k: a}
    cache.insert(k, b)
    assert cache._cache == {k: {3: a, 1: b}}
    assert cache.get_one_block(k) is a  # the oldest, not the smallest id
    assert len(cache) == 1
    assert cache.pop(k, 3) is a
    assert cache._cache == {k: {1: b}}
    assert cache.get_one_block(k) is b
    assert cache.pop(k, 1) is b
    assert cache._cache == {} and len(cache) == 0


def test_map_pop_of_what_is_not_there_changes_nothing() -> None:
    cache = BlockHashToBlockMap()
    a, k = KVCacheBlock(3), key("k")
    assert cache.pop(k, 3) is None and cache.get_one_block(k) is None
    cache.insert(k, a)
    assert cache.pop(k, 4) is None
    assert cache.get_one_block(k) is a
    cache.insert(k, KVCacheBlock(4))
    assert cache.pop(k, 5) is None
    assert list(cache._cache[k]) == [3, 4]
    assert [block.block_id for _, block in cache.items()] == [3, 4]


# --- the pool ---


def test_pool_reserves_block_zero() -> None:
    pool = BlockPool(5, enable_caching=True, hash_block_size=BLOCK_SIZE)
    assert ids(pool.blocks) == [0, 1, 2, 3, 4]
    assert pool.null_block is pool.blocks[0] and pool.null_block.is_null
    assert free_ids(pool) == [1, 2, 3, 4]
    assert pool.get_num_free_blocks() == 4 and pool.get_usage() == 0.0
    pool.touch([pool.null_block])
    pool.free_blocks([pool.null_block])
    assert pool.null_block.ref_cnt == 0
    assert free_ids(pool) == [1, 2, 3, 4]


@pytest.mark.badinput
def test_pool_refuses_impossible_sizes_and_requests() -> None:
    with pytest.raises(ValueError, match="num_gpu_blocks=0"):
        BlockPool(0, enable_caching=True, hash_block_size=BLOCK_SIZE)
    pool = BlockPool(3, enable_caching=True, hash_block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match="Cannot get 3 free blocks"):
        pool.get_new_blocks(3)
    assert pool.get_num_free_blocks() == 2
    assert BlockPool(1, enable_caching=False, hash_block_size=BLOCK_SIZE).get_usage() == 0.0


def test_freed_blocks_without_hash_are_reused_first_cached_ones_last() -> None:
    pool = BlockPool(8, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(10), block_size=BLOCK_SIZE)  # 2 full blocks and a half one
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 2, BLOCK_SIZE, 0)
    assert [b.ref_cnt for b in blocks] == [1, 1, 1]
    assert pool.get_usage() == pytest.approx(3 / 7)
    pool.free_blocks(reversed(blocks))
    assert free_ids(pool) == [3, 4, 5, 6, 7, 2, 1]
    assert len(pool.cached_block_hash_to_block) == 2


def test_touch_takes_a_free_block_out_of_the_queue_and_counts() -> None:
    pool = BlockPool(4, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(4), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(request, blocks, 0, 1, BLOCK_SIZE, 0)
    pool.touch(blocks)
    assert blocks[0].ref_cnt == 2
    pool.free_blocks(blocks)
    assert blocks[0].ref_cnt == 1 and free_ids(pool) == [2, 3]
    pool.free_blocks(blocks)
    assert free_ids(pool) == [2, 3, 1]
    pool.touch(blocks)
    assert blocks[0].ref_cnt == 1 and free_ids(pool) == [2, 3]
    assert pool.get_cached_block(request.block_hashes[0], [0]) == blocks


def test_allocation_evicts_and_duplicates_survive_each_other() -> None:
    pool = BlockPool(3, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(4), block_size=BLOCK_SIZE)
    twin = make_request("t", range(4), block_size=BLOCK_SIZE)
    (first,), (second,) = pool.get_new_blocks(1), pool.get_new_blocks(1)
    pool.cache_full_blocks(request, [first], 0, 1, BLOCK_SIZE, 0)
    pool.cache_full_blocks(twin, [second], 0, 1, BLOCK_SIZE, 0)
    block_hash = request.block_hashes[0]
    assert pool.get_cached_block(block_hash) == [first]
    pool.free_blocks([first])
    (again,) = pool.get_new_blocks(1)
    assert again is first and first.block_hash is None
    assert pool.get_cached_block(block_hash) == [second]
    assert pool._maybe_evict_cached_block(second)
    assert not pool._maybe_evict_cached_block(second)
    assert pool.get_cached_block(block_hash) is None
    assert len(pool.cached_block_hash_to_block) == 0


def test_get_cached_block_needs_every_group() -> None:
    pool = BlockPool(3, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(4), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks(request, blocks, 0, 1, BLOCK_SIZE, 0)
    assert pool.get_cached_block(request.block_hashes[0], [0]) == blocks
    assert pool.get_cached_block(request.block_hashes[0], [0, 1]) is None


def test_cache_full_blocks_skips_cached_ones_and_an_empty_range() -> None:
    pool = BlockPool(5, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(12), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 1, BLOCK_SIZE, 0)
    pool.cache_full_blocks(request, blocks, 1, 1, BLOCK_SIZE, 0)
    pool.cache_full_blocks(request, blocks, 1, 3, BLOCK_SIZE, 0)
    expected = [make_block_hash_with_group_id(h, 0) for h in request.block_hashes]
    assert [b.block_hash for b in blocks] == expected


def test_evict_blocks_forgets_content_but_takes_nothing_away() -> None:
    pool = BlockPool(4, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(8), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 2, BLOCK_SIZE, 0)
    pool.evict_blocks([2, 3])
    assert pool.get_cached_block(request.block_hashes[1]) is None
    assert pool.get_cached_block(request.block_hashes[0]) == [blocks[0]]
    assert [b.ref_cnt for b in blocks] == [1, 1]


def test_reset_needs_every_block_to_be_free() -> None:
    pool = BlockPool(4, enable_caching=True, hash_block_size=BLOCK_SIZE)
    request = make_request("r", range(8), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 2, BLOCK_SIZE, 0)
    assert not pool.reset_prefix_cache()
    assert len(pool.cached_block_hash_to_block) == 2
    pool.free_blocks(reversed(blocks))
    assert pool.reset_prefix_cache()
    assert len(pool.cached_block_hash_to_block) == 0
    assert all(b.block_hash is None for b in pool.blocks)


def test_event_sink_sees_the_life_of_a_block() -> None:
    pool = BlockPool(3, enable_caching=True, hash_block_size=BLOCK_SIZE)
    events: list[tuple[str, list[int]]] = []
    pool.event_sink = lambda what, block_ids: events.append((what, block_ids))
    request = make_request("r", range(4), block_size=BLOCK_SIZE)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 1, BLOCK_SIZE, 0)
    pool.touch(blocks[:1])
    pool.free_blocks(blocks[:1])
    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(2)
    pool.free_blocks(pool.blocks[1:])
    pool.reset_prefix_cache()
    assert events == [
        ("allocate", [1, 2]),
        ("cache", [1]),
        ("hit", [1]),
        ("release", [1]),
        ("free", [2, 1]),
        ("evict", [1]),
        ("allocate", [2, 1]),
        ("free", [1, 2]),
        ("reset", []),
    ]
