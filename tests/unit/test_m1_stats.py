"""Statistics: windows over the prefix cache's reports, and the times of a request."""

from __future__ import annotations

import subprocess
import sys

from folovllm.metrics.stats import (
    CachingMetrics,
    EngineCoreEvent,
    EngineCoreEventType,
    IterationStats,
    PrefixCacheStats,
    RequestStateStats,
    SchedulerStats,
)
from folovllm.outputs import EngineCoreOutput
from folovllm.request import FinishReason


def test_prefix_cache_stats_record_and_reset() -> None:
    stats = PrefixCacheStats()
    stats.record(20, 9)
    stats.record(5, 0)
    stats.record(100, 100, preempted=True)
    assert (stats.requests, stats.queries, stats.hits) == (2, 25, 9)
    assert (stats.preempted_requests, stats.preempted_queries, stats.preempted_hits) == (1, 100, 100)
    stats.reset()
    assert stats == PrefixCacheStats(was_reset=True)
    assert PrefixCacheStats(1, 20, 9) == PrefixCacheStats(requests=1, queries=20, hits=9)


def test_caching_metrics_drop_the_oldest_reports() -> None:
    metrics = CachingMetrics(max_recent_requests=5)
    assert metrics.hit_rate == 0.0 and metrics.empty
    metrics.observe(PrefixCacheStats(1, 20, 9))
    assert metrics.hit_rate == 0.45
    metrics.observe(PrefixCacheStats(4, 80, 16))
    assert metrics.hit_rate == 0.25 and not metrics.empty
    # A sixth request pushes out the first report.
    metrics.observe(PrefixCacheStats(1, 10, 2))
    assert metrics.aggregated_requests == 5
    assert (metrics.aggregated_query_total, metrics.aggregated_query_hit) == (90, 18)
    assert list(metrics.query_queue) == [(4, 80, 16), (1, 10, 2)]
    metrics.reset()
    assert metrics.hit_rate == 0.0 and not metrics.query_queue and metrics.empty


def test_caching_metrics_ignore_empty_reports_and_keep_the_last_one() -> None:
    metrics = CachingMetrics(max_recent_requests=5)
    metrics.observe(PrefixCacheStats(0, 0, 0))
    assert len(metrics.query_queue) == 0
    metrics.observe(PrefixCacheStats(2, 10, 5))
    # One report of more requests than the window holds stays whole.
    metrics.observe(PrefixCacheStats(9, 100, 10))
    assert list(metrics.query_queue) == [(9, 100, 10)] and metrics.hit_rate == 0.1


def test_caching_metrics_start_anew_when_the_cache_was_reset() -> None:
    metrics = CachingMetrics()
    metrics.observe(PrefixCacheStats(1, 10, 10))
    pending = PrefixCacheStats(1, 10, 10)
    pending.reset()
    pending.record(4, 1)
    metrics.observe(pending)
    assert metrics.hit_rate == 0.25


def test_scheduler_stats_do_not_share_their_parts() -> None:
    one, other = SchedulerStats(), SchedulerStats()
    one.prefix_cache_stats.record(1, 1)
    assert other.prefix_cache_stats.requests == 0


def test_life_of_a_request() -> None:
    """Wall-clock and monotonic times are never mixed; preemption changes neither start."""
    stats = RequestStateStats(arrival_time=1000.0)
    step = IterationStats(iteration_timestamp=1004.0)
    kinds = EngineCoreEventType
    events = [(kinds.QUEUED, 1.0), (kinds.SCHEDULED, 2.0), (kinds.PREEMPTED, 2.5), (kinds.SCHEDULED, 3.0)]
    step.update_from_events([EngineCoreEvent.new_event(kind, at) for kind, at in events], stats)
    assert (stats.queued_ts, stats.scheduled_ts, stats.num_preemptions) == (1.0, 2.0, 1)
    assert step.num_preempted_reqs == 1
    step.update_from_output(EngineCoreOutput("r", []), 3.5, True, 8, stats)
    assert step.num_prompt_tokens == 0 and stats.first_token_ts == 0.0
    step.update_from_output(EngineCoreOutput("r", [1], num_cached_tokens=4), 4.0, True, 8, stats)
    assert step.num_prompt_tokens == 8 and step.num_cached_tokens == 4
    assert step.time_to_first_tokens_iter == [4.0] == [stats.first_token_latency]
    for timestamp in (4.5, 6.0):
        step.update_from_output(EngineCoreOutput("r", [1]), timestamp, False, 8, stats)
    assert step.inter_token_latencies_iter == [0.5, 1.5] and step.num_generation_tokens == 3
    step.update_from_finished_request(FinishReason.STOP, "r", 8, 16, stats, num_cached_tokens=4)
    (done,) = step.finished_requests
    assert (done.queued_time, done.prefill_time, done.decode_time, done.inference_time) == (1.0, 2.0, 2.0, 4.0)
    assert (done.mean_time_per_output_token, done.e2e_latency) == (1.0, 4.0)
    assert (done.num_prompt_tokens, done.num_generation_tokens, done.max_tokens_param) == (8, 3, 16)
    assert (done.request_id, done.finish_reason, done.num_cached_tokens) == ("r", FinishReason.STOP, 4)


def test_phases_never_reached_take_no_time() -> None:
    step = IterationStats(iteration_timestamp=3.0)
    stats = RequestStateStats(arrival_time=1.0, queued_ts=50.0)
    step.update_from_finished_request(FinishReason.ABORT, "r", 8, None, stats)
    (done,) = step.finished_requests
    assert (done.queued_time, done.prefill_time, done.decode_time, done.inference_time) == (0.0, 0.0, 0.0, 0.0)
    assert done.e2e_latency == 2.0 and done.mean_time_per_output_token == 0.0


def test_an_event_is_of_now_by_default() -> None:
    first, second = (EngineCoreEvent.new_event(EngineCoreEventType.QUEUED) for _ in range(2))
    assert 0 < first.timestamp <= second.timestamp


def test_no_torch() -> None:
    code = "import sys, folovllm.metrics.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
