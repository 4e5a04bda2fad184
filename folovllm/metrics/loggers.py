"""The periodic line about how the engine is doing (vLLM: `v1/metrics/loggers.py`)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from folovllm.metrics.stats import CachingMetrics, IterationStats, SchedulerStats
from folovllm.utils.common import init_logger

LOG_INTERVAL_SECONDS = 10.0
"""Time between two lines while the engine is busy (vLLM: VLLM_LOG_STATS_INTERVAL)."""

logger = init_logger(__name__)


class StatLoggerBase(ABC):
    """Takes in the statistics of every step, and tells them on in its own way."""

    @abstractmethod
    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        """Take in one step; either may be missing."""

    @abstractmethod
    def log(self) -> None:
        """Tell what was recorded since the last call."""


class LoggingStatLogger(StatLoggerBase):
    """Writes one line to the log: throughput since the last line, and the state of now.

    Simplified (vLLM: engine_index): there is one engine.
    """

    def __init__(self, interval_seconds: float = LOG_INTERVAL_SECONDS) -> None:
        """`interval_seconds`: how often log_if_due writes."""
        self.interval_seconds = interval_seconds
        self.prefix_caching_metrics = CachingMetrics()
        self.last_scheduler_stats = SchedulerStats()
        self.last_prompt_throughput = 0.0
        """Tokens of prompts whose first output came, per second, in the last line; cached ones included."""
        self.last_generation_throughput = 0.0
        """Output tokens per second, in the last line."""
        self._idle = True
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        self.last_log_time = now
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_preemptions = 0

    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        """See StatLoggerBase."""
        if self._idle and time.monotonic() - self.last_log_time >= self.interval_seconds:
            # The engine had nothing to do for a while: the pause is no part of its throughput.
            self._reset(time.monotonic())
        if iteration_stats is not None:
            self.num_prompt_tokens += iteration_stats.num_prompt_tokens
            self.num_generation_tokens += iteration_stats.num_generation_tokens
        if scheduler_stats is not None:
            self.prefix_caching_metrics.observe(scheduler_stats.prefix_cache_stats)
            self.num_preemptions += scheduler_stats.num_preempted_reqs
            self.last_scheduler_stats = scheduler_stats
            self._idle = scheduler_stats.num_running_reqs == scheduler_stats.num_waiting_reqs == 0

    def log_if_due(self) -> None:
        """Write the line if the last one is `interval_seconds` old; to be called after every step."""
        if time.monotonic() - self.last_log_time >= self.interval_seconds:
            self.log()

    def log(self) -> None:
        """Write the line; at level DEBUG where nothing happened since the last one, nor before that."""
        now = time.monotonic()
        elapsed = now - self.last_log_time
        prompt_throughput = self.num_prompt_tokens / elapsed if elapsed > 0 else 0.0
        generation_throughput = self.num_generation_tokens / elapsed if elapsed > 0 else 0.0
        throughputs = (
            prompt_throughput,
            generation_throughput,
            self.last_prompt_throughput,
            self.last_generation_throughput,
        )
        log = logger.info if any(throughputs) else logger.debug
        stats = self.last_scheduler_stats
        log(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, Preemptions: %d, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            prompt_throughput,
            generation_throughput,
            stats.num_running_reqs,
            stats.num_waiting_reqs,
            self.num_preemptions,
            stats.kv_cache_usage * 100,
            self.prefix_caching_metrics.hit_rate * 100,
        )
        self._reset(now)
        self.last_prompt_throughput = prompt_throughput
        self.last_generation_throughput = generation_throughput
