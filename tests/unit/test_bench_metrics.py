"""Figures from records: by hand for small ones, and every figure moves when the event behind it does."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

from folovllm.benchmarks import metrics
from folovllm.benchmarks.machine import least_seconds
from folovllm.benchmarks.metrics import kv_states, percentile, process_figures, run_figures, workload_figures
from folovllm.benchmarks.schema import (
    Machine,
    MemoryRecord,
    PerplexityRecord,
    RequestRecord,
    RunRecord,
    WorkloadRecord,
)


def step(number: int, time: float, requests: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A line of a step trace, 10 ms long: 1 scheduling, 7 executing (2 preparing, 4 + 1 on the device), 2 updating."""
    parts = {"schedule": 1.0, "execute": 7.0, "update": 2.0, "prepare": 2.0, "forward": 4.0, "sample": 1.0}
    line = {
        "step": number,
        "time": time,
        "ms": dict(parts),
        "cpu_ms": {name: value / 2 for name, value in parts.items()},
        "num_tokens": sum(request["end"] - request["start"] for request in requests),
        "requests": requests,
        "aborted": [],
        "preempted": [],
        "finished": {},
        "events": [],
    }
    return line | fields


def record() -> WorkloadRecord:
    """Two requests, blocks of 4 tokens, 9 of them (one is the null block): b hits a's first block."""
    requests = [
        RequestRecord("a", "first", 10.0, 6, 0, [(10.10, 1), (10.12, 1), (10.15, 1)], "length"),
        RequestRecord("b", "second", 10.0, 6, 4, [(10.12, 1), (10.15, 2)], "length"),
    ]
    steps = [
        step(0, 110.00, [{"id": "a", "start": 0, "end": 6, "kind": "prefill", "state": "new", "blocks": [1, 2]}]),
        step(
            1,
            110.10,
            [
                {"id": "a", "start": 6, "end": 7, "kind": "decode"},
                {"id": "b", "start": 4, "end": 6, "kind": "prefill", "state": "new", "blocks": [1, 3]},
            ],
        ),
        step(
            2,
            110.12,
            [
                {"id": "a", "start": 7, "end": 9, "kind": "decode", "blocks": [4]},
                {"id": "b", "start": 6, "end": 8, "kind": "decode"},
            ],
            finished={"a": "length", "b": "length"},
        ),
        step(3, 110.13, []),
    ]
    return WorkloadRecord("w", requests, steps, {"block_size": 4, "num_blocks": 9}, clock_offset=100.0)


def test_figures_by_hand() -> None:
    figures = workload_figures(record(), least_seconds=0.03)
    expected = {
        "duration_s": 0.15,
        "output_tok_s": 6 / 0.15,
        "total_tok_s": 18 / 0.15,
        "requests_s": 2 / 0.15,
        "ttft_p50_ms": 110.0,
        "tpot_p50_ms": (25.0 + 15.0) / 2,
        "itl_p50_ms": 30.0,
        "e2e_p50_ms": 150.0,
        "first.ttft_p50_ms": 100.0,
        "second.ttft_p50_ms": 120.0,
        "second.hit_rate": 4 / 6,
        "num_steps": 3,
        "mean_batch": 5 / 3,
        # The last step lasts as long as its parts: 10 ms.
        "step_ms": (100 + 20 + 10) / 3,
        "host_ms": (1 + 2 + 2) / 2,
        "device_ms": 5.0,
        "num_preemptions": 0,
        "hit_rate": 4 / 12,
        "peak_batch": 2,
        "roofline": 0.2,
    }
    for metric, value in expected.items():
        assert figures[metric] == pytest.approx(value), metric


def test_kv_cache_by_hand() -> None:
    states = kv_states(record())
    # Blocks {1, 2}; {1, 2, 3}: block 1 is shared and counts once; {1, 2, 3, 4}.
    assert [state.reserved for state in states] == [8, 12, 16]
    # a holds 6 of 8; then 7 and b's own 2; then 9 of 12 and b's own 4.
    assert [state.stored for state in states] == [6, 9, 13]
    assert [state.pool for state in states] == [32] * 3
    assert [state.time for state in states] == pytest.approx([10.0, 10.1, 10.12])
    figures = workload_figures(record())
    reserved, stored = 8 * 0.1 + 12 * 0.02 + 16 * 0.01, 6 * 0.1 + 9 * 0.02 + 13 * 0.01
    assert figures["kv_use"] == pytest.approx(reserved / (32 * 0.13))
    assert figures["kv_use_peak"] == pytest.approx(0.5)
    assert figures["kv_waste"] == pytest.approx(1 - stored / reserved)


def test_preempted_and_aborted_requests_hold_nothing() -> None:
    lines = record()
    lines.steps[2]["preempted"] = ["b"]
    lines.steps[2]["requests"].pop()
    assert [state.reserved for state in kv_states(lines)] == [8, 12, 12]  # block 3 is free
    assert workload_figures(lines)["num_preemptions"] == 1
    lines = record()
    lines.steps[1]["aborted"] = ["a"]
    lines.steps[1]["requests"].pop(0)
    states = kv_states(lines)
    assert [state.holders for state in states] == [1, 1, 1]
    # In the last step a, which asynchronous scheduling had still in flight, is not there any more.
    assert [state.reserved for state in states] == [8, 8, 8]


def test_a_resumed_request_gets_a_new_table() -> None:
    lines = record()
    lines.steps[2]["requests"][1] |= {"state": "resumed", "start": 0, "blocks": [5, 6]}
    assert kv_states(lines)[2].reserved == 4 * len({1, 2, 4, 5, 6})


def put(target: Any, *path: Any) -> None:
    """Set what the path (fields and indices, then the value) leads to."""
    *way, last, value = path
    for part in way:
        target = getattr(target, part) if isinstance(part, str) and hasattr(target, part) else target[part]
    if isinstance(last, str) and hasattr(target, last):
        setattr(target, last, value)
    else:
        target[last] = value


FALSIFIED: list[tuple[tuple[Any, ...], set[str]]] = [
    (("requests", 0, "outputs", 0, (10.05, 1)), {"first.ttft_p50_ms", "ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms"}),
    (("requests", 1, "outputs", 1, (10.20, 2)), {"duration_s", "output_tok_s", "e2e_p50_ms", "itl_p99_ms"}),
    (("requests", 1, "outputs", 1, (10.15, 5)), {"output_tok_s", "total_tok_s", "tpot_p50_ms"}),
    (("requests", 0, "arrival", 9.9), {"duration_s", "ttft_p50_ms", "output_tok_s", "requests_s"}),
    (("requests", 0, "num_prompt_tokens", 60), {"total_tok_s", "hit_rate"}),
    (("requests", 1, "num_cached_tokens", 0), {"second.hit_rate"}),
    (("steps", 1, "requests", 1, "start", 0), {"hit_rate"}),
    (("steps", 1, "requests", 1, "blocks", [5, 3]), {"kv_use", "kv_use_peak"}),
    (("steps", 2, "requests", 0, "end", 12), {"kv_waste"}),
    (("steps", 1, "time", 110.05), {"kv_use", "kv_waste"}),
    (("steps", 1, "cpu_ms", "prepare", 9.0), {"host_ms"}),
    (("steps", 1, "ms", "forward", 9.0), {"device_ms"}),
    (("steps", 2, "ms", "execute", 9.0), {"step_ms"}),
    (("steps", 2, "preempted", ["b"]), {"num_preemptions"}),
    (("trace_config", "num_blocks", 17), {"kv_use", "kv_use_peak"}),
    (("trace_config", "block_size", 8), {"kv_waste"}),
]


@pytest.mark.parametrize(("path", "moving"), FALSIFIED, ids=[".".join(map(str, p)) for p, _ in FALSIFIED])
def test_a_false_event_moves_its_figures(path: tuple[Any, ...], moving: set[str]) -> None:
    true, false = record(), record()
    put(false, *path)
    before, after = workload_figures(true), workload_figures(false)
    moved = {metric for metric in before if before[metric] != after[metric]}
    assert moving <= moved


def test_every_figure_has_a_description() -> None:
    workloads, process = run_figures(run(), lambda _: 0.01)
    names = {name.rpartition(".")[2] for figures in workloads.values() for name in figures} | set(process)
    assert names <= set(metrics.DESCRIPTIONS)
    assert set(metrics.DESCRIPTIONS) <= names


def run() -> RunRecord:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return RunRecord(
        rung="m3",
        round=0,
        engine="folovllm",
        engine_args={},
        env={},
        memory=MemoryRecord(3 << 30, 1 << 29, 1 << 28, 1 << 30),
        workloads=[record()],
        startup_s=1.5,
        perplexity=PerplexityRecord(math.log(20.0), 100, 50, 25, "text"),
        model=sizes | {"vocab_size": 100, "tie_word_embeddings": True},
    )


def test_process_figures_by_hand() -> None:
    assert process_figures(run()) == pytest.approx(
        {
            "startup_s": 1.5,
            "peak_host_gib": 3.0,
            "peak_device_gib": 1.0,
            "weights_gib": 0.5,
            "kv_cache_gib": 0.25,
            "perplexity": 20.0,
        }
    )


def test_an_engine_without_trace_has_latencies_only() -> None:
    lines = record()
    lines.steps = []
    figures = workload_figures(lines)
    assert figures["ttft_p50_ms"] == pytest.approx(110.0)
    assert not {"kv_use", "host_ms", "num_steps", "hit_rate"} & set(figures)


def test_device_time_on_cuda_is_the_recorded_one() -> None:
    lines = record()
    lines.device_ms = [3.0, 4.0, 8.0]
    figures = workload_figures(lines)
    assert figures["device_ms"] == pytest.approx(5.0)
    assert figures["host_ms"] == pytest.approx((1 + 2 + 2 + 4 + 1) / 2)  # launching is the host's work there


def machine(bytes_per_s: float, flops_per_s: float) -> Machine:
    return Machine("cpu", "", 2, 0, bytes_per_s, flops_per_s, "bfloat16", "", {})


def test_least_seconds_by_hand() -> None:
    lines = record()
    lines.requests.pop()
    memory = 1e9 * least(lines, machine(1e9, 1e30))
    # Three steps read the weights; three tokens read 6, 7 and 8 earlier ones and themselves.
    kv_bytes = (1 << 28) / (9 * 4)
    assert memory == pytest.approx(3 * (1 << 29) + kv_bytes * (7 + 8 + 9), rel=1e-9)
    flops = 1e9 * least(lines, machine(1e30, 1e9))
    params = 2 * (8 * 4 * (2 * 2 + 2 * 2) + 3 * 8 * 16)
    assert flops == pytest.approx(2 * params * 6 + 4 * 2 * 2 * 4 * (6 * 6 / 2), rel=1e-6)


def least(lines: WorkloadRecord, where: Machine) -> float:
    seconds = least_seconds(run(), lines, where)
    assert seconds is not None
    return seconds


def test_least_seconds_leaves_out_what_was_cached_and_a_table_of_its_own() -> None:
    lines = record()
    lines.requests.pop(0)
    with_cache = least(lines, machine(1e30, 1e9))
    lines.requests[0].num_cached_tokens = 0
    assert least(lines, machine(1e30, 1e9)) > 2 * with_cache
    untied = run()
    untied.model["tie_word_embeddings"] = False
    assert least_seconds(untied, lines, machine(1e9, 1e30)) == pytest.approx(
        least(lines, machine(1e9, 1e30)) - 3e-9 * 2 * 100 * 8, rel=1e-9
    )


def test_no_roofline_without_speeds() -> None:
    assert least_seconds(run(), record(), machine(0, 0)) is None


def test_percentile() -> None:
    assert [percentile([5.0], p) for p in (0, 50, 99)] == [5.0] * 3
    values = [float(i) for i in range(101)]
    random.Random(0).shuffle(values)
    assert [percentile(values, p) for p in (0, 1, 50, 99, 100)] == [0, 1, 50, 99, 100]
    assert percentile([1.0, 2.0], 25) == 1.25


def test_records_are_not_changed() -> None:
    lines = record()
    before = copy.deepcopy(lines)
    workload_figures(lines)
    assert lines == before
