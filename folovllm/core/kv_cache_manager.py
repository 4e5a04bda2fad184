"""KVCacheManager: which blocks each request holds (vLLM: `v1/core/kv_cache_manager.py`).

The scheduler asks three things of it: which blocks of this prompt exist already (get_computed_blocks), may
this request have slots for n more tokens (allocate_slots), and take everything back (free).

Simplified (vLLM: KVCacheCoordinator, SingleTypeKVCacheManager): one full-attention group is all our models
need, so per-group tuples have length 1 and the bookkeeping lives here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_cache import find_longest_cache_hit
from folovllm.kv_cache_interface import KVCacheConfig
from folovllm.metrics.stats import PrefixCacheStats
from folovllm.request import Request
from folovllm.utils.common import cdiv

GROUP_ID = 0
"""The one KV cache group."""


@dataclass(slots=True)
class KVCacheBlocks:
    """Blocks on their way between KVCacheManager and Scheduler; not to be changed by whoever gets them."""

    blocks: tuple[list[KVCacheBlock], ...]
    """One list per KV cache group: of length 1 here."""

    def __add__(self, other: KVCacheBlocks) -> KVCacheBlocks:
        """Return these blocks followed by the others, group by group."""
        return KVCacheBlocks(tuple([*a, *b] for a, b in zip(self.blocks, other.blocks, strict=True)))

    def get_block_ids(self) -> tuple[list[int], ...]:
        """Return the ids, as one list per group."""
        return tuple([[block.block_id for block in group] for group in self.blocks])


class KVCacheManager:
    """Blocks of every request that has any; see the module docstring."""

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        max_model_len: int,
        scheduler_block_size: int | None = None,
        hash_block_size: int | None = None,
        enable_caching: bool = True,
        log_stats: bool = False,
    ) -> None:
        """
        Args:
            kv_cache_config: number of blocks and the one group's block size.
            max_model_len: no request ever gets slots beyond it.
            scheduler_block_size: must be the group's block size or None; so must hash_block_size.
            hash_block_size: see scheduler_block_size.
            enable_caching: whether full blocks stay findable and are shared.
            log_stats: whether to count hits in `prefix_cache_stats`.

        Raises:
            ValueError: not exactly one group, or a block size that differs from the group's.
        """
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                f"kv_cache_groups has {len(groups)} groups; exactly 1 is supported: all layers need the same "
                "full-attention spec."
            )
        self.block_size = groups[0].kv_cache_spec.block_size
        for name, size in (
            ("scheduler_block_size", scheduler_block_size),
            ("hash_block_size", hash_block_size),
        ):
            if size not in (None, self.block_size):
                raise ValueError(f"{name}={size} must equal the cache's block size, {self.block_size}.")
        self.kv_cache_config = kv_cache_config
        self.max_model_len = max_model_len
        self.enable_caching = enable_caching
        self.log_stats = log_stats
        self.block_pool = BlockPool(kv_cache_config.num_blocks, enable_caching, self.block_size)
        self.req_to_blocks: dict[str, list[KVCacheBlock]] = {}
        """Request id -> its blocks, in order of its tokens."""
        self.num_cached_block: dict[str, int] = {}
        """Request id -> how many of its first blocks have their hash; empty where caching is off."""
        self.prefix_cache_stats = PrefixCacheStats() if log_stats else None
        self.empty_kv_cache_blocks = KVCacheBlocks(([],))

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return self.block_pool.get_usage()

    @property
    def num_usable_blocks(self) -> int:
        """All blocks but the null block: the most that one request could ever hold."""
        return self.block_pool.num_gpu_blocks - 1

    def make_prefix_cache_stats(self) -> PrefixCacheStats | None:
        """Return the counts since the last call and start new ones; None without log_stats."""
        stats = self.prefix_cache_stats
        if stats is not None:
            self.prefix_cache_stats = PrefixCacheStats()
        return stats

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int]:
        """Return the longest run of cached full blocks from the request's start, and their number of tokens.

        Changes nothing: the blocks are only held once allocate_slots took them. At least one token is always
        left to compute, because sampling needs its logits; so a prompt that is cached to its last token, and
        ends on a block boundary, does without its last block. Prompt logprobs need the logits of every prompt
        token: such a request hits nothing (its blocks are cached for others all the same).
        """
        if not self.enable_caching or request.sampling_params.prompt_logprobs is not None:
            return self.empty_kv_cache_blocks, 0
        hits = find_longest_cache_hit(
            self.block_pool.cached_block_hash_to_block,
            request.block_hashes,
            max_num_blocks=(request.num_tokens - 1) // self.block_size,
            group_id=GROUP_ID,
        )
        if not hits:
            return self.empty_kv_cache_blocks, 0
        return KVCacheBlocks((hits,)), len(hits) * self.block_size

    def has_slot_for_next_token(self, request: Request) -> bool:
        """Whether allocate_slots(request, 1) would find nothing to do, so that it need not be called.

        | t t t t | t t t . |        t: computed; the next token is neither the first of a block, which would have to
                    0 1 2 3          be allocated, nor the last, which fills it, so that it would be cached

        For a request that runs, so that it holds the blocks of its computed tokens (see check_integrity).
        """
        return 0 < request.num_computed_tokens % self.block_size < self.block_size - 1

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        full_sequence_must_fit: bool = False,
    ) -> KVCacheBlocks | None:
        """Give the request slots for its next tokens; all or nothing.

            | comp | new_comp | new | lookahead |        tokens of the request, left to right
            | held | hits     | newly allocated |        its blocks afterwards
            | to be cached, if full |                    up to the last token that is known

            comp = request.num_computed_tokens, computed by earlier steps
            new_comp = num_new_computed_tokens, in the cached blocks `new_computed_blocks` (admission only)
            new = num_new_tokens, to be computed in this step
            lookahead = num_lookahead_tokens, slots only

        Args:
            request: the request; its num_computed_tokens does not include the new ones yet.
            num_new_tokens: at least 1.
            num_new_computed_tokens: tokens of `new_computed_blocks`.
            new_computed_blocks: from get_computed_blocks, in this step; None or empty where the request holds
            blocks. num_lookahead_tokens: slots beyond the new tokens. full_sequence_must_fit: refuse unless
            all of the request's tokens would fit, not only the new ones.
                Admitting a long prompt for its first chunk alone would only lead to a preemption later.

        Returns:
            The newly allocated blocks (hits not included); None, with no side effect, where too few are free.
        """
        if num_new_tokens < 1:
            raise ValueError(f"num_new_tokens={num_new_tokens} must be at least 1.")
        request_id = request.request_id
        held = self.req_to_blocks.get(request_id)
        hits = new_computed_blocks.blocks[0] if new_computed_blocks is not None else None
        num_tokens_after = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
        num_slots = min(num_tokens_after + num_lookahead_tokens, self.max_model_len)
        num_blocks = -(num_slots // -self.block_size)

        new_blocks = self.empty_kv_cache_blocks
        # Most calls come from a decode whose last block has room: nothing to do but to look.
        if held is None or num_blocks > len(held):
            if full_sequence_must_fit:
                num_at_end = cdiv(min(request.num_tokens, self.max_model_len), self.block_size)
            else:
                num_at_end = num_blocks
            if not self._enough_free_blocks(num_at_end, held, hits):
                return None
            if held is None:
                held = self._start_request(request, hits, num_new_computed_tokens)
            elif hits:
                raise AssertionError(f"{request!r} holds blocks already; it cannot take prefix cache hits")
            if num_blocks > len(held):
                allocated = self.block_pool.get_new_blocks(num_blocks - len(held))
                held.extend(allocated)
                new_blocks = KVCacheBlocks((allocated,))

        if self.enable_caching:
            self.cache_blocks(request, num_tokens_after)
        return new_blocks

    def _enough_free_blocks(
        self, num_blocks: int, held: list[KVCacheBlock] | None, hits: list[KVCacheBlock] | None
    ) -> bool:
        """Whether the request could grow to `num_blocks`; hits in the free queue use up free blocks too."""
        num_wanted = num_blocks - len(held or ())
        for block in hits or ():
            if block.ref_cnt > 0:
                num_wanted -= 1
        return num_wanted <= self.block_pool.free_block_queue.num_free_blocks

    def _start_request(
        self, request: Request, hits: list[KVCacheBlock] | None, num_hit_tokens: int
    ) -> list[KVCacheBlock]:
        """Open the bookkeeping of a request that holds nothing, with its hits; return its list of blocks."""
        request_id = request.request_id
        held = self.req_to_blocks[request_id] = list(hits or ())
        # Before anything is allocated: a touched block cannot be evicted.
        self.block_pool.touch(held)
        if self.enable_caching:
            self.num_cached_block[request_id] = len(held)
            # Counted here and not at the look-up, which is repeated each step while a request has to wait.
            if self.prefix_cache_stats is not None and request.sampling_params.prompt_logprobs is None:
                self.prefix_cache_stats.record(
                    request.num_tokens, num_hit_tokens, preempted=request.num_preemptions > 0
                )
        return held

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Make findable every block that is full within the first `num_computed_tokens` tokens, if known.

        No-op for a request that holds no blocks, or where caching is off.
        """
        request_id = request.request_id
        num_cached = self.num_cached_block.get(request_id)
        if num_cached is None:
            return
        # A block has a hash as soon as all its tokens are known.
        num_full = min(num_computed_tokens // self.block_size, len(request.block_hashes))
        if num_full > num_cached:
            self.block_pool.cache_full_blocks(
                request, self.req_to_blocks[request_id], num_cached, num_full, self.block_size, GROUP_ID
            )
            self.num_cached_block[request_id] = num_full

    def uncache_uncomputed_blocks(self, request: Request) -> None:
        """Forget the content of blocks beyond `request.num_computed_tokens`: a scheduled step was withdrawn.

        allocate_slots names a block when the step that fills it is scheduled. If that step never runs, the
        name would promise keys and values that nobody wrote. Nobody else can have hit these blocks:
        withdrawals happen before any waiting request is looked at.
        """
        blocks = self.req_to_blocks.get(request.request_id, [])
        first = request.num_computed_tokens // self.block_size
        self.block_pool.evict_blocks(block.block_id for block in blocks[first:])

    def free(self, request: Request) -> None:
        """Give back all blocks of the request, its tail first. No-op for an unknown one."""
        blocks = self.req_to_blocks.pop(request.request_id, None)
        self.num_cached_block.pop(request.request_id, None)
        if blocks:
            self.block_pool.free_blocks(reversed(blocks))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. False, and no change, while any request holds blocks."""
        if not self.block_pool.reset_prefix_cache():
            return False
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset()
        return True

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """Return all blocks of a request; empty for an unknown one."""
        blocks = self.req_to_blocks.get(request_id)
        return KVCacheBlocks((blocks,)) if blocks else self.empty_kv_cache_blocks

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """Return the ids of all blocks of a request, as one list per group."""
        return self.get_blocks(request_id).get_block_ids()

    def check_integrity(self, running: Iterable[Request] = ()) -> None:
        """Check every invariant of the block bookkeeping; O(blocks), for tests and debugging after any step.

        - each of the `running` requests holds the blocks of its computed tokens, and those that are full and known are
          cached: has_slot_for_next_token counts on it; and its `num_tokens` is the number of its tokens;
        - every block is either free (ref_cnt 0 and in the queue) or held (ref_cnt >= 1 and not in it);
        - ref_cnt is the number of requests that hold the block, and none holds one twice;
        - the free queue's links agree in both directions and its count is right;
        - the prefix cache and the blocks' hashes agree, and every key leads to a block that carries it;
        - the null block is untouched.

        Raises:
            RuntimeError: naming the first request or block that breaks a rule.
        """
        for request in running:
            self._check_running(request)
        pool = self.block_pool
        num_holders = [0] * pool.num_gpu_blocks
        for request_id, blocks in self.req_to_blocks.items():
            if len({block.block_id for block in blocks}) != len(blocks):
                raise RuntimeError(f"request {request_id!r} holds a block twice: {blocks}")
            if self.num_cached_block.get(request_id, 0) > len(blocks):
                raise RuntimeError(f"request {request_id!r} has more cached blocks than blocks")
            for block in blocks:
                num_holders[block.block_id] += 1
        is_free = _check_free_queue(pool)
        for block in pool.blocks:
            if block.ref_cnt != num_holders[block.block_id]:
                raise RuntimeError(f"{num_holders[block.block_id]} requests hold {block}")
            if is_free[block.block_id] == (block.ref_cnt > 0 or block.is_null):
                raise RuntimeError(f"{'in' if is_free[block.block_id] else 'not in'} the free queue: {block}")
        _check_prefix_cache(pool)
        null = pool.null_block
        if null is not pool.blocks[0] or not null.is_null or null.ref_cnt or null.block_hash is not None:
            raise RuntimeError(f"the null block was used: {null}")

    def _check_running(self, request: Request) -> None:
        """Raise RuntimeError unless the request is as check_integrity says of running ones."""
        num_blocks = len(self.req_to_blocks.get(request.request_id, ()))
        if num_blocks < cdiv(request.num_computed_tokens, self.block_size):
            raise RuntimeError(f"{request!r} runs on {num_blocks} blocks of {self.block_size}")
        if len(request.all_token_ids) != request.num_tokens:
            raise RuntimeError(f"{request!r} has {len(request.all_token_ids)} tokens")
        num_full = min(request.num_computed_tokens // self.block_size, len(request.block_hashes))
        if self.enable_caching and self.num_cached_block.get(request.request_id) != num_full:
            raise RuntimeError(f"{request!r} has {num_full} full blocks, not all of them cached")


def _check_free_queue(pool: BlockPool) -> list[bool]:
    """Walk the free queue; return for each block id whether it is in it, or raise RuntimeError."""
    queue = pool.free_block_queue
    is_free = [False] * pool.num_gpu_blocks
    num_seen = 0
    before, block = queue.fake_free_list_head, queue.fake_free_list_head.next_free_block
    while block is not queue.fake_free_list_tail:
        if block is None or block.prev_free_block is not before or pool.blocks[block.block_id] is not block:
            raise RuntimeError(f"broken link in the free queue after {before}")
        if is_free[block.block_id]:
            raise RuntimeError(f"twice in the free queue: {block}")
        is_free[block.block_id] = True
        num_seen += 1
        before, block = block, block.next_free_block
    if queue.fake_free_list_tail.prev_free_block is not before:
        raise RuntimeError(f"broken link in the free queue after {before}")
    if num_seen != queue.num_free_blocks:
        raise RuntimeError(f"the free queue has {num_seen} blocks but says {queue.num_free_blocks}")
    for block_id, free in enumerate(is_free):
        member = pool.blocks[block_id]
        if not free and (member.prev_free_block or member.next_free_block):
            raise RuntimeError(f"links of a block outside the free queue: {member}")
    return is_free


def _check_prefix_cache(pool: BlockPool) -> None:
    """Raise RuntimeError unless the map and the blocks' hashes say the same."""
    num_mapped = 0
    for key, block in pool.cached_block_hash_to_block.items():
        num_mapped += 1
        if block.block_hash != key:
            raise RuntimeError(f"the prefix cache has {key!r} at a block with another hash: {block}")
    num_hashed = sum(block.block_hash is not None for block in pool.blocks)
    if num_mapped != num_hashed:
        raise RuntimeError(f"{num_hashed} blocks have a hash but the prefix cache knows {num_mapped}")
