"""Events of a request from the scheduler to RequestOutput.metrics, and the periodic log line."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from folovllm.core.sched.scheduler import Scheduler
from folovllm.engine.llm_engine import LLMEngine
from folovllm.metrics import loggers
from folovllm.metrics.loggers import LoggingStatLogger
from folovllm.metrics.stats import (
    EngineCoreEvent,
    EngineCoreEventType,
    IterationStats,
    PrefixCacheStats,
    RequestStateStats,
    SchedulerStats,
)
from folovllm.outputs import EngineCoreOutput, RequestOutput
from folovllm.request import RequestStatus
from folovllm.sampling_params import SamplingParams
from tests.core_utils import create_requests, create_scheduler, make_output, make_request, make_vllm_config
from tests.fakes import FakeExecutor, FakeTokenizer

QUEUED, SCHEDULED, PREEMPTED = EngineCoreEventType


def step(scheduler: Scheduler) -> dict[str, EngineCoreOutput]:
    output = scheduler.schedule()
    result = scheduler.update_from_output(output, make_output(output))
    return {out.request_id: out for out in result[0].outputs}


def types(events: list[EngineCoreEvent] | None) -> list[EngineCoreEventType] | None:
    return None if events is None else [event.type for event in events]


def test_events_are_taken_once() -> None:
    request = make_request("a", [1])
    assert request.take_events() is None
    request.record_event(QUEUED, 1.5)
    request.record_event(SCHEDULED)
    events = request.take_events()
    assert types(events) == [QUEUED, SCHEDULED] and events is not None
    assert events[0].timestamp == 1.5 < events[1].timestamp
    assert request.take_events() is None


def test_the_scheduler_tells_what_it_did() -> None:
    # Two of these fit until both grow; then the second is preempted and comes back.
    scheduler = create_scheduler(num_blocks=6, block_size=4, log_stats=True, max_model_len=64)
    for request in create_requests(2, num_tokens=7, block_size=4, max_tokens=8):
        scheduler.add_request(request)
    first = step(scheduler)
    assert types(first["0"].events) == types(first["1"].events) == [QUEUED, SCHEDULED]
    later: dict[str, list[Any]] = {"0": [], "1": []}
    while scheduler.has_unfinished_requests():
        for request_id, output in step(scheduler).items():
            later[request_id].append(types(output.events))
    assert set(map(repr, later["0"])) == {"None"}
    assert [events for events in later["1"] if events is not None] == [[PREEMPTED, SCHEDULED]]


def test_no_events_without_log_stats() -> None:
    scheduler = create_scheduler(num_blocks=6, block_size=4, max_model_len=64)
    requests = create_requests(2, num_tokens=7, block_size=4, max_tokens=8)
    for request in requests:
        scheduler.add_request(request)
    while scheduler.has_unfinished_requests():
        assert all(output.events is None for output in step(scheduler).values())
    assert requests[1].num_preemptions == 1 and requests[1].events is None


def test_a_request_that_is_given_up_tells_that_it_was_queued() -> None:
    scheduler = create_scheduler(num_blocks=3, block_size=4, log_stats=True, max_model_len=64)
    scheduler.add_request(make_request("big", range(30), block_size=4))
    output = step(scheduler)["big"]
    assert output.finished and types(output.events) == [QUEUED]


def make_engine(num_blocks: int, log_stats: bool = True) -> LLMEngine:
    config = make_vllm_config(max_model_len=64, block_size=4, enable_prefix_caching=True)
    config.model_config.hf_config |= {"vocab_size": 300}  # type: ignore[operator]
    config.cache_config.num_gpu_blocks_override = num_blocks
    executor = FakeExecutor(vocab_size=300, block_size=4, forbidden=[1, 3], step_seconds=0.001)
    return LLMEngine(config, executor, FakeTokenizer(), {}, log_stats)  # type: ignore[arg-type]


def run(engine: LLMEngine, num_requests: int) -> dict[str, RequestOutput]:
    for i in range(num_requests):
        prompt = {"prompt_token_ids": [i + 10] * 7}
        engine.add_request(str(i), prompt, SamplingParams(max_tokens=40, ignore_eos=True))  # type: ignore[arg-type]
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return finished


def test_metrics_of_a_request() -> None:
    outputs = run(make_engine(num_blocks=17), 2)
    preemptions = []
    for output in outputs.values():
        metrics = output.metrics
        assert metrics is not None
        assert 0 < metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts < metrics.last_token_ts
        assert metrics.queued_time == metrics.scheduled_ts - metrics.queued_ts
        assert 0.001 <= metrics.first_token_latency < 5
        assert metrics.num_generation_tokens == 40
        assert len(metrics.inter_token_latencies) == 39 and min(metrics.inter_token_latencies) >= 0.001
        span = metrics.last_token_ts - metrics.first_token_ts
        assert sum(metrics.inter_token_latencies) == pytest.approx(span)
        preemptions.append(metrics.num_preemptions)
    assert preemptions[0] == 0 and preemptions[1] >= 1


def test_no_metrics_without_log_stats() -> None:
    engine = make_engine(num_blocks=40, log_stats=False)
    assert engine.stat_logger is None
    assert all(output.metrics is None for output in run(engine, 2).values())


def test_queued_time_is_unknown_before_the_first_step() -> None:
    stats = RequestStateStats(queued_ts=5.0)
    assert stats.queued_time == 0.0
    stats.scheduled_ts = 7.5
    assert stats.queued_time == 2.5


# ---- The log line ----


class Clock:
    """time.monotonic() under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loggers, "time", clock)
    return clock


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what the logger writes at INFO or above."""
    collected: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(f"{record.levelname}: {record.getMessage()}")

    handler = Collector(logging.INFO)
    loggers.logger.addHandler(handler)
    monkeypatch.setattr(loggers.logger, "level", logging.INFO)
    yield collected  # type: ignore[misc]
    loggers.logger.removeHandler(handler)


def busy(running: int = 3, waiting: int = 2, **kwargs: Any) -> SchedulerStats:
    return SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=0.125, **kwargs)


def test_a_line_every_interval(clock: Clock, lines: list[str]) -> None:
    stat_logger = LoggingStatLogger(interval_seconds=10.0)
    for _ in range(40):
        clock.now += 0.5
        stats = busy(prefix_cache_stats=PrefixCacheStats(1, 10, 4), num_preempted_reqs=1)
        stat_logger.record(stats, IterationStats(num_prompt_tokens=20, num_generation_tokens=4))
        stat_logger.log_if_due()
    line = (
        "INFO: Avg prompt throughput: 40.0 tokens/s, Avg generation throughput: 8.0 tokens/s, Running: 3 reqs, "
        "Waiting: 2 reqs, Preemptions: 20, KV cache usage: 12.5%, Prefix cache hit rate: 40.0%"
    )
    assert lines == [line, line]


def test_a_pause_is_no_part_of_the_throughput(clock: Clock, lines: list[str]) -> None:
    stat_logger = LoggingStatLogger(interval_seconds=10.0)
    stat_logger.record(busy(running=0, waiting=0), IterationStats(num_generation_tokens=1))
    clock.now += 1000
    for _ in range(10):
        stat_logger.record(busy(), IterationStats(num_generation_tokens=50))
        clock.now += 1
        stat_logger.log_if_due()
    assert len(lines) == 1 and "generation throughput: 50.0" in lines[0]


def test_steps_longer_than_the_interval_count(clock: Clock, lines: list[str]) -> None:
    stat_logger = LoggingStatLogger(interval_seconds=10.0)
    stat_logger.record(busy(), None)
    for _ in range(2):
        clock.now += 20
        stat_logger.record(busy(), IterationStats(num_generation_tokens=40))
        stat_logger.log_if_due()
    assert len(lines) == 2 and all("generation throughput: 2.0" in line for line in lines)


def test_idle_lines_are_silent_after_the_first(clock: Clock, lines: list[str]) -> None:
    stat_logger = LoggingStatLogger()
    clock.now += 1
    stat_logger.record(busy(), IterationStats(num_generation_tokens=5))
    for _ in range(4):
        clock.now += 10
        stat_logger.log()
    # The second shows that throughput fell to zero.
    assert len(lines) == 2 and "generation throughput: 0.0" in lines[1]
    stat_logger.record(None, None)


def test_the_engine_logs_while_it_is_busy(lines: list[str]) -> None:
    engine = make_engine(num_blocks=40)
    assert engine.stat_logger is not None
    engine.stat_logger.interval_seconds = 0.02
    run(engine, 2)
    assert len(lines) >= 2
    assert all("Running: " in line and "KV cache usage: " in line for line in lines)
    assert any("Running: 2 reqs" in line for line in lines)


def test_an_abort_leaves_no_events_behind() -> None:
    scheduler = create_scheduler(num_blocks=6, block_size=4, log_stats=True, max_model_len=64)
    request = make_request("a", range(5), block_size=4)
    scheduler.add_request(request)
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert step(scheduler) == {}
