"""Builders for tests of the core, and a fake model runner that checks every block it is given. No torch."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from folovllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_cache_utils import get_request_block_hasher
from folovllm.core.sched.async_scheduler import AsyncScheduler
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from folovllm.outputs import EngineCoreOutput, ModelRunnerOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.utils.common import sha256

EOS = 50256
VOCAB_SIZE = 97


class _FakeDtype:
    """Enough of a torch dtype for FullAttentionSpec."""

    itemsize = 2


def make_spec(block_size: int, num_kv_heads: int = 1, head_size: int = 1) -> FullAttentionSpec:
    """Return a layer spec whose dtype has two bytes."""
    return FullAttentionSpec(block_size, num_kv_heads, head_size, _FakeDtype())  # type: ignore[arg-type]


def make_kv_cache_config(block_size: int, num_blocks: int) -> KVCacheConfig:
    """Return the layout of a cache with one layer."""
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], make_spec(block_size))],
    )


def make_manager(
    block_size: int = 16, num_blocks: int = 11, max_model_len: int = 8192, **kwargs: Any
) -> KVCacheManager:
    """Return a KVCacheManager over its own pool."""
    return KVCacheManager(make_kv_cache_config(block_size, num_blocks), max_model_len, **kwargs)


def make_vllm_config(
    *,
    max_model_len: int = 8192,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 8192,
    block_size: int = 16,
    enable_prefix_caching: bool = False,
    **scheduler_args: Any,
) -> VllmConfig:
    """Return a configuration that needs no model on disk."""
    return VllmConfig(
        model_config=ModelConfig("fake", hf_config={"max_position_embeddings": max_model_len}),
        cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=enable_prefix_caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            **scheduler_args,
        ),
    )


def create_scheduler(
    *, num_blocks: int = 10_000, use_async: bool = False, log_stats: bool = False, **config_args: Any
) -> Scheduler:
    """Return a scheduler; `config_args` are make_vllm_config's."""
    config = make_vllm_config(**config_args)
    block_size = config.cache_config.block_size
    cls = AsyncScheduler if use_async else Scheduler
    return cls(config, make_kv_cache_config(block_size, num_blocks), block_size, log_stats=log_stats)


def make_request(
    request_id: str,
    prompt_token_ids: Sequence[int],
    block_size: int = 16,
    hash_fn: Callable[[Any], bytes] = sha256,
    arrival_time: float | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    ignore_eos: bool = False,
    **sampling: Any,
) -> Request:
    """Return a request; `sampling` are SamplingParams' keywords (defaults: max_tokens=16, temperature=0)."""
    params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **sampling}, ignore_eos=ignore_eos)
    params.update_from_generation_config({}, EOS)
    return Request(
        request_id,
        list(prompt_token_ids),
        params,
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        block_hasher=get_request_block_hasher(block_size, hash_fn),
    )


def create_requests(
    num_requests: int,
    num_tokens: int = 10,
    *,
    same_prompt: bool = False,
    priorities: Sequence[int] | None = None,
    arrival_times: Sequence[float] | None = None,
    start: int = 0,
    **request_args: Any,
) -> list[Request]:
    """Return requests "0", "1", ... with prompts of `num_tokens` equal tokens, different between requests."""
    return [
        make_request(
            str(i),
            [1 if same_prompt else i + 1] * num_tokens,
            priority=priorities[i - start] if priorities else 0,
            arrival_time=arrival_times[i - start] if arrival_times else float(i),
            **request_args,
        )
        for i in range(start, start + num_requests)
    ]


def make_output(
    scheduler_output: SchedulerOutput, token_id: int = 7, only: set[str] | None = None
) -> ModelRunnerOutput:
    """Return what a runner would: `token_id` for every scheduled request (or those in `only`)."""
    ids = list(scheduler_output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=[[token_id] if only is None or i in only else [] for i in ids],
    )


def next_token(context: Sequence[int]) -> int:
    """The fake model: a token that depends on every token of the context and its place."""
    digest = hashlib.blake2b(repr(list(context)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_tokens(request: Request, max_model_len: int, max_pool_tokens: int | None = None) -> list[int]:
    """What the fake model gives for the prompt alone; max_pool_tokens: slots of a pool that may not do."""
    context = list(request.prompt_token_ids)
    params = request.sampling_params
    outputs: list[int] = []
    while True:
        if max_pool_tokens is not None and len(context) > max_pool_tokens:
            return outputs
        token_id = next_token(context)
        context.append(token_id)
        outputs.append(token_id)
        if len(context) >= max_model_len or (request.max_tokens is not None and len(outputs) >= request.max_tokens):
            return outputs
        if len(outputs) >= params.min_tokens and token_id in (params.stop_token_ids or ()):
            return outputs


class FakeRunner:
    """A worker whose "keys and values" are the token ids themselves.

    It follows the worker's protocol only: what SchedulerOutput says, and tokens that it sampled itself.
    Computing a token stores it, with its position and the request's salt, in the slot that the block table
    gives; sampling reads the whole context back through the table and compares. A block shared, evicted or
    reused wrongly shows at once.
    """

    def __init__(self, num_blocks: int, block_size: int, salts: dict[str, str | None] | None = None) -> None:
        self.block_size = block_size
        self.slots: list[tuple[int, int, str | None] | None] = [None] * (num_blocks * block_size)
        self.salts = salts if salts is not None else {}
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.num_computed: dict[str, int] = {}

    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step: update the copies, write all slots, then read and sample."""
        self._update_states(output)
        scheduled = output.num_scheduled_tokens
        for request_id, num_tokens in scheduled.items():
            start = self.num_computed[request_id]
            for position in range(start, start + num_tokens):
                token_id = self.tokens[request_id][position]
                self.slots[self._slot(request_id, position)] = (
                    token_id,
                    position,
                    self.salts.get(request_id),
                )
        sampled: list[list[int]] = []
        for request_id, num_tokens in scheduled.items():
            self.num_computed[request_id] += num_tokens
            known = self.tokens[request_id]
            if self.num_computed[request_id] < len(known):
                sampled.append([])
                continue
            token_id = next_token(self._read_context(request_id))
            known.append(token_id)
            sampled.append([token_id])
        ids = list(scheduled)
        return ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, sampled)

    def _update_states(self, output: SchedulerOutput) -> None:
        for request_id in output.finished_req_ids:
            for copies in (self.tokens, self.tables, self.num_computed):
                copies.pop(request_id, None)
        for request_id in output.preempted_req_ids:
            self.tables.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.tokens, f"{new.req_id} is not new"
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.tables[new.req_id] = list(new.block_ids[0])
            self.num_computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            new_ids = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                assert new_ids is not None
                assert self.tokens[request_id] == cached.all_token_ids[request_id]
                self.tokens[request_id] = list(cached.all_token_ids[request_id])
                self.tables[request_id] = list(new_ids[0])
                self.num_computed[request_id] = cached.num_computed_tokens[i]
            elif new_ids is not None:
                self.tables[request_id].extend(new_ids[0])
            assert self.num_computed[request_id] == cached.num_computed_tokens[i], request_id

    def _slot(self, request_id: str, position: int) -> int:
        block_id = self.tables[request_id][position // self.block_size]
        assert block_id != 0, "the null block was given out"
        return block_id * self.block_size + position % self.block_size

    def _read_context(self, request_id: str) -> list[int]:
        """Read all tokens of the request through its block table; every one must be what it should be."""
        context: list[int] = []
        for position, token_id in enumerate(self.tokens[request_id]):
            found = self.slots[self._slot(request_id, position)]
            assert found == (token_id, position, self.salts.get(request_id)), (request_id, position, found)
            context.append(found[0])
        return context


class FakeEngine:
    """schedule -> execute -> update, with `depth` further steps in flight, as EngineCore does it."""

    def __init__(self, scheduler: Scheduler, depth: int = 0) -> None:
        self.scheduler = scheduler
        self.salts: dict[str, str | None] = {}
        pool = scheduler.kv_cache_manager.block_pool
        self.runner = FakeRunner(pool.num_gpu_blocks, scheduler.block_size, self.salts)
        self.depth = depth
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, EngineCoreOutput] = {}
        self.num_steps = 0

    def add(self, *requests: Request) -> None:
        """Queue requests."""
        for request in requests:
            self.salts[request.request_id] = request.cache_salt
            self.outputs[request.request_id] = []
            self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        """Decide and start one step, then take in the oldest one if more than `depth` are in flight."""
        self.num_steps += 1
        output = self.scheduler.schedule()
        self.in_flight.append((output, self.runner.execute_model(output)))
        if len(self.in_flight) > self.depth:
            self._update()
        return output

    def _update(self) -> None:
        result = self.scheduler.update_from_output(*self.in_flight.popleft())
        for out in result[0].outputs:
            assert out.request_id not in self.finished, f"{out.request_id} got something after its end"
            self.outputs[out.request_id].extend(out.new_token_ids)
            if out.finished:
                self.finished[out.request_id] = out

    def run(self, max_steps: int = 2000, check: bool = True) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if self.scheduler.has_requests():
                self.step()
            elif self.in_flight:
                self._update()
            else:
                return
            if check:
                self.scheduler.kv_cache_manager.check_integrity()
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.requests}")
