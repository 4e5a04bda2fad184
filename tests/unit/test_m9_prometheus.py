"""/metrics: names as vLLM's, numbers as the engine's, and a dashboard that asks only for what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from folovllm import LLM, SamplingParams
from folovllm.metrics.loggers import LoggingStatLogger
from folovllm.metrics.prometheus import PREFIX, PrometheusStatLogger, build_1_2_5_buckets
from folovllm.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    PrefixCacheStats,
    SchedulerStats,
)
from folovllm.request import FinishReason
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "examples" / "grafana" / "folovllm.json"
PROMISED = {
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "request_success": "counter",
}
"""What docs/serving.md says there is; all of them are vLLM's names."""


def families(metrics: PrometheusStatLogger) -> dict[str, Metric]:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {family.name.removeprefix(PREFIX): family for family in text_string_to_metric_families(body.decode())}


def samples(metrics: PrometheusStatLogger, **labels: str) -> dict[str, float]:
    """Every sample that has these labels, by name without the prefix; buckets as name{le}."""
    found = {}
    for family in families(metrics).values():
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                le = f"{{{sample.labels['le']}}}" if "le" in sample.labels else ""
                found[sample.name.removeprefix(PREFIX) + le] = sample.value
    return found


def finished(reason: FinishReason = FinishReason.LENGTH, **fields: Any) -> FinishedRequestStats:
    values: dict[str, Any] = {
        "e2e_latency": 2.0,
        "num_prompt_tokens": 7,
        "num_generation_tokens": 3,
        "queued_time": 0.5,
    }
    return FinishedRequestStats(finish_reason=reason, **(values | fields))


def test_all_names_are_there_from_the_start() -> None:
    found = families(PrometheusStatLogger("m"))
    assert {name: found[name].type for name in PROMISED} == PROMISED
    reasons = {sample.labels["finished_reason"] for sample in found["request_success"].samples}
    assert reasons == {str(reason) for reason in FinishReason}
    assert "process_resident_memory_bytes" in found


def test_every_sample_names_the_model() -> None:
    for name, family in families(PrometheusStatLogger("a/b")).items():
        for sample in family.samples:
            assert name.startswith("process_") or sample.labels["model_name"] == "a/b"


def test_the_state_is_the_last_steps() -> None:
    metrics = PrometheusStatLogger("m")
    metrics.record(SchedulerStats(3, 4, 0.75), None)
    metrics.record(SchedulerStats(1, 2, 0.25), None)
    found = samples(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (1, 2, 0.25)


def test_counts_add_up() -> None:
    metrics = PrometheusStatLogger("m")
    for _ in range(2):
        cache = PrefixCacheStats(requests=1, queries=10, hits=4)
        metrics.record(
            SchedulerStats(prefix_cache_stats=cache, num_preempted_reqs=3),
            IterationStats(num_prompt_tokens=5, num_cached_tokens=4, num_generation_tokens=2),
        )
    found = samples(metrics)
    assert found["prefix_cache_queries_total"] == 20 and found["prefix_cache_hits_total"] == 8
    assert found["num_preemptions_total"] == 6
    assert found["prompt_tokens_total"] == 10 and found["prompt_tokens_cached_total"] == 8
    assert found["generation_tokens_total"] == 4
    assert found["iteration_tokens_total_count"] == 2 and found["iteration_tokens_total_sum"] == 14


def test_times() -> None:
    metrics = PrometheusStatLogger("m")
    stats = IterationStats(time_to_first_tokens_iter=[0.03, -0.001], inter_token_latencies_iter=[0.002, 0.012, 0.3])
    stats.finished_requests = [finished(decode_time=1.0, mean_time_per_output_token=0.5)]
    metrics.record(None, stats)
    found = samples(metrics)
    assert found["time_to_first_token_seconds_count"] == 2
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(0.03)
    assert found["inter_token_latency_seconds_bucket{0.0025}"] == 1
    assert found["inter_token_latency_seconds_bucket{0.025}"] == 2
    assert found["e2e_request_latency_seconds_sum"] == 2 and found["request_queue_time_seconds_sum"] == 0.5
    assert found["request_time_per_output_token_seconds_sum"] == 0.5
    assert found["request_prompt_tokens_sum"] == 7 and found["request_generation_tokens_sum"] == 3


def test_a_request_that_never_ran_has_no_times() -> None:
    metrics = PrometheusStatLogger("m")
    stats = IterationStats(finished_requests=[finished(FinishReason.ABORT, queued_time=0.0, num_generation_tokens=0)])
    metrics.record(None, stats)
    found = samples(metrics)
    assert samples(metrics, finished_reason="abort")["request_success_total"] == 1
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"):
        assert found[f"request_{name}_seconds_count"] == 0


def test_two_loggers_share_nothing() -> None:
    one, other = PrometheusStatLogger("m"), PrometheusStatLogger("m")
    one.record(None, IterationStats(num_generation_tokens=5))
    assert samples(one)["generation_tokens_total"] == 5 and samples(other)["generation_tokens_total"] == 0


def test_build_1_2_5_buckets() -> None:
    assert build_1_2_5_buckets(100) == [1, 2, 5, 10, 20, 50, 100]
    assert build_1_2_5_buckets(999) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert build_1_2_5_buckets(1) == [1]


class Relay(LoggingStatLogger):
    """Stands where LLMEngine has its logger."""

    def __init__(self, metrics: PrometheusStatLogger) -> None:
        super().__init__()
        self.metrics = metrics

    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        self.metrics.record(scheduler_stats, iteration_stats)


def test_the_engines_numbers_arrive(tmp_path: Path) -> None:
    """A real engine's steps: what /metrics says is what was asked and answered."""
    save_tiny_model(tmp_path, "llama")
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        device="cpu",
        num_gpu_blocks_override=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    metrics = PrometheusStatLogger("tiny", 256)
    llm.llm_engine.stat_logger = Relay(metrics)
    prompts = [{"prompt_token_ids": [3 + (i * 7 + j) % (VOCAB_SIZE - 4) for j in range(40)]} for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params)
    llm.generate(prompts[:1], params)
    found = samples(metrics)
    assert found["prompt_tokens_total"] == 160 and found["generation_tokens_total"] == 24
    assert samples(metrics, finished_reason="length")["request_success_total"] == 4
    assert found["prefix_cache_queries_total"] == 160 and found["prefix_cache_hits_total"] == 32
    assert found["time_to_first_token_seconds_count"] == 4 and found["inter_token_latency_seconds_count"] == 20
    assert found["request_queue_time_seconds_count"] == found["e2e_request_latency_seconds_count"] == 4
    assert found["num_requests_running"] == found["kv_cache_usage_perc"] == 0
    assert found["request_params_max_tokens_sum"] == 24


def queries(node: Any) -> list[str]:
    """Every PromQL expression of a dashboard, variables' included."""
    if isinstance(node, list):
        return [query for item in node for query in queries(item)]
    if isinstance(node, dict):
        own = [
            value for key, value in node.items() if key in ("expr", "query", "definition") and isinstance(value, str)
        ]
        return own + [query for value in node.values() for query in queries(value)]
    return []


def test_the_dashboard_asks_for_what_is_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    names = {sample.name for family in families(PrometheusStatLogger("m")).values() for sample in family.samples}
    asked = {name for query in queries(dashboard) for name in re.findall(r"folovllm:\w+|process_\w+", query)}
    assert asked <= names, asked - names
    # Each promised metric is shown somewhere.
    assert {name for name in PROMISED if not any(a.removeprefix(PREFIX).startswith(name) for a in asked)} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(query.count("(") == query.count(")") for query in queries(dashboard))
