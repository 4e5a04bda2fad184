"""Scheduler: who computes how many tokens in this step (vLLM: `v1/core/sched/scheduler.py`).

The idea: there is no prefill phase and no decode phase. Every request has `num_computed_tokens` chasing
`num_tokens` (prompt + outputs so far), and each step hands out a budget of tokens to let them catch up:

        tokens of a request   | ########## computed ########## | this step | not yet |
                              0                num_computed_tokens               num_tokens

    a decode            is one token behind: the step computes it, and samples the next one
    a prefill           is many behind; it takes what the budget leaves, over several steps: chunked prefill
    a prefix cache hit  starts with some tokens computed already
    a preemption        sets num_computed_tokens back to 0: recompute, mostly out of the prefix cache

A step samples a token for a request only when it computes the last token known of it. So one step is:

    budget = max_num_batched_tokens
      running   [A, B, C, D]   each in turn: slots for its next tokens; where no blocks are left, the last
      (FCFS) or
         |                     least urgent (priority) one is preempted: to the front of waiting
      waiting   [E, F, ...]    only if nobody was preempted: admit from the front while blocks, budget and
      seats last
         v
    SchedulerOutput -> the model runs -> update_from_output: append tokens, stop or go on
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from folovllm.config import VllmConfig
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.sched.grammar import Grammar, GrammarCompiler, GrammarError
from folovllm.core.sched.interface import SchedulerInterface
from folovllm.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from folovllm.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from folovllm.core.sched.utils import check_stop, remove_all
from folovllm.kv_cache_interface import KVCacheConfig
from folovllm.metrics.stats import EngineCoreEventType, PrefixCacheStats, SchedulerStats
from folovllm.outputs import (
    EngineCoreOutput,
    EngineCoreOutputs,
    LogprobsLists,
    LogprobsTensors,
    ModelRunnerOutput,
)
from folovllm.request import Request, RequestStatus
from folovllm.utils.common import cdiv

BlockIds = tuple[list[int], ...]


@dataclass(slots=True)
class _Step:
    """What schedule() has decided so far."""

    token_budget: int
    # Most tokens that one request may take of the budget.
    chunk_limit: int
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    # Running: newly allocated blocks, absent where there are none. Admitted: all blocks.
    block_ids: dict[str, BlockIds] = field(default_factory=dict)
    running: list[Request] = field(default_factory=list)
    new: list[Request] = field(default_factory=list)
    resumed: list[Request] = field(default_factory=list)
    preempted: bool = False


class Scheduler(SchedulerInterface):
    """Iteration-level scheduling over a paged KV cache; the module docstring has the idea.

    Owns the truth about every request's progress and blocks. The cost of a step is O(scheduled requests): it
    depends neither on how many requests wait, nor on how long sequences are, nor on how many blocks there
    are.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        block_size: int,
        log_stats: bool = False,
        grammar_compiler: GrammarCompiler | None = None,
    ) -> None:
        """
        Args:
            vllm_config: the whole configuration; read once, never changed.
            kv_cache_config: the cache as the workers have it.
            block_size: tokens per block; must be the cache's.
            log_stats: whether update_from_output attaches SchedulerStats, and outputs carry their events.
            grammar_compiler: for requests with structured outputs; None fails those.
        """
        self.vllm_config = vllm_config
        self.scheduler_config = vllm_config.scheduler_config
        self.cache_config = vllm_config.cache_config
        self.kv_cache_config = kv_cache_config
        self.block_size = block_size
        self.log_stats = log_stats
        self.max_num_running_reqs = self.scheduler_config.max_num_seqs
        self.max_num_scheduled_tokens = self.scheduler_config.max_num_batched_tokens
        max_model_len = vllm_config.model_config.max_model_len
        assert max_model_len is not None
        self.max_model_len = max_model_len
        self.policy = SchedulingPolicy(self.scheduler_config.policy)

        self.requests: dict[str, Request] = {}
        """Every request that runs or waits, by id."""
        self.waiting: RequestQueue = create_request_queue(self.policy)
        """Not admitted yet, or preempted."""
        self.running: list[Request] = []
        """Admitted, in order of admission; at most max_num_seqs."""
        self.finished_req_ids: set[str] = set()
        """Ended since the last schedule(): the next output tells the worker."""
        self.kv_cache_manager = KVCacheManager(
            kv_cache_config=kv_cache_config,
            max_model_len=max_model_len,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=self.cache_config.enable_prefix_caching,
            log_stats=log_stats,
        )
        self.grammar_compiler = grammar_compiler
        # Requests whose grammar is being compiled: they keep their place in `waiting`, and others pass them.
        self._compiling: dict[Request, None] = {}
        # How many requests have a grammar: most engines never have one.
        self._num_grammars = 0
        # Preempted since the last schedule(): the next output tells the worker.
        self._preempted_req_ids: set[str] = set()
        self._num_preemptions = 0
        # Outputs of requests that ended in schedule(); the next update_from_output delivers them.
        self._undelivered: list[EngineCoreOutput] = []

    # ---- Requests come and go ----

    def add_request(self, request: Request) -> None:
        """Queue a request; ValueError for an id that is still known."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id={request.request_id!r} is in use; give every request its own id.")
        self.requests[request.request_id] = request
        self.waiting.add_request(request)
        if request.sampling_params.structured_outputs is not None:
            request.status = RequestStatus.WAITING_FOR_GRAMMAR
            self._compiling[request] = None
            if self.grammar_compiler is not None:
                self.grammar_compiler.start(request)
        if self.log_stats:
            request.record_event(EngineCoreEventType.QUEUED)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[str]:
        """End requests from outside, at any moment: one id, several, None for all; unknown ids do nothing."""
        assert RequestStatus.is_finished(finished_status)
        if request_ids is None:
            request_ids = list(self.requests)
        elif isinstance(request_ids, str):
            request_ids = (request_ids,)
        ended = {self.requests[i]: None for i in request_ids if i in self.requests}
        running = {request for request in ended if request.status == RequestStatus.RUNNING}
        if running:
            self.running = remove_all(self.running, running)
        self.waiting.remove_requests(request for request in ended if request not in running)
        for request in ended:
            request.status = finished_status
            self._free_request(request)
        return [request.request_id for request in ended]

    def _free_request(self, request: Request) -> None:
        """Forget a finished request that is in neither queue any more."""
        if request.grammar is not None:
            request.grammar = None
            self._num_grammars -= 1
        elif request in self._compiling:
            del self._compiling[request]
            if self.grammar_compiler is not None:
                self.grammar_compiler.forget(request)
        self.kv_cache_manager.free(request)
        self.finished_req_ids.add(request.request_id)
        self._preempted_req_ids.discard(request.request_id)
        del self.requests[request.request_id]

    def get_request_counts(self) -> tuple[int, int]:
        """Return (running, waiting)."""
        return len(self.running), len(self.waiting)

    def get_num_unfinished_requests(self) -> int:
        """Return how many requests run or wait."""
        return len(self.running) + len(self.waiting)

    def has_finished_requests(self) -> bool:
        """Return whether ended requests are still to be reported (to worker or client): a step is due."""
        return bool(self.finished_req_ids or self._undelivered)

    # ---- A step is decided ----

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; total_num_scheduled_tokens is 0 where there is nothing to compute.

        Blocks are allocated and num_computed_tokens advances at once, so that the step after can be decided
        before this one has run.
        """
        if self._compiling:
            self._poll_grammars()
        step = _Step(
            token_budget=self.max_num_scheduled_tokens,
            chunk_limit=self.scheduler_config.long_prefill_token_threshold or sys.maxsize,
        )
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        output = self._make_scheduler_output(step)
        self._update_after_schedule(output)
        if self._num_grammars:
            output.structured_output_request_ids = self._sampling_under_grammar(output)
        return output

    def _schedule_running(self, step: _Step) -> None:
        """Give every running request its next tokens; preempt the least deserving where blocks run out."""
        has_slot = self.kv_cache_manager.has_slot_for_next_token
        scheduled, num_scheduled_tokens = step.running, step.num_scheduled_tokens
        # A copy: who is preempted on the way leaves `running`.
        for request in tuple(self.running):
            if step.token_budget <= 0:
                return
            if step.preempted and request.status != RequestStatus.RUNNING:
                continue
            num_new_tokens = self._num_uncomputed_tokens(request)
            if num_new_tokens <= 0:
                continue  # all its tokens are being computed: it waits for the output of an earlier step
            if num_new_tokens > 1:
                num_new_tokens = min(num_new_tokens, step.chunk_limit, step.token_budget)
            # Most requests of most steps decode inside a block, which has a slot for their token: not to call the
            # manager for those halves the time of schedule().
            inside_block = num_new_tokens == 1 and has_slot(request)
            if not inside_block and not self._allocate_or_preempt(request, num_new_tokens, step):
                return  # it was its own victim: nobody behind it deserves blocks more
            scheduled.append(request)
            num_scheduled_tokens[request.request_id] = num_new_tokens
            step.token_budget -= num_new_tokens

    def _num_uncomputed_tokens(self, request: Request) -> int:
        """How far `num_computed_tokens` of a running request is behind."""
        return request.num_tokens - request.num_computed_tokens

    def _allocate_or_preempt(self, request: Request, num_new_tokens: int, step: _Step) -> bool:
        """Allocate blocks for the next tokens of a running request, at others' cost if need be.

        Returns whether it got them; if not, it has been preempted itself.
        """
        while (new_blocks := self.kv_cache_manager.allocate_slots(request, num_new_tokens)) is None:
            self._preempt_one(step)
            if request.status != RequestStatus.RUNNING:
                return False
        if new_blocks.blocks[0]:
            step.block_ids[request.request_id] = new_blocks.get_block_ids()
        return True

    def _preempt_one(self, step: _Step) -> None:
        """Preempt the least deserving running request.

        It may be one that has been scheduled in this step already (priority policy): that is withdrawn.
        """
        if self.policy is SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
            self.running.remove(victim)
        else:
            victim = self.running.pop()
        num_tokens = step.num_scheduled_tokens.pop(victim.request_id, 0)
        if num_tokens:
            step.running.remove(victim)
            step.token_budget += num_tokens
            self.kv_cache_manager.uncache_uncomputed_blocks(victim)
        self._preempt_request(victim)
        step.preempted = True

    def _preempt_request(self, request: Request) -> None:
        """Take all blocks of a request that has left `running`; it starts again from the front of waiting."""
        self.kv_cache_manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        if self.log_stats:
            request.record_event(EngineCoreEventType.PREEMPTED)
        self.waiting.prepend_request(request)
        self._preempted_req_ids.add(request.request_id)
        self._num_preemptions += 1

    def _schedule_waiting(self, step: _Step) -> None:
        """Admit requests from the front of the queue until the first that does not fit: no skipping.

        Except of those whose grammar is not ready: they do not hold up others, and keep their place.
        """
        skipped: list[Request] = []
        while self.waiting and step.token_budget > 0 and len(self.running) < self.max_num_running_reqs:
            request = self.waiting.peek_request()
            if request.status == RequestStatus.WAITING_FOR_GRAMMAR:
                skipped.append(self.waiting.pop_request())
            elif not self._try_admit(request, step):
                break
        for request in reversed(skipped):
            self.waiting.prepend_request(request)

    def _try_admit(self, request: Request, step: _Step) -> bool:
        """Move the first waiting request to `running`, if it fits; return whether the next one may be tried.

        Only what is not cached counts against the budget.
        """
        if cdiv(request.num_tokens, self.block_size) > self.kv_cache_manager.num_usable_blocks:
            self._give_up(request)
            return True
        hits, num_hit_tokens = self.kv_cache_manager.get_computed_blocks(request)
        num_new_tokens = min(request.num_tokens - num_hit_tokens, step.chunk_limit)
        if num_new_tokens > step.token_budget:
            if not self.scheduler_config.enable_chunked_prefill:
                return False
            num_new_tokens = step.token_budget
        new_blocks = self.kv_cache_manager.allocate_slots(
            request, num_new_tokens, num_hit_tokens, hits, full_sequence_must_fit=True
        )
        if new_blocks is None:
            return False
        self.waiting.pop_request()
        self.running.append(request)
        (step.new if request.status == RequestStatus.WAITING else step.resumed).append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_hit_tokens
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED)
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_hit_tokens
        request_id = request.request_id
        step.num_scheduled_tokens[request_id] = num_new_tokens
        step.token_budget -= num_new_tokens
        step.block_ids[request_id] = self.kv_cache_manager.get_block_ids(request_id)
        return True

    def _give_up(self, request: Request) -> None:
        """End the first waiting request, which is larger than the whole pool, and tell its owner why.

        Its prompt was too long, or it ran, outgrew the pool when it was alone, and preempted itself.
        """
        has_output = request.num_output_tokens > 0
        status = RequestStatus.FINISHED_LENGTH_CAPPED if has_output else RequestStatus.FINISHED_IGNORED
        reason = (
            f"{request.num_tokens} tokens need {cdiv(request.num_tokens, self.block_size)} KV cache blocks "
            f"of {self.block_size}, but only {self.kv_cache_manager.num_usable_blocks} exist: raise "
            "kv_cache_memory_bytes or num_gpu_blocks_override, or lower max_model_len"
        )
        self._end_waiting(request, status, reason)

    def _end_waiting(self, request: Request, status: RequestStatus, reason: str) -> None:
        """End a waiting request; the next update_from_output tells its owner the reason."""
        self.waiting.remove_request(request)
        request.status = status
        request.stop_reason = reason
        self._free_request(request)
        self._undelivered.append(_make_output(request, [], finished=True))

    # ---- Grammars ----

    def _poll_grammars(self) -> None:
        """Let requests run whose grammar is ready, and end those whose grammar failed."""
        for request in tuple(self._compiling):
            try:
                if self.grammar_compiler is None:
                    raise GrammarError("this engine was made without a compiler of grammars")
                request.grammar = self.grammar_compiler.poll(request)
            except GrammarError as error:
                reason = f"structured_outputs: {error}"
                self._end_waiting(request, RequestStatus.FINISHED_ERROR, reason)
                continue
            if request.grammar is not None:
                del self._compiling[request]
                self._num_grammars += 1
                request.status = RequestStatus.WAITING

    def _sampling_under_grammar(self, output: SchedulerOutput) -> list[str]:
        """Return the requests with a grammar whose next token this step samples: not those in mid-prompt."""
        requests = self.requests
        # With AsyncScheduler a placeholder counts too, and none of these had one before this step.
        return [
            request_id
            for request_id in output.num_scheduled_tokens
            if (request := requests[request_id]).grammar is not None
            and request.num_computed_tokens == request.num_tokens
        ]

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput:
        """Return the masks of a step with `structured_output_request_ids`; before update_from_output of that step.

        Requests that have ended meanwhile are left out: nobody will look at their tokens.
        """
        ids = [
            request_id
            for request_id in scheduler_output.structured_output_request_ids
            if request_id in self.requests and self.requests[request_id].grammar is not None
        ]
        grammars = [grammar for i in ids if (grammar := self.requests[i].grammar) is not None]
        assert self.grammar_compiler is not None
        return GrammarOutput(ids, self.grammar_compiler.fill_bitmask(grammars))

    def wait_for_grammar(self, timeout_s: float) -> None:
        """Where requests wait for nothing but their grammar: return once one is ready, at most after `timeout_s`."""
        if self._compiling and self.grammar_compiler is not None and not self.has_finished_requests():
            self.grammar_compiler.wait(timeout_s)

    def _follow_grammar(self, request: Request, grammar: Grammar, token_id: int) -> bool:
        """Move the request's grammar on by a token that was sampled; False ends the request: there was none to sample.

        The worker says so with a negative id.
        """
        if token_id >= 0 and grammar.accept_token(token_id):
            return True
        request.status = RequestStatus.FINISHED_ERROR
        request.stop_reason = (
            f"structured_outputs: after {request.num_output_tokens} tokens no token may follow: the grammar allows "
            "none, or min_tokens, bad_words, allowed_token_ids and the like forbid those that it allows"
        )
        return False

    def _make_scheduler_output(self, step: _Step) -> SchedulerOutput:
        num_scheduled_tokens = step.num_scheduled_tokens
        block_ids = step.block_ids
        cached = step.running + step.resumed
        cached_ids = [request.request_id for request in cached]
        output = SchedulerOutput(
            scheduled_new_reqs=[NewRequestData.from_request(r, block_ids[r.request_id]) for r in step.new],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=cached_ids,
                resumed_req_ids={request.request_id for request in step.resumed},
                new_block_ids=list(map(block_ids.get, cached_ids)),
                num_computed_tokens=[request.num_computed_tokens for request in cached],
                num_output_tokens=[r.num_tokens - r.num_prompt_tokens + r.num_output_placeholders for r in cached],
                all_token_ids={r.request_id: r.all_token_ids.copy() for r in step.resumed},
            ),
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=self.max_num_scheduled_tokens - step.token_budget,
            finished_req_ids=self.finished_req_ids,
            preempted_req_ids=self._preempted_req_ids,
        )
        # New sets, not cleared ones: the output keeps the old.
        self.finished_req_ids = set()
        self._preempted_req_ids = set()
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Count the step as computed. After the output is made: that says where the step starts."""
        requests = self.requests
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            requests[request_id].num_computed_tokens += num_tokens

    # ---- A step has run ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Append the sampled tokens of an executed step, end who stops; return {0: what each request got}."""
        outputs = self._undelivered
        self._undelivered = []
        sampled_token_ids = model_runner_output.sampled_token_ids
        req_id_to_index = model_runner_output.req_id_to_index
        prompt_logprobs_dict = model_runner_output.prompt_logprobs_dict
        logprobs = model_runner_output.logprobs
        requests = self.requests
        stopped_running: set[Request] = set()
        for request_id in scheduler_output.num_scheduled_tokens:
            request = requests.get(request_id)
            if request is None:
                continue  # ended while the step ran
            index = req_id_to_index[request_id]
            new_token_ids = sampled_token_ids[index] if sampled_token_ids else []
            prompt_logprobs = prompt_logprobs_dict.get(request_id) if prompt_logprobs_dict else None
            if not new_token_ids and prompt_logprobs is None:
                continue  # a prefill that is not done yet
            status = request.status
            new_token_ids, stopped = self._update_request_with_output(request, new_token_ids)
            new_logprobs = None
            if logprobs is not None and new_token_ids and request.sampling_params.logprobs is not None:
                new_logprobs = logprobs.slice_request(index, len(new_token_ids))
            outputs.append(_make_output(request, new_token_ids, stopped, new_logprobs, prompt_logprobs))
            if stopped:
                if status == RequestStatus.PREEMPTED:  # while the step ran
                    self.waiting.remove_request(request)
                else:
                    stopped_running.add(request)
                self._free_request(request)
        if stopped_running:
            self.running = remove_all(self.running, stopped_running)
        return {0: EngineCoreOutputs(outputs=outputs, scheduler_stats=self.make_stats(), timestamp=time.monotonic())}

    def _update_request_with_output(self, request: Request, new_token_ids: list[int]) -> tuple[list[int], bool]:
        """Append tokens until one ends the request; return those appended, and whether one did.

        The request may have been preempted while the step ran: the token was drawn and counts all the same.
        """
        max_model_len = self.max_model_len
        num_before = request.num_tokens
        grammar = request.grammar
        for token_id in new_token_ids:
            if grammar is not None and not self._follow_grammar(request, grammar, token_id):
                return [], True
            request.append_output_token_ids(token_id)
            stopped = check_stop(request, max_model_len, token_id)
            if grammar is not None and not stopped and grammar.is_terminated():
                request.status = RequestStatus.FINISHED_STOPPED
                stopped = True
            if not stopped and request.num_tokens >= max_model_len:
                # min_tokens does not lengthen the block table.
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
                stopped = True
            if stopped:
                # A new list: the runner's may be shared.
                return new_token_ids[: request.num_tokens - num_before], True
        return new_token_ids, False

    # ---- The rest ----

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all cached blocks; False, and no change, while requests hold any.

        With `reset_running_requests` all running requests are preempted first, so it succeeds; they keep
        their order, and tokens already sampled for them still count.
        """
        if reset_running_requests:
            while self.running:
                self._preempt_request(self.running.pop())
        return self.kv_cache_manager.reset_prefix_cache()

    def make_stats(self) -> SchedulerStats | None:
        """Return the state of the queues and the counts since the last call; None without log_stats."""
        if not self.log_stats:
            return None
        stats = SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            kv_cache_usage=self.kv_cache_manager.usage,
            prefix_cache_stats=self.kv_cache_manager.make_prefix_cache_stats() or PrefixCacheStats(),
            num_preempted_reqs=self._num_preemptions,
        )
        self._num_preemptions = 0
        return stats

    def shutdown(self) -> None:
        """Stop compiling grammars: the scheduler holds nothing else outside itself."""
        if self.grammar_compiler is not None:
            self.grammar_compiler.shutdown()


def _make_output(
    request: Request,
    new_token_ids: list[int],
    finished: bool,
    new_logprobs: LogprobsLists | None = None,
    prompt_logprobs: LogprobsTensors | None = None,
) -> EngineCoreOutput:
    # Positional: this is the one object that every request gets in every step.
    return EngineCoreOutput(
        request.request_id,
        new_token_ids,
        new_logprobs,
        prompt_logprobs,
        request.get_finished_reason() if finished else None,
        request.stop_reason,
        request.num_cached_tokens if request.num_cached_tokens > 0 else 0,
        None if request.events is None else request.take_events(),
    )
