"""KVCacheManager: slots, hits, failure without side effects, freeing; the integrity check; the size of the cache."""

from __future__ import annotations

import pytest

from folovllm.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from folovllm.core.kv_cache_utils import (
    KVCacheBlock,
    estimate_max_model_len,
    get_kv_cache_configs,
    make_block_hash_with_group_id,
)
from folovllm.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from folovllm.request import Request
from tests.core_utils import (
    create_requests,
    make_kv_cache_config,
    make_manager,
    make_request,
    make_spec,
    make_vllm_config,
)

BS = 16


def prefill(manager: KVCacheManager, request: Request) -> KVCacheBlocks | None:
    """Admit a request as the scheduler does, all of it at once."""
    hits, num_hit_tokens = manager.get_computed_blocks(request)
    blocks = manager.allocate_slots(request, request.num_tokens - num_hit_tokens, num_hit_tokens, hits)
    if blocks is not None:
        request.num_computed_tokens = request.num_tokens
    return blocks


def snapshot(manager: KVCacheManager) -> object:
    """Everything a failed allocation must leave alone."""
    pool = manager.block_pool
    return (
        [(b.block_id, b.ref_cnt, b.block_hash) for b in pool.blocks],
        [b.block_id for b in pool.free_block_queue.get_all_free_blocks()],
        {i: [b.block_id for b in blocks] for i, blocks in manager.req_to_blocks.items()},
        dict(manager.num_cached_block),
        list(pool.cached_block_hash_to_block._cache),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("extra", "num_blocks"), [(-1, 0), (0, 0), (1, 1)])
def test_blocks_needed_at_block_boundaries(k: int, extra: int, num_blocks: int) -> None:
    manager = make_manager(BS)
    num_tokens = k * BS + extra
    blocks = prefill(manager, make_request("r", range(num_tokens)))
    assert blocks is not None
    assert blocks.get_block_ids() == (list(range(1, k + num_blocks + 1)),)
    assert manager.num_cached_block["r"] == num_tokens // BS
    manager.check_integrity()


def test_decode_gets_a_block_only_when_the_last_one_is_full() -> None:
    manager = make_manager(BS)
    request = make_request("r", range(BS - 1))
    prefill(manager, request)
    new_ids = []
    for token_id in range(2 * BS):
        request.append_output_token_ids(token_id)
        blocks = manager.allocate_slots(request, 1)
        assert blocks is not None
        new_ids += blocks.get_block_ids()[0]
        request.num_computed_tokens += 1
        manager.check_integrity()
    assert new_ids == [2, 3]
    assert manager.get_block_ids("r") == ([1, 2, 3],)
    assert manager.num_cached_block["r"] == request.num_tokens // BS  # blocks filled by decoding are cached


def test_second_request_shares_and_frees_by_reference_count() -> None:
    manager = make_manager(BS)
    common = [i // BS for i in range(3 * BS)]
    first, second = make_request("a", [*common, 7, 7]), make_request("b", [*common, 8])
    assert prefill(manager, first).get_block_ids() == ([1, 2, 3, 4],)
    hits, num_hit_tokens = manager.get_computed_blocks(second)
    assert (hits.get_block_ids(), num_hit_tokens) == (([1, 2, 3],), 3 * BS)
    assert [b.ref_cnt for b in hits.blocks[0]] == [1, 1, 1]  # looking changes nothing
    assert prefill(manager, second).get_block_ids() == ([5],)
    assert [b.ref_cnt for b in hits.blocks[0]] == [2, 2, 2]
    manager.check_integrity()
    manager.free(first)
    manager.free(second)
    order = [b.block_id for b in manager.block_pool.free_block_queue.get_all_free_blocks()]
    assert order == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]
    manager.check_integrity()


def test_eviction_takes_the_oldest_request_first_and_tails_before_heads() -> None:
    manager = make_manager(BS, num_blocks=7)
    old, new = make_request("old", [1] * 48), make_request("new", [2] * 48)
    for request in (old, new):
        prefill(manager, request)
    manager.free(old)
    manager.free(new)
    # Two blocks are needed: the last two of the older request go.
    prefill(manager, make_request("x", [3] * 32))
    assert manager.get_computed_blocks(make_request("old2", [1] * 49))[1] == 16
    assert manager.get_computed_blocks(make_request("new2", [2] * 49))[1] == 48


def test_a_hit_makes_a_free_block_young_again() -> None:
    manager = make_manager(BS, num_blocks=5)
    a, b = make_request("a", [1] * 17), make_request("b", [2] * 17)
    prefill(manager, a)
    prefill(manager, b)
    manager.free(a)
    manager.free(b)
    again = make_request("a2", [1] * 17)
    prefill(manager, again)
    manager.free(again)
    prefill(manager, make_request("c", [3] * 48))
    assert manager.get_computed_blocks(make_request("a3", [1] * 17))[1] == 16
    assert manager.get_computed_blocks(make_request("b2", [2] * 17))[1] == 0


def test_failed_allocation_has_no_side_effect() -> None:
    manager = make_manager(BS, num_blocks=7)
    holder, donor = make_request("holder", [1] * 40), make_request("donor", [2] * 33)
    prefill(manager, holder)
    prefill(manager, donor)
    manager.free(donor)  # its two full blocks stay cached in the free queue
    greedy = make_request("greedy", [2] * 33 + [3] * 20)  # hits 2, needs 4; only 3 are free, the hits among them
    hits, num_hit_tokens = manager.get_computed_blocks(greedy)
    assert num_hit_tokens == 32
    before = snapshot(manager)
    assert manager.allocate_slots(greedy, 21, num_hit_tokens, hits) is None
    assert snapshot(manager) == before
    assert manager.allocate_slots(holder, 100) is None
    assert snapshot(manager) == before
    # One fewer new block fits exactly: hits in the free queue were counted once, as hits.
    assert manager.allocate_slots(greedy, 16, num_hit_tokens, hits) is not None
    assert manager.block_pool.get_num_free_blocks() == 0
    manager.check_integrity()


def test_full_sequence_must_fit_looks_at_the_whole_prompt() -> None:
    manager = make_manager(BS, num_blocks=4)
    request = make_request("r", range(4 * BS))
    assert manager.allocate_slots(request, 8, full_sequence_must_fit=True) is None
    assert "r" not in manager.req_to_blocks
    assert manager.allocate_slots(request, 8).get_block_ids() == ([1],)
    fits = make_request("fits", range(100, 100 + 2 * BS))
    assert manager.allocate_slots(fits, 8, full_sequence_must_fit=True).get_block_ids() == ([2],)


def test_lookahead_and_max_model_len_bound_the_slots() -> None:
    manager = make_manager(BS, max_model_len=40)
    a, b = create_requests(2, 30)
    assert len(manager.allocate_slots(a, 30, num_lookahead_tokens=3).blocks[0]) == 3
    assert len(manager.allocate_slots(b, 30, num_lookahead_tokens=500).blocks[0]) == 3
    assert manager.num_cached_block[a.request_id] == 1


def test_empty_hits_may_be_passed_for_a_request_that_holds_blocks() -> None:
    manager = make_manager(BS)
    request = make_request("r", range(20))
    prefill(manager, request)
    assert manager.allocate_slots(request, 20, 0, KVCacheBlocks(([],))).get_block_ids() == ([3],)
    with pytest.raises(AssertionError, match="holds blocks already"):
        manager.allocate_slots(request, 40, 16, KVCacheBlocks(([manager.block_pool.blocks[9]],)))


@pytest.mark.badinput
@pytest.mark.parametrize("num_new_tokens", [0, -1])
def test_allocating_nothing_is_refused(num_new_tokens: int) -> None:
    with pytest.raises(ValueError, match="num_new_tokens"):
        make_manager(BS).allocate_slots(make_request("r", [1]), num_new_tokens)


@pytest.mark.badinput
def test_wrong_layouts_are_refused() -> None:
    spec = make_spec(BS)
    for groups in ([], [KVCacheGroupSpec(["a"], spec), KVCacheGroupSpec(["b"], spec)]):
        with pytest.raises(ValueError, match="kv_cache_groups"):
            KVCacheManager(KVCacheConfig(10, kv_cache_groups=groups), 100)
    with pytest.raises(ValueError, match="hash_block_size=8"):
        KVCacheManager(make_kv_cache_config(BS, 10), 100, hash_block_size=8)
    with pytest.raises(ValueError, match="scheduler_block_size=32"):
        KVCacheManager(make_kv_cache_config(BS, 10), 100, scheduler_block_size=32)


def test_free_keeps_the_list_object_and_forgets_the_request() -> None:
    manager = make_manager(BS)
    request = make_request("r", range(40))
    manager.free(request)  # unknown: nothing happens
    prefill(manager, request)
    blocks = manager.req_to_blocks["r"]
    manager.free(request)
    assert len(blocks) == 3
    assert "r" not in manager.req_to_blocks and "r" not in manager.num_cached_block
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == 10
    assert manager.get_blocks("r").get_block_ids() == ([],)


def test_without_caching_nothing_is_hashed_or_hit() -> None:
    manager = make_manager(BS, enable_caching=False)
    request = make_request("r", range(40))
    prefill(manager, request)
    manager.free(request)
    hits, num_hit_tokens = manager.get_computed_blocks(make_request("s", range(40)))
    assert (hits.blocks, num_hit_tokens) == (([],), 0)
    assert len(manager.block_pool.cached_block_hash_to_block) == 0
    assert manager.num_cached_block == {}
    manager.check_integrity()


def test_withdrawn_step_leaves_no_name_on_unwritten_blocks() -> None:
    manager = make_manager(BS)
    request = make_request("r", range(4 * BS))
    manager.allocate_slots(request, 2 * BS)
    request.num_computed_tokens = 2 * BS
    manager.allocate_slots(request, 2 * BS)  # names blocks 3 and 4; this step never runs
    manager.uncache_uncomputed_blocks(request)
    manager.free(request)
    assert manager.get_computed_blocks(make_request("s", range(4 * BS + 1)))[1] == 2 * BS
    manager.check_integrity()


def test_usage_and_blocks_add() -> None:
    manager = make_manager(BS)
    prefill(manager, make_request("r", range(5 * BS)))
    assert manager.usage == pytest.approx(0.5)
    a, b = KVCacheBlocks(([KVCacheBlock(1)],)), KVCacheBlocks(([KVCacheBlock(2)],))
    assert (a + b).get_block_ids() == ([1, 2],)


# --- check_integrity must notice every kind of damage ---


def _lose_reference(manager: KVCacheManager) -> None:
    manager.req_to_blocks["r"][0].ref_cnt += 1


def _free_while_held(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.append(manager.req_to_blocks["r"][0])


def _leak(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.popleft()


def _miscount(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.num_free_blocks += 1


def _cut_link(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.get_all_free_blocks()[2].prev_free_block = None


def _break_tail(manager: KVCacheManager) -> None:
    queue = manager.block_pool.free_block_queue
    queue.fake_free_list_tail.prev_free_block = queue.get_all_free_blocks()[0]


def _rename(manager: KVCacheManager) -> None:
    manager.req_to_blocks["r"][0].block_hash = make_block_hash_with_group_id(b"other", 0)


def _forget_in_map(manager: KVCacheManager) -> None:
    manager.block_pool.cached_block_hash_to_block._cache.popitem()


def _use_null(manager: KVCacheManager) -> None:
    manager.req_to_blocks["r"].append(manager.block_pool.null_block)
    manager.block_pool.null_block.ref_cnt += 1


def _name_null(manager: KVCacheManager) -> None:
    null, key = manager.block_pool.null_block, make_block_hash_with_group_id(b"x", 0)
    null.block_hash = key
    manager.block_pool.cached_block_hash_to_block.insert(key, null)


def _hold_twice(manager: KVCacheManager) -> None:
    manager.req_to_blocks["r"].append(manager.req_to_blocks["r"][0])


def _overcount_cached(manager: KVCacheManager) -> None:
    manager.num_cached_block["r"] = 99


def _stale_link(manager: KVCacheManager) -> None:
    manager.req_to_blocks["r"][0].next_free_block = manager.block_pool.blocks[9]


@pytest.mark.badinput
@pytest.mark.parametrize(
    "damage",
    [
        _lose_reference,
        _free_while_held,
        _leak,
        _miscount,
        _cut_link,
        _break_tail,
        _rename,
        _forget_in_map,
        _use_null,
        _name_null,
        _hold_twice,
        _overcount_cached,
        _stale_link,
    ],
)
def test_integrity_check_notices(damage: object) -> None:
    manager = make_manager(BS)
    prefill(manager, make_request("r", range(40)))
    manager.check_integrity()
    damage(manager)
    with pytest.raises(RuntimeError):
        manager.check_integrity()


def _take_a_block(manager: KVCacheManager, request: Request) -> None:
    manager.free(request)


def _miscount_tokens(manager: KVCacheManager, request: Request) -> None:
    request.num_tokens += 1


def _cache_late(manager: KVCacheManager, request: Request) -> None:
    manager.num_cached_block["r"] -= 1


@pytest.mark.badinput
@pytest.mark.parametrize("damage", [_take_a_block, _miscount_tokens, _cache_late])
def test_integrity_check_notices_what_is_wrong_with_a_running_request(damage: object) -> None:
    manager = make_manager(BS)
    request = make_request("r", range(40))
    prefill(manager, request)
    request.num_computed_tokens = 40
    manager.check_integrity([request])
    damage(manager, request)
    manager.check_integrity()
    with pytest.raises(RuntimeError, match="'r'"):
        manager.check_integrity([request])


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("enable_caching", [False, True])
def test_a_decode_that_has_its_slot_is_one_for_which_allocate_slots_does_nothing(
    block_size: int, enable_caching: bool
) -> None:
    """Beside the naive way: ask allocate_slots for every token, and see whether anything has changed."""
    manager = make_manager(block_size, num_blocks=100, enable_caching=enable_caching)
    request = make_request("r", range(5), block_size)
    manager.allocate_slots(request, 5)
    request.num_computed_tokens = 5
    answers = []
    for token in range(3 * block_size):
        request.append_output_token_ids(token)
        has_slot = manager.has_slot_for_next_token(request)
        num_cached = len(manager.block_pool.cached_block_hash_to_block)
        changed = bool(manager.allocate_slots(request, 1).blocks[0])
        changed |= len(manager.block_pool.cached_block_hash_to_block) > num_cached
        assert not (has_slot and changed)
        # Without caching a block that fills is no news, but it is asked for all the same.
        assert has_slot or changed or not enable_caching
        answers.append(has_slot)
        request.num_computed_tokens += 1
        manager.check_integrity([request])
    assert sum(answers) == 3 * max(0, block_size - 2)


# --- the size of the cache ---


def test_one_tensor_per_layer_and_the_smallest_worker_decides() -> None:
    config = make_vllm_config(max_model_len=64, max_num_batched_tokens=64)
    spec = make_spec(16, num_kv_heads=2, head_size=8)
    specs = {"a": spec, "b": spec}
    assert spec.page_size_bytes == 2 * 16 * 2 * 8 * 2
    block_bytes = 2 * spec.page_size_bytes
    configs = get_kv_cache_configs(config, [specs, specs], [20 * block_bytes, 12 * block_bytes + 5])
    assert configs[0] == configs[1]
    assert configs[0].num_blocks == 12
    assert [t.shared_by for t in configs[0].kv_cache_tensors] == [["a"], ["b"]]
    assert [t.size for t in configs[0].kv_cache_tensors] == [12 * spec.page_size_bytes] * 2
    assert configs[0].kv_cache_groups == [KVCacheGroupSpec(["a", "b"], spec)]


def test_layers_are_grouped_by_equal_spec_and_the_override_decides() -> None:
    config = make_vllm_config(max_model_len=64, max_num_batched_tokens=64)
    config.cache_config.num_gpu_blocks_override = 7
    wide, narrow = make_spec(16, head_size=8), make_spec(16, head_size=4)
    (result,) = get_kv_cache_configs(config, [{"a": wide, "b": narrow, "c": wide}], [1])
    assert result.num_blocks == 7
    assert [group.layer_names for group in result.kv_cache_groups] == [["a", "c"], ["b"]]


@pytest.mark.badinput
def test_too_little_memory_names_the_remedies() -> None:
    config = make_vllm_config(max_model_len=64, max_num_batched_tokens=64)
    specs = {"a": make_spec(16)}
    page = specs["a"].page_size_bytes
    # 64 tokens are 4 blocks, and one is the null block.
    assert get_kv_cache_configs(config, [specs], [5 * page])[0].num_blocks == 5
    with pytest.raises(ValueError, match=r"max seq len \(64\) needs 5 .*at most 48 fits.*kv_cache_memory"):
        get_kv_cache_configs(config, [specs], [4 * page])
    config.cache_config.num_gpu_blocks_override = 3
    with pytest.raises(ValueError, match=r"max seq len.*num_gpu_blocks_override"):
        get_kv_cache_configs(config, [specs], [100 * page])


def test_estimate_max_model_len() -> None:
    config = make_vllm_config(max_model_len=100, max_num_batched_tokens=100)
    specs = {"a": make_spec(16), "b": make_spec(16)}
    block_bytes = 2 * specs["a"].page_size_bytes
    assert estimate_max_model_len(config, specs, 3 * block_bytes) == 48
    assert estimate_max_model_len(config, specs, 300 * block_bytes) == 100
    assert estimate_max_model_len(config, specs, block_bytes - 1) == 0
