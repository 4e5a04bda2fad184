"""Prefix caching: the hash chain, NONE_HASH, salts, longest match, full-prompt hits, statistics, reset."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import folovllm.core.kv_cache_utils as kv_cache_utils
from folovllm.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    get_block_hash,
    get_group_id,
    get_request_block_hasher,
    hash_block_tokens,
    init_none_hash,
    make_block_hash_with_group_id,
)
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.utils.common import sha256, sha256_blocks, sha256_packed_blocks
from tests.core_utils import FakeEngine, create_scheduler, expected_tokens, make_request

BS = 4
ROOT = Path(__file__).parents[2]


@pytest.fixture
def _restore_none_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", kv_cache_utils.NONE_HASH)


def caching_engine(**args: Any) -> FakeEngine:
    use_async = args.get("use_async", False)
    scheduler = create_scheduler(block_size=BS, enable_prefix_caching=True, log_stats=True, **args)
    return FakeEngine(scheduler, depth=1 if use_async else 0)


def num_hits(engine: FakeEngine, request: Request) -> int:
    return engine.scheduler.kv_cache_manager.get_computed_blocks(request)[1]


# --- hashes ---


def test_key_packs_and_unpacks() -> None:
    block_hash = BlockHash(sha256("x"))
    for group_id in (0, 1, 2**32 - 1):
        packed = make_block_hash_with_group_id(block_hash, group_id)
        assert isinstance(packed, bytes)
        assert (get_block_hash(packed), get_group_id(packed)) == (block_hash, group_id)


@pytest.mark.usefixtures("_restore_none_hash")
def test_none_hash_is_random_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    init_none_hash(sha256)
    first = kv_cache_utils.NONE_HASH
    init_none_hash(sha256)
    assert isinstance(first, bytes) and first and first != kv_cache_utils.NONE_HASH


def test_none_hash_survives_a_reload() -> None:
    # In a process of its own: the reload replaces classes that other tests have imported.
    program = """
import importlib
import folovllm.core.kv_cache_utils as utils
from folovllm.utils.common import sha256, sha256_blocks, sha256_packed_blocks
from tests.core_utils import make_manager, make_request

request, before = make_request("r", range(16)), utils.NONE_HASH
utils = importlib.reload(utils)
assert utils.NONE_HASH == before
manager = make_manager()
manager.allocate_slots(request, 16)
assert manager.get_computed_blocks(make_request("s", range(17)))[1] == 16
utils.init_none_hash(sha256)
assert utils.NONE_HASH != before
assert manager.get_computed_blocks(make_request("t", range(17)))[1] == 0
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("_restore_none_hash")
def test_none_hash_follows_pythonhashseed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    init_none_hash(sha256)
    assert sha256("42") == kv_cache_utils.NONE_HASH


def test_hash_block_tokens_is_the_hash_of_parent_tokens_and_keys() -> None:
    parent = BlockHash(b"p" * 32)
    assert hash_block_tokens(sha256, parent, [1, 2], ("k",)) == sha256((parent, (1, 2), ("k",)))
    assert hash_block_tokens(sha256, None, [1, 2]) == sha256((kv_cache_utils.NONE_HASH, (1, 2), None))


def test_hasher_chains_full_blocks_and_appends_in_place() -> None:
    request = make_request("r", [1, 2, 3, 4, 5, 6, 7, 8, 9], block_size=3)
    first = hash_block_tokens(sha256, None, [1, 2, 3])
    second = hash_block_tokens(sha256, first, [4, 5, 6])
    third = hash_block_tokens(sha256, second, [7, 8, 9])
    assert request.block_hashes == [first, second, third]
    hashes = request.block_hashes
    request.append_output_token_ids([1, 1])
    assert len(hashes) == 3
    request.append_output_token_ids([1, 2, 2, 2])
    assert request.block_hashes is hashes
    assert hashes[3:] == [
        hash_block_tokens(sha256, third, [1, 1, 1]),
        hash_block_tokens(sha256, hashes[3], [2, 2, 2]),
    ]


def test_equal_tokens_after_different_prefixes_hash_differently() -> None:
    a = make_request("a", [1, 1, 1, 1, 9, 9, 9, 9], block_size=4)
    b = make_request("b", [2, 1, 1, 1, 9, 9, 9, 9], block_size=4)
    assert a.block_hashes[1] != b.block_hashes[1]


def test_salt_enters_the_first_block_and_so_all() -> None:
    plain = make_request("a", range(8), block_size=4)
    red = make_request("b", range(8), block_size=4, cache_salt="red")
    blue = make_request("c", range(8), block_size=4, cache_salt="blue")
    red2 = make_request("d", range(8), block_size=4, cache_salt="red")
    assert generate_block_hash_extra_keys(red, 0, 4, 0) == (("red",), 0)
    assert generate_block_hash_extra_keys(red, 4, 8, 3) == (None, 3)
    assert generate_block_hash_extra_keys(plain, 0, 4, 0) == (None, 0)
    assert red.block_hashes == red2.block_hashes
    for i in range(2):
        assert len({r.block_hashes[i] for r in (plain, red, blue)}) == 3
    first = hash_block_tokens(sha256, None, range(4), ("red",))
    assert red.block_hashes == [first, hash_block_tokens(sha256, first, range(4, 8))]


def test_hasher_takes_any_hash_function() -> None:
    def md5(obj: Any) -> bytes:
        return hashlib.md5(repr(obj).encode(), usedforsecurity=False).digest()

    hasher = get_request_block_hasher(2, md5)
    request = Request("r", [1, 2, 3], SamplingParams(), block_hasher=hasher)
    assert request.block_hashes == [md5((kv_cache_utils.NONE_HASH, (1, 2), None))]


# --- hits through the scheduler ---


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("num_tokens", [3 * BS - 1, 3 * BS, 3 * BS + 1])
def test_same_prompt_again_hits_all_but_its_last_token(num_tokens: int, use_async: bool) -> None:
    engine = caching_engine(use_async=use_async)
    prompt = list(range(50, 50 + num_tokens))
    expected_hits = (num_tokens - 1) // BS * BS
    first, again = (make_request(i, prompt, block_size=BS, ignore_eos=True) for i in "ab")
    engine.add(first)
    engine.run()
    engine.add(again)
    output = engine.step()
    assert output.num_scheduled_tokens == {"b": num_tokens - expected_hits}
    assert output.scheduled_new_reqs[0].num_computed_tokens == expected_hits
    engine.run()
    assert engine.outputs["a"] == engine.outputs["b"] == expected_tokens(first, 8192)
    assert engine.finished["a"].num_cached_tokens == 0
    assert engine.finished["b"].num_cached_tokens == expected_hits


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("max_tokens", [4, 5, 6, 7, 8])
def test_next_turn_of_a_chat_hits_what_decoding_filled(use_async: bool, max_tokens: int) -> None:
    engine = caching_engine(use_async=use_async)
    first = make_request("a", range(6), block_size=BS, max_tokens=max_tokens, ignore_eos=True)
    engine.add(first)
    engine.run()
    conversation = [*first.all_token_ids, 90, 91]
    second = make_request("b", conversation, block_size=BS)
    # The last token was sampled but never computed.
    assert num_hits(engine, second) == (6 + max_tokens - 1) // BS * BS
    engine.add(second)
    engine.run()
    assert engine.outputs["b"] == expected_tokens(second, 8192)


def test_twins_in_one_step_share_and_agree() -> None:
    engine = caching_engine()
    twins = [make_request(i, range(3 * BS + 2), block_size=BS, ignore_eos=True) for i in "abc"]
    engine.add(*twins)
    output = engine.step()
    # The first one's blocks are named when its step is scheduled; the others read what it writes in the same step.
    assert output.num_scheduled_tokens == {"a": 14, "b": 2, "c": 2}
    engine.run()
    for twin in twins:
        assert engine.outputs[twin.request_id] == expected_tokens(twin, 8192)


def test_hit_on_a_prefix_only() -> None:
    engine = caching_engine()
    engine.add(make_request("a", [*range(8), 50, 51, 52, 53], block_size=BS))
    engine.run()
    assert num_hits(engine, make_request("b", [*range(8), 60, 61, 62, 63, 64], block_size=BS)) == 8
    assert num_hits(engine, make_request("c", [99, *range(1, 8), 50], block_size=BS)) == 0


def test_a_block_without_its_prefix_is_no_hit() -> None:
    engine = caching_engine()
    engine.add(make_request("a", range(13), block_size=BS))
    engine.run()
    probe = make_request("b", range(13), block_size=BS)
    pool = engine.scheduler.kv_cache_manager.block_pool
    (middle,) = pool.get_cached_block(probe.block_hashes[1])
    pool.evict_blocks([middle.block_id])
    assert num_hits(engine, probe) == 4
    assert pool.get_cached_block(probe.block_hashes[2]) is not None


def test_salted_requests_hit_their_own_and_nobody_elses() -> None:
    engine = caching_engine()
    prompt = list(range(3 * BS))

    def hits_of(salt: str | None) -> int:
        return num_hits(engine, make_request("probe", prompt, block_size=BS, cache_salt=salt))

    engine.add(make_request("red", prompt, block_size=BS, cache_salt="red"))
    engine.run()
    assert [hits_of(salt) for salt in ("red", None, "blue")] == [8, 0, 0]
    engine.add(make_request("plain", prompt, block_size=BS))
    engine.run()
    assert [hits_of(salt) for salt in ("red", None, "blue")] == [8, 8, 0]
    # FakeRunner stores the salt in the slot: sharing across salts would have failed there.


def test_prompt_logprobs_neither_hit_nor_count_but_fill_the_cache() -> None:
    engine = caching_engine()
    prompt = list(range(3 * BS))
    first, again = (make_request(i, prompt, block_size=BS, prompt_logprobs=0, ignore_eos=True) for i in "ab")
    engine.add(first)
    engine.run()
    engine.add(again)
    assert engine.step().num_scheduled_tokens == {"b": 12}
    engine.run()
    assert num_hits(engine, make_request("c", prompt, block_size=BS)) == 8
    stats = engine.scheduler.kv_cache_manager.prefix_cache_stats
    assert (stats.requests, stats.queries, stats.hits) == (0, 0, 0)


def test_evicted_block_is_not_hit_and_its_reuse_is_harmless() -> None:
    engine = caching_engine(num_blocks=7)  # 6 usable blocks, 24 tokens
    old = make_request("old", range(16), block_size=BS, max_tokens=4, ignore_eos=True)
    engine.add(old)
    engine.run()
    engine.add(make_request("other", range(50, 66), block_size=BS, max_tokens=4, ignore_eos=True))
    engine.run()
    again = make_request("again", range(16), block_size=BS, max_tokens=4, ignore_eos=True)
    assert num_hits(engine, again) == 4  # its tail went first
    engine.add(again)
    engine.run()
    assert engine.outputs["again"] == engine.outputs["old"] == expected_tokens(old, 8192)


# --- statistics and reset ---


def test_statistics_count_tokens_asked_and_found_once_per_request() -> None:
    engine = caching_engine(num_blocks=8)
    manager = engine.scheduler.kv_cache_manager
    engine.add(make_request("a", range(10), block_size=BS, max_tokens=1))
    engine.run()
    engine.scheduler.make_stats()
    engine.add(make_request("holder", range(50, 66), block_size=BS, max_tokens=4, ignore_eos=True))
    engine.step()
    # Waits for blocks for several steps; its look-up counts once, when it is admitted.
    engine.add(make_request("b", [*range(10), *range(30, 36)], block_size=BS, max_tokens=1))
    counts = []
    for _ in range(10):
        output = engine.scheduler.schedule()
        result = engine.runner.execute_model(output)
        stats = engine.scheduler.update_from_output(output, result)[0].scheduler_stats
        counts.append(
            (
                stats.prefix_cache_stats.requests,
                stats.prefix_cache_stats.queries,
                stats.prefix_cache_stats.hits,
            )
        )
    assert [c for c in counts if c[0]] == [(1, 16, 8)]
    assert counts[0] == (0, 0, 0)  # it did have to wait
    assert manager.prefix_cache_stats.requests == 0  # taken by the last report


def test_statistics_count_resumed_requests_apart() -> None:
    engine = caching_engine()
    engine.add(make_request("a", range(10), block_size=BS, ignore_eos=True))
    engine.step()
    engine.step()
    engine.scheduler._preempt_request(engine.scheduler.running.pop())
    engine.scheduler.make_stats()
    output = engine.scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 4}
    stats = engine.scheduler.kv_cache_manager.prefix_cache_stats
    assert (stats.requests, stats.queries, stats.hits) == (0, 0, 0)
    assert (stats.preempted_requests, stats.preempted_queries, stats.preempted_hits) == (1, 12, 8)


def test_no_statistics_unless_asked_for() -> None:
    scheduler = create_scheduler(enable_prefix_caching=True)
    manager = scheduler.kv_cache_manager
    assert manager.prefix_cache_stats is None and manager.make_prefix_cache_stats() is None
    scheduler.add_request(make_request("r", range(40)))
    scheduler.schedule()
    assert scheduler.make_stats() is None
    assert manager.prefix_cache_stats is None


def test_reset_fails_while_blocks_are_held_then_forgets_all() -> None:
    engine = caching_engine()
    request = make_request("a", range(12), block_size=BS, max_tokens=3, ignore_eos=True)
    engine.add(request)
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()
    assert not engine.scheduler.kv_cache_manager.prefix_cache_stats.was_reset
    engine.run()
    probe = make_request("b", range(13), block_size=BS)
    assert num_hits(engine, probe) == 12
    assert engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.kv_cache_manager.prefix_cache_stats.was_reset
    assert num_hits(engine, probe) == 0


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_reset_of_running_requests_preempts_them_in_order(use_async: bool, policy: str) -> None:
    engine = caching_engine(use_async=use_async, policy=policy, max_num_seqs=3)
    requests = [
        make_request(str(i), range(10 * i, 10 * i + 9), block_size=BS, arrival_time=i, ignore_eos=True)
        for i in range(5)
    ]
    engine.add(*requests)
    for _ in range(4):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.scheduler.kv_cache_manager.check_integrity()
    assert engine.scheduler.running == []
    assert [r.request_id for r in engine.scheduler.waiting] == ["0", "1", "2", "3", "4"]
    assert num_hits(engine, make_request("probe", range(9), block_size=BS)) == 0
    engine.run()
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)


@pytest.mark.parametrize("tokens", [list(range(48)), list(range(50)), [2**62, -1] * 20, [True] * 32, [2**70] * 32, [5]])
def test_a_chain_of_blocks_hashed_at_once_equals_block_by_block(tokens: list[int]) -> None:
    for parent in (b"", b"parent", sha256("x")):
        expected, last = [], parent
        for start in range(0, len(tokens) // 16 * 16, 16):
            last = sha256((last, tuple(tokens[start : start + 16]), None))
            expected.append(last)
        assert sha256_blocks(parent, tokens, 16) == expected


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 80), st.lists(st.integers(0, 2), max_size=40)),
        min_size=1,
        max_size=12,
    )
)
def test_recent_chains_give_the_hashes_of_a_chain_made_anew(prompts: list[tuple[int, int, list[int]]]) -> None:
    chains = kv_cache_utils.RecentChains(4, max_chains=2)
    for family, shared, rest in prompts:
        tokens = [family * 100 + i for i in range(shared)] + rest + [1] * 4
        assert chains.hash_prompt(tokens) == sha256_blocks(kv_cache_utils.NONE_HASH, tokens, 4)
    assert chains.hash_prompt([2**70] * 9) == sha256_blocks(kv_cache_utils.NONE_HASH, [2**70] * 9, 4)


def test_recent_chains_hash_a_shared_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counting(parent: bytes, packed: bytes, block_size: int) -> list[bytes]:
        hashed.append(len(packed) // 8 // block_size)
        return sha256_packed_blocks(parent, packed, block_size)

    monkeypatch.setattr(kv_cache_utils, "sha256_packed_blocks", counting)
    chains = kv_cache_utils.RecentChains(4, max_chains=2)
    prefix = list(range(40))
    chains.hash_prompt([*prefix, 7, 7, 7, 7])
    chains.hash_prompt([*prefix, 8, 8, 8, 8, 8])
    chains.hash_prompt(prefix[:20])
    assert hashed == [11, 1, 0]
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"another engine's")
    assert chains.hash_prompt(prefix) == sha256_blocks(b"another engine's", prefix, 4)
    chains.hash_prompt([9] * 8)  # the third family: the one not used for longest is forgotten
    assert len(chains._chains) == 2


@pytest.mark.parametrize("salt", [None, "salt"])
def test_requests_hash_alike_at_once_and_block_by_block(salt: str | None) -> None:
    hashers = [get_request_block_hasher(16, fn) for fn in (sha256, lambda obj: sha256(obj))]
    at_once, one_by_one = (
        Request("id", list(range(100, 180)), SamplingParams(), cache_salt=salt, block_hasher=hasher).block_hashes
        for hasher in hashers
    )
    assert list(at_once) == list(one_by_one) and len(at_once) == 5
