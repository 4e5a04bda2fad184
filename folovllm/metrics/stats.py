"""Counts and times of a step, of a request, of the prefix cache (vLLM: `v1/metrics/stats.py`).

Three owners fill these: the scheduler (SchedulerStats, PrefixCacheStats, events), the output processor
(RequestStateStats, IterationStats) and whoever logs them (CachingMetrics). Torch-free.

Two clocks: `arrival_time` and `iteration_timestamp` are wall-clock seconds (`time.time()`), everything named
`_ts` is monotonic seconds (`time.monotonic()`); a difference is only ever taken within one clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folovllm.outputs import EngineCoreOutput
    from folovllm.request import FinishReason


class EngineCoreEventType(IntEnum):
    """What happened to a request inside the scheduler (vLLM: `v1/engine/__init__.py`)."""

    QUEUED = 1
    """Entered the waiting queue."""
    SCHEDULED = 2
    """Got its first tokens of a step, at first or after a preemption."""
    PREEMPTED = 3
    """Lost its blocks and went back to the waiting queue."""


@dataclass(frozen=True)
class EngineCoreEvent:
    """One event of one request."""

    type: EngineCoreEventType
    """What happened."""
    timestamp: float
    """When: `time.monotonic()` seconds."""

    @classmethod
    def new_event(cls, event_type: EngineCoreEventType, timestamp: float | None = None) -> EngineCoreEvent:
        """Return an event of now, or of `timestamp`."""
        return cls(event_type, time.monotonic() if timestamp is None else timestamp)


@dataclass
class PrefixCacheStats:
    """Look-ups in the prefix cache since the last report."""

    requests: int = 0
    """Requests that looked up their prompt."""
    queries: int = 0
    """Tokens they asked for."""
    hits: int = 0
    """Tokens they found."""
    preempted_requests: int = 0
    """Requests that resumed after a preemption: counted apart, since they hit their own blocks."""
    preempted_queries: int = 0
    """Tokens those asked for."""
    preempted_hits: int = 0
    """Tokens those found."""
    was_reset: bool = False
    """Whether the cache was emptied since the last report: windows over older look-ups start anew."""

    def record(self, num_tokens: int, num_hits: int, preempted: bool = False) -> None:
        """Count one request's look-up of `num_tokens` tokens, of which `num_hits` were cached."""
        if preempted:
            self.preempted_requests += 1
            self.preempted_queries += num_tokens
            self.preempted_hits += num_hits
        else:
            self.requests += 1
            self.queries += num_tokens
            self.hits += num_hits

    def reset(self) -> None:
        """Forget all counts, and note in `was_reset` that the cache was emptied (vLLM: the flag `reset`)."""
        self.requests = self.queries = self.hits = 0
        self.preempted_requests = self.preempted_queries = self.preempted_hits = 0
        self.was_reset = True


class CachingMetrics:
    """Hit rate of the prefix cache over about the last `max_recent_requests` requests.

    Reports are dropped whole, oldest first, while more requests than that are held and more than one report
    remains.
    """

    def __init__(self, max_recent_requests: int = 1000) -> None:
        """`max_recent_requests`: size of the window, in requests."""
        self.max_recent_requests = max_recent_requests
        self.aggregated_requests = 0
        self.aggregated_query_total = 0
        self.aggregated_query_hit = 0
        # (requests, queries, hits) of each report in the window, oldest first.
        self.query_queue: deque[tuple[int, int, int]] = deque()

    def observe(self, stats: PrefixCacheStats) -> None:
        """Add one report. One without requests is ignored, so that idle steps do not push real ones out."""
        if stats.was_reset:
            self.reset()
        if stats.requests == 0:
            return
        self.query_queue.append((stats.requests, stats.queries, stats.hits))
        self.aggregated_requests += stats.requests
        self.aggregated_query_total += stats.queries
        self.aggregated_query_hit += stats.hits
        while len(self.query_queue) > 1 and self.aggregated_requests > self.max_recent_requests:
            requests, queries, hits = self.query_queue.popleft()
            self.aggregated_requests -= requests
            self.aggregated_query_total -= queries
            self.aggregated_query_hit -= hits

    def reset(self) -> None:
        """Empty the window."""
        self.aggregated_requests = 0
        self.aggregated_query_total = 0
        self.aggregated_query_hit = 0
        self.query_queue.clear()

    @property
    def empty(self) -> bool:
        """Whether the window holds no request."""
        return self.aggregated_requests == 0

    @property
    def hit_rate(self) -> float:
        """Tokens found / tokens asked for, in the window; 0.0 when nothing was asked."""
        if self.aggregated_query_total == 0:
            return 0.0
        return self.aggregated_query_hit / self.aggregated_query_total


@dataclass
class SchedulerStats:
    """The scheduler's state after a step."""

    num_running_reqs: int = 0
    """Requests that hold blocks and run."""
    num_waiting_reqs: int = 0
    """Requests in the waiting queue, preempted ones included."""
    kv_cache_usage: float = 0.0
    """Share of the usable blocks that are referenced, 0 to 1."""
    prefix_cache_stats: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    """Look-ups of this step."""
    num_preempted_reqs: int = 0
    """Preemptions of this step."""


@dataclass
class RequestStateStats:
    """What is remembered of a request from its arrival to its end."""

    arrival_time: float = 0.0
    """Wall clock."""
    num_generation_tokens: int = 0
    """Output tokens so far."""
    queued_ts: float = 0.0
    """Monotonic; entered the waiting queue. 0 where not known."""
    scheduled_ts: float = 0.0
    """Monotonic; first scheduled (preemptions do not change it). 0 where not known."""
    first_token_ts: float = 0.0
    """Monotonic; 0 before the first token."""
    last_token_ts: float = 0.0
    """Monotonic; 0 before the first token."""
    first_token_latency: float = 0.0
    """Seconds from arrival to the first token (TTFT), 0 before it."""
    inter_token_latencies: list[float] = field(default_factory=list)
    """Seconds between one output and the next: the second token's first."""
    num_preemptions: int = 0
    """Times that it lost its blocks."""

    @property
    def queued_time(self) -> float:
        """Seconds from the queue to the first step; 0 before it."""
        return _elapsed(self.queued_ts, self.scheduled_ts)


@dataclass
class FinishedRequestStats:
    """Summary of one request that has ended; times are seconds, 0 for a phase that it never reached."""

    finish_reason: FinishReason
    """Why it ended."""
    request_id: str | None = None
    """The id the client used."""
    e2e_latency: float = 0.0
    """Arrival to end."""
    num_prompt_tokens: int = 0
    """Length of the prompt."""
    num_generation_tokens: int = 0
    """Length of the output."""
    max_tokens_param: int | None = None
    """`max_tokens` of its SamplingParams."""
    queued_time: float = 0.0
    """Queued to first scheduled."""
    prefill_time: float = 0.0
    """First scheduled to first token, preemptions included."""
    inference_time: float = 0.0
    """First scheduled to last token, preemptions included."""
    decode_time: float = 0.0
    """First to last token, preemptions included."""
    mean_time_per_output_token: float = 0.0
    """decode_time / (tokens - 1): the first token belongs to the prefill."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""


@dataclass
class IterationStats:
    """What one call of OutputProcessor.process_outputs saw."""

    iteration_timestamp: float = field(default_factory=time.time)
    """Wall clock."""
    num_prompt_tokens: int = 0
    """Tokens of the prompts whose first output token arrived."""
    num_cached_tokens: int = 0
    """Those of them that the prefix cache held."""
    num_generation_tokens: int = 0
    """New output tokens."""
    num_preempted_reqs: int = 0
    """Preemptions since the last step."""
    time_to_first_tokens_iter: list[float] = field(default_factory=list)
    """Seconds from arrival to first token, per request whose first token came."""
    inter_token_latencies_iter: list[float] = field(default_factory=list)
    """Seconds since the previous output, per request that had one before."""
    finished_requests: list[FinishedRequestStats] = field(default_factory=list)
    """Requests that ended."""
    max_num_generation_tokens_iter: list[int] = field(default_factory=list)
    """Longest sample of each client request that ended (its n samples together)."""
    n_params_iter: list[int] = field(default_factory=list)
    """`n` of each client request that ended."""

    def update_from_output(
        self,
        output: EngineCoreOutput,
        engine_core_timestamp: float,
        is_prefilling: bool,
        prompt_len: int,
        req_stats: RequestStateStats,
    ) -> None:
        """Count one request's output.

        Args:
            output: what the core sent; one without tokens (an abort) counts no time.
            engine_core_timestamp: monotonic seconds at the end of the step.
            is_prefilling: whether no output token had come before.
            prompt_len: prompt tokens.
            req_stats: updated in place.
        """
        num_new_tokens = len(output.new_token_ids)
        if num_new_tokens == 0:
            return
        self.num_generation_tokens += num_new_tokens
        req_stats.num_generation_tokens += num_new_tokens
        if is_prefilling:
            self.num_prompt_tokens += prompt_len
            self.num_cached_tokens += output.num_cached_tokens
            req_stats.first_token_latency = self.iteration_timestamp - req_stats.arrival_time
            self.time_to_first_tokens_iter.append(req_stats.first_token_latency)
            req_stats.first_token_ts = engine_core_timestamp
        else:
            latency = engine_core_timestamp - req_stats.last_token_ts
            self.inter_token_latencies_iter.append(latency)
            req_stats.inter_token_latencies.append(latency)
        req_stats.last_token_ts = engine_core_timestamp

    def update_from_events(self, events: Iterable[EngineCoreEvent], req_stats: RequestStateStats) -> None:
        """Take over the scheduler's events of one request into `req_stats`."""
        for event in events:
            if event.type == EngineCoreEventType.QUEUED:
                req_stats.queued_ts = event.timestamp
            elif event.type == EngineCoreEventType.SCHEDULED:
                if req_stats.scheduled_ts == 0.0:
                    req_stats.scheduled_ts = event.timestamp
            else:
                req_stats.num_preemptions += 1
                self.num_preempted_reqs += 1

    def update_from_finished_request(
        self,
        finish_reason: FinishReason,
        request_id: str,
        num_prompt_tokens: int,
        max_tokens_param: int | None,
        req_stats: RequestStateStats,
        num_cached_tokens: int = 0,
    ) -> None:
        """Append the summary of a request that has ended to `finished_requests`."""
        decode_time = _elapsed(req_stats.first_token_ts, req_stats.last_token_ts)
        num_decoded = req_stats.num_generation_tokens - 1
        self.finished_requests.append(
            FinishedRequestStats(
                finish_reason=finish_reason,
                request_id=request_id,
                e2e_latency=self.iteration_timestamp - req_stats.arrival_time,
                num_prompt_tokens=num_prompt_tokens,
                num_generation_tokens=req_stats.num_generation_tokens,
                max_tokens_param=max_tokens_param,
                queued_time=req_stats.queued_time,
                prefill_time=_elapsed(req_stats.scheduled_ts, req_stats.first_token_ts),
                inference_time=_elapsed(req_stats.scheduled_ts, req_stats.last_token_ts),
                decode_time=decode_time,
                mean_time_per_output_token=decode_time / num_decoded if num_decoded > 0 else 0.0,
                num_cached_tokens=num_cached_tokens,
            )
        )


def _elapsed(start_ts: float, end_ts: float) -> float:
    """Seconds between two monotonic times; 0 where either was never set."""
    return end_ts - start_ts if start_ts and end_ts else 0.0
