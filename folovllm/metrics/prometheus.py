"""What `/metrics` shows (vLLM: `PrometheusStatLogger` in `v1/metrics/loggers.py`).

The names are vLLM's with the prefix `folovllm:`, so that a dashboard made for vLLM needs one replacement. The one
idea: the statistics of each step, which the engine makes anyway, are added to counters and histograms when they come;
a scrape only writes those out, and asks nothing of the engine.

Every logger has its own registry: two servers in one process, or two tests, do not add to each other's numbers.
Needs prometheus-client (`pip install "folovllm[server]"`).
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from folovllm.metrics.loggers import StatLoggerBase
from folovllm.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats
from folovllm.request import FinishReason

# Without it every counter and histogram has one more series, the time of its creation. vLLM leaves them out as well.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "folovllm:"
"""What every name of ours begins with; `process_...` are prometheus-client's, about the server's process."""
DEFAULT_MAX_TOKENS = 131_072
"""Where the histograms of request lengths end, if nothing is said about the model."""

# vLLM's buckets, in seconds, with finer ones below: a small model's token takes less than vLLM's first bucket.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Of the time to the first token."""
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Of the time of one token."""
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Of a request's time, or of a phase's."""
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Of the tokens of one step."""


def build_1_2_5_buckets(max_value: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `max_value`."""
    buckets = [digit * 10**power for power in range(len(str(max_value))) for digit in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= max_value]


class PrometheusStatLogger(StatLoggerBase):
    """Adds up the statistics of every step, and writes them out in Prometheus' text format."""

    def __init__(self, model_name: str, max_model_len: int = DEFAULT_MAX_TOKENS) -> None:
        """Begin with zeros.

        Args:
            model_name: value of the label `model_name`: the name that clients ask for.
            max_model_len: the longest request, in tokens; ends the histograms of lengths.
        """
        self.registry = CollectorRegistry()
        """Where the metrics are; others may be added to it."""
        self._model_name = model_name
        ProcessCollector(registry=self.registry)
        self._make_state()
        self._make_counters()
        self._make_times()
        self._make_lengths(build_1_2_5_buckets(max_model_len))

    def _make_state(self) -> None:
        """Gauges: the engine as the last step left it."""
        self.num_requests_running = self._gauge("num_requests_running", "Requests that hold blocks and run.")
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Requests in the waiting queue.")
        self.kv_cache_usage_perc = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")

    def _make_counters(self) -> None:
        """Counters, which only grow; Prometheus adds `_total` to their names."""
        self.prefix_cache_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.num_preemptions = self._counter("num_preemptions", "Times that a running request lost its blocks.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed, cached ones included.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens from the prefix cache.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens.")
        success = Counter(
            PREFIX + "request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.request_success = {
            reason: success.labels(model_name=self._model_name, finished_reason=str(reason)) for reason in FinishReason
        }

    def _make_times(self) -> None:
        """Histograms of seconds."""
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "One output to the next, of one request.", TOKEN_BUCKETS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "First to last token, divided by the tokens after the first; of a request that ended.",
            TOKEN_BUCKETS,
        )
        self.e2e_request_latency = self._histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Queued to scheduled.", REQUEST_BUCKETS)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Scheduled to first token.", REQUEST_BUCKETS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token.", REQUEST_BUCKETS)
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "Scheduled to last token.", REQUEST_BUCKETS
        )

    def _make_lengths(self, buckets: Sequence[float]) -> None:
        """Histograms of tokens, and of `n`."""
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", buckets)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of an output.", buckets)
        self.request_max_tokens = self._histogram("request_params_max_tokens", "`max_tokens` of a request.", buckets)
        self.request_max_num_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of a request's n outputs.", buckets
        )
        self.request_params_n = self._histogram("request_params_n", "`n` of a request.", (1, 2, 5, 10, 20))
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens of one step, prompts and outputs.", STEP_TOKEN_BUCKETS
        )

    def _gauge(self, name: str, documentation: str) -> Gauge:
        metric = Gauge(PREFIX + name, documentation, ["model_name"], registry=self.registry)
        return metric.labels(model_name=self._model_name)

    def _counter(self, name: str, documentation: str) -> Counter:
        metric = Counter(PREFIX + name, documentation, ["model_name"], registry=self.registry)
        return metric.labels(model_name=self._model_name)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(PREFIX + name, documentation, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(model_name=self._model_name)

    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        """See StatLoggerBase."""
        if scheduler_stats is not None:
            self._record_scheduler(scheduler_stats)
        if iteration_stats is not None:
            self._record_iteration(iteration_stats)

    def _record_scheduler(self, stats: SchedulerStats) -> None:
        self.num_requests_running.set(stats.num_running_reqs)
        self.num_requests_waiting.set(stats.num_waiting_reqs)
        self.kv_cache_usage_perc.set(stats.kv_cache_usage)
        self.num_preemptions.inc(stats.num_preempted_reqs)
        self.prefix_cache_queries.inc(stats.prefix_cache_stats.queries)
        self.prefix_cache_hits.inc(stats.prefix_cache_stats.hits)

    def _record_iteration(self, stats: IterationStats) -> None:
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.prompt_tokens_cached.inc(stats.num_cached_tokens)
        self.generation_tokens.inc(stats.num_generation_tokens)
        num_tokens = stats.num_prompt_tokens + stats.num_generation_tokens
        if num_tokens:
            self.iteration_tokens.observe(num_tokens)
        # The clocks of two processes may differ by a little: no time is negative.
        for seconds in stats.time_to_first_tokens_iter:
            self.time_to_first_token.observe(max(seconds, 0.0))
        for seconds in stats.inter_token_latencies_iter:
            self.inter_token_latency.observe(max(seconds, 0.0))
        for length in stats.max_num_generation_tokens_iter:
            self.request_max_num_generation_tokens.observe(length)
        for n in stats.n_params_iter:
            self.request_params_n.observe(n)
        for request in stats.finished_requests:
            self._record_finished(request)

    def _record_finished(self, request: FinishedRequestStats) -> None:
        self.request_success[request.finish_reason].inc()
        self.e2e_request_latency.observe(max(request.e2e_latency, 0.0))
        phases = (
            (self.queue_time, request.queued_time),
            (self.prefill_time, request.prefill_time),
            (self.decode_time, request.decode_time),
            (self.inference_time, request.inference_time),
        )
        for histogram, seconds in phases:
            # 0: never reached. An aborted request would otherwise count as one that was very fast.
            if seconds > 0:
                histogram.observe(seconds)
        if request.num_generation_tokens > 1:
            self.time_per_output_token.observe(request.mean_time_per_output_token)
        self.request_prompt_tokens.observe(request.num_prompt_tokens)
        self.request_generation_tokens.observe(request.num_generation_tokens)
        if request.max_tokens_param is not None:
            self.request_max_tokens.observe(request.max_tokens_param)

    def log(self) -> None:
        """Do nothing: Prometheus comes and asks."""

    def render(self) -> tuple[bytes, str]:
        """Return what /metrics answers: the body in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
