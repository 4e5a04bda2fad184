"""Blocks, the queue of free ones, the hash chain, the size of the cache (vLLM: `v1/core/kv_cache_utils.py`).

One idea: a block's content is named by a hash of everything before and in it,

    hash(block i) = H(hash(block i-1), tokens of block i, extra keys)        hash(block -1) = NONE_HASH

so equal hashes mean equal prefixes, whoever computed them. prefix_cache.py looks blocks up by that name;
block_pool.py decides which blocks are free and which name is forgotten first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NewType, cast

from folovllm.config import VllmConfig
from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from folovllm.request import Request
from folovllm.utils.common import GiB, cdiv, pack_token_ids, sha256, sha256_blocks, sha256_packed_blocks

BlockHash = NewType("BlockHash", bytes)
"""Name of a full block's content, its prefix included."""

BlockHashWithGroupId = NewType("BlockHashWithGroupId", bytes)
"""A BlockHash with its KV cache group id appended (4 bytes, big endian): the key of the prefix cache."""

NONE_HASH: BlockHash
"""Parent of every first block; random unless PYTHONHASHSEED is set, so that hashes cannot be guessed."""


def init_none_hash(hash_fn: Callable[[Any], bytes]) -> None:
    """Set NONE_HASH: `hash_fn(PYTHONHASHSEED)` where that variable is set, else 32 random bytes.

    Requests hashed before and after share no first blocks; call it only before any request exists.
    """
    global NONE_HASH
    seed = os.environ.get("PYTHONHASHSEED")
    NONE_HASH = BlockHash(os.urandom(32) if seed is None else hash_fn(seed))


# importlib.reload keeps a module's globals: a value that requests were hashed with stays valid.
if "NONE_HASH" not in globals():
    init_none_hash(sha256)


def make_block_hash_with_group_id(block_hash: BlockHash, group_id: int) -> BlockHashWithGroupId:
    """Return the prefix cache key of `block_hash` in KV cache group `group_id`."""
    return BlockHashWithGroupId(block_hash + group_id.to_bytes(4, "big"))


def get_block_hash(key: BlockHashWithGroupId) -> BlockHash:
    """Return the hash part of a key."""
    return BlockHash(key[:-4])


def get_group_id(key: BlockHashWithGroupId) -> int:
    """Return the group part of a key."""
    return int.from_bytes(key[-4:], "big")


def generate_block_hash_extra_keys(
    request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> tuple[tuple[Any, ...] | None, int]:
    """Return what else names the block of tokens [start, end), and `start_mm_idx` unchanged.

    Only the first block carries the salt: the chain hands it on to all others.
    Simplified (vLLM): no multimodal, LoRA or prompt-embedding keys; the last argument and result keep its
    shape.
    """
    if start_token_idx == 0 and request.cache_salt:
        return (request.cache_salt,), start_mm_idx
    return None, start_mm_idx


def hash_block_tokens(
    hash_function: Callable[[Any], bytes],
    parent_block_hash: BlockHash | None,
    curr_block_token_ids: Sequence[int],
    extra_keys: tuple[Any, ...] | None = None,
) -> BlockHash:
    """Return the hash of a full block; `parent_block_hash` is None for the first one."""
    return BlockHash(hash_function((parent_block_hash or NONE_HASH, tuple(curr_block_token_ids), extra_keys)))


class RecentChains:
    """The hash chains of the last prompts, so that requests which share a long prefix hash it once.

    A hash is a function of the tokens before it, so a chain may be reused up to the first block that differs. Finding
    that block is a few comparisons of packed tokens: 64 prompts of 2080 tokens that share 2048 take 5 ms, not 18.
    """

    def __init__(self, block_size: int, max_chains: int = 16) -> None:
        """Keep at most `max_chains`, told apart by their first block; the one not used for longest goes first."""
        self._block_size = block_size
        self._max_chains = max_chains
        self._chains: dict[bytes, tuple[bytes, list[bytes]]] = {}  # first block -> (packed tokens, digests)

    def hash_prompt(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return what `sha256_blocks(NONE_HASH, token_ids, block_size)` returns for checked ids, a block or more."""
        step = 8 * self._block_size
        packed = pack_token_ids(token_ids[: len(token_ids) // self._block_size * self._block_size])
        if packed is None:  # not ints of 64 bits
            return sha256_blocks(NONE_HASH, token_ids, self._block_size)
        key = NONE_HASH + packed[:step]
        known_tokens, known = self._chains.pop(key, (b"", []))
        shared = _num_shared_blocks(packed, known_tokens, step)
        digests = known[:shared]
        parent = digests[-1] if digests else NONE_HASH
        digests += sha256_packed_blocks(parent, packed[shared * step :], self._block_size)
        self._chains[key] = (packed, digests)
        if len(self._chains) > self._max_chains:
            del self._chains[next(iter(self._chains))]
        return list(digests)


def _num_shared_blocks(one: bytes, other: bytes, step: int) -> int:
    """Return how many leading blocks of `step` bytes are equal, by bisection."""
    low, high = 0, min(len(one), len(other)) // step
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * step : middle * step] == other[low * step : middle * step]:
            low = middle
        else:
            high = middle - 1
    return low


def get_request_block_hasher(
    block_size: int, caching_hash_fn: Callable[[Any], bytes]
) -> Callable[[Request], list[BlockHash]]:
    """Return a function: request -> hashes of its full blocks that `request.block_hashes` does not hold yet.

    A Request calls it on construction and after every appended token, or only after those that fill a block where it
    was told `hash_block_size`.
    """
    recent_chains = RecentChains(block_size)

    def request_block_hasher(request: Request) -> list[BlockHash]:
        hashes = request.block_hashes
        first = len(hashes) * block_size
        num_tokens = request.num_tokens
        if first + block_size > num_tokens:
            return []
        parent: BlockHash | None = hashes[-1] if hashes else None
        salted = first == 0 and request.cache_salt
        if caching_hash_fn is sha256 and num_tokens - first >= 2 * block_size and not salted:
            tokens = request.all_token_ids[first:num_tokens]
            if parent is None:
                return cast("list[BlockHash]", recent_chains.hash_prompt(tokens))
            return cast("list[BlockHash]", sha256_blocks(parent, tokens, block_size))
        new_hashes: list[BlockHash] = []
        for start in range(first, num_tokens - block_size + 1, block_size):
            end = start + block_size
            extra_keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            parent = hash_block_tokens(caching_hash_fn, parent, request.all_token_ids[start:end], extra_keys)
            new_hashes.append(parent)
        return new_hashes

    return request_block_hasher


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """What the scheduler knows of one block. Equality is identity; the data itself lives on the device."""

    block_id: int
    """Index into the KV tensors, 0 to num_blocks - 1."""
    ref_cnt: int = 0
    """Requests that hold the block; at 0 it is in the free queue (the null block: always 0, never there)."""
    block_hash: BlockHashWithGroupId | None = None
    """Key under which the prefix cache knows the block; None while it is not full or not cached."""
    prev_free_block: KVCacheBlock | None = None
    """Neighbour towards the head of the free queue; None outside it."""
    next_free_block: KVCacheBlock | None = None
    """Neighbour towards the tail of the free queue; None outside it."""
    is_null: bool = False
    """Whether this is the reserved block 0."""

    def set_block_hash(self, block_hash: BlockHashWithGroupId) -> None:
        """Name the content. A block must be evicted before it gets another name."""
        if self.block_hash is not None:
            raise AssertionError(f"block {self.block_id} already has a hash")
        self.block_hash = block_hash

    def reset_hash(self) -> None:
        """Forget the name."""
        self.block_hash = None

    def __repr__(self) -> str:
        # Neighbours by id only: printing them would print the whole queue.
        prev_id = self.prev_free_block.block_id if self.prev_free_block else None
        next_id = self.next_free_block.block_id if self.next_free_block else None
        return (
            f"KVCacheBlock(block_id={self.block_id}, ref_cnt={self.ref_cnt}, block_hash={self.block_hash!r}, "
            f"prev={prev_id}, next={next_id})"
        )


class FreeKVCacheBlockQueue:
    """Free blocks in the order in which they will be reused; every operation is O(blocks handled).

        fake_free_list_head <-> block <-> block <-> ... <-> block <-> fake_free_list_tail
                          reused next                 reused last

    A deque cannot give up an element in its middle in O(1), which a prefix cache hit on a free block needs; a
    linked list can. The links are fields of the blocks, so moving a block allocates nothing. The two
    sentinels, never popped, spare every operation the empty-list case.
    """

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        """Link `blocks` in the given order."""
        self.num_free_blocks = 0
        self.fake_free_list_head = KVCacheBlock(block_id=-1)
        self.fake_free_list_tail = KVCacheBlock(block_id=-1)
        self.fake_free_list_head.next_free_block = self.fake_free_list_tail
        self.fake_free_list_tail.prev_free_block = self.fake_free_list_head
        self.append_n(blocks)

    def popleft(self) -> KVCacheBlock:
        """Remove and return the first block; ValueError where there is none."""
        if self.num_free_blocks == 0:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Remove and return the first `n` blocks in order; ValueError where there are fewer."""
        if n > self.num_free_blocks:
            raise ValueError(f"No free blocks available: {n} wanted, {self.num_free_blocks} free")
        popped: list[KVCacheBlock] = []
        head = self.fake_free_list_head
        block = head.next_free_block
        for _ in range(n):
            assert block is not None
            popped.append(block)
            following = block.next_free_block
            block.prev_free_block = block.next_free_block = None
            block = following
        assert block is not None
        head.next_free_block = block
        block.prev_free_block = head
        self.num_free_blocks -= n
        return popped

    def remove(self, block: KVCacheBlock) -> None:
        """Take `block` out of the middle of the queue; RuntimeError where it is not in it."""
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"remove() of a block that is not in the free queue: {block}")
        before.next_free_block = after
        after.prev_free_block = before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        """Put `block` at the tail: reused last."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put `blocks` at the tail, in order."""
        if not blocks:
            return
        last = self.fake_free_list_tail.prev_free_block
        if last is None:
            raise AssertionError("the free queue's tail has lost its predecessor")
        self._insert_after(last, blocks)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put `blocks` at the head, in order: the first of them is reused next."""
        if blocks:
            self._insert_after(self.fake_free_list_head, blocks)

    def _insert_after(self, before: KVCacheBlock, blocks: list[KVCacheBlock]) -> None:
        after = before.next_free_block
        assert after is not None
        for block in blocks:
            before.next_free_block = block
            block.prev_free_block = before
            before = block
        before.next_free_block = after
        after.prev_free_block = before
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Return all free blocks, front to back (O(n); for tests and checks)."""
        blocks: list[KVCacheBlock] = []
        block = self.fake_free_list_head.next_free_block
        while block is not None and block is not self.fake_free_list_tail:
            blocks.append(block)
            block = block.next_free_block
        return blocks


def estimate_max_model_len(
    vllm_config: VllmConfig, kv_cache_spec: dict[str, FullAttentionSpec], available_memory: int
) -> int:
    """Return the longest sequence, up to max_model_len, whose KV cache fits in `available_memory` bytes.

    The null block is not counted: subtract its bytes first, as get_kv_cache_configs does. 0 where nothing
    fits.
    """
    block_size = max(spec.block_size for spec in kv_cache_spec.values())
    num_blocks = max(available_memory, 0) // _bytes_per_block(kv_cache_spec)
    max_model_len = vllm_config.model_config.max_model_len
    assert max_model_len is not None
    return min(max_model_len, num_blocks * block_size)


def get_kv_cache_configs(
    vllm_config: VllmConfig,
    kv_cache_specs: list[dict[str, FullAttentionSpec]],
    available_memory: list[int],
) -> list[KVCacheConfig]:
    """Return one cache layout per worker: equally many blocks, a tensor per layer, layers grouped by spec.

    Args:
        vllm_config: gives max_model_len, and num_gpu_blocks_override: exactly so many blocks, whatever the
        memory. kv_cache_specs: per worker, layer name -> spec. Every layer needs its own page of every block.
        available_memory: per worker, bytes for the cache. The worker that can hold the fewest blocks decides.

    Raises:
        ValueError: the blocks would not hold one sequence of max_model_len (and the null block).
    """
    num_blocks = min(
        memory // _bytes_per_block(specs) for specs, memory in zip(kv_cache_specs, available_memory, strict=True)
    )
    override = vllm_config.cache_config.num_gpu_blocks_override
    if override is not None:
        num_blocks = override
    for specs in kv_cache_specs:
        _check_one_sequence_fits(vllm_config, specs, num_blocks)
    return [_make_kv_cache_config(specs, num_blocks) for specs in kv_cache_specs]


def _bytes_per_block(specs: dict[str, FullAttentionSpec]) -> int:
    return sum(spec.page_size_bytes for spec in specs.values())


def _check_one_sequence_fits(vllm_config: VllmConfig, specs: dict[str, FullAttentionSpec], num_blocks: int) -> None:
    max_model_len = vllm_config.model_config.max_model_len
    assert max_model_len is not None
    block_size = max(spec.block_size for spec in specs.values())
    num_needed = cdiv(max_model_len, block_size) + 1
    if num_blocks >= num_needed:
        return
    page = _bytes_per_block(specs)
    fits = estimate_max_model_len(vllm_config, specs, (num_blocks - 1) * page)
    raise ValueError(
        f"One request of the model's max seq len ({max_model_len}) needs {num_needed} KV cache blocks of "
        f"{block_size} tokens (one is the null block), {num_needed * page / GiB:.3f} GiB; there are "
        f"{num_blocks}, {num_blocks * page / GiB:.3f} GiB. Lower max_model_len (at most {fits} fits), or "
        "raise gpu_memory_utilization (CUDA), kv_cache_memory_bytes or num_gpu_blocks_override."
    )


def _make_kv_cache_config(specs: dict[str, FullAttentionSpec], num_blocks: int) -> KVCacheConfig:
    layers_of_spec: dict[FullAttentionSpec, list[str]] = {}
    for name, spec in specs.items():
        layers_of_spec.setdefault(spec, []).append(name)
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(size=spec.page_size_bytes * num_blocks, shared_by=[name]) for name, spec in specs.items()
        ],
        kv_cache_groups=[KVCacheGroupSpec(names, spec) for spec, names in layers_of_spec.items()],
    )
