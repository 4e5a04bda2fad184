"""Figures from records: pure functions, nothing is measured here and nothing is assumed. Torch-free.

    RequestRecord.outputs  -> throughput, TTFT, TPOT, inter-token latency
    step trace             -> batch sizes, times per step, KV cache in use and wasted, hit rate, preemptions
    MemoryRecord           -> memory

KV cache: a block is *reserved* while a request's table holds it, and has room for block_size tokens. Tokens whose keys
and values are computed are *stored*. Waste is the share of reserved room that stores nothing: the internal
fragmentation of Kwon et al. 2023, section 3. Only a request's last blocks have room left, and only full blocks are
shared, so

    stored = block_size * |blocks in any table| - sum over requests (block_size * blocks - computed tokens)
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from folovllm.benchmarks.schema import MemoryRecord, RequestRecord, RunRecord, WorkloadRecord

GIB = float(1 << 30)

DESCRIPTIONS: dict[str, tuple[str, str, bool]] = {
    "duration_s": ("s", "first arrival to last output", False),
    "output_tok_s": ("tokens/s", "output tokens / duration", True),
    "total_tok_s": ("tokens/s", "prompt and output tokens / duration", True),
    "requests_s": ("1/s", "requests / duration", True),
    "ttft_p50_ms": ("ms", "time to first token: arrival to first output, median", False),
    "ttft_p99_ms": ("ms", "time to first token, 99th percentile", False),
    "tpot_p50_ms": ("ms", "time per output token after the first, of a request; median of requests", False),
    "itl_p50_ms": ("ms", "inter-token latency: between two outputs of a request, median", False),
    "itl_p99_ms": ("ms", "inter-token latency, 99th percentile", False),
    "e2e_p50_ms": ("ms", "arrival to last output, median", False),
    "num_steps": ("", "engine steps that computed tokens", False),
    "mean_batch": ("requests", "requests in a step, mean", True),
    "peak_batch": ("requests", "most requests that held KV blocks at once", True),
    "step_ms": ("ms", "a step's start to the next one's, mean", False),
    "host_ms": ("ms", "CPU time of a step, mean: scheduling, inputs, results; on CUDA launching, too", False),
    "device_ms": ("ms", "model and sampling in a step, mean; on CUDA with the gaps between kernels", False),
    "kv_use": ("", "reserved blocks / blocks of the pool, mean over time", True),
    "kv_use_peak": ("", "reserved blocks / blocks of the pool, at most", True),
    "kv_waste": ("", "reserved room without a token / reserved room, mean over time", False),
    "hit_rate": ("", "prompt tokens found in the prefix cache / prompt tokens", True),
    "num_preemptions": ("", "times that a request lost its blocks", False),
    "roofline": ("", "least seconds for this work on this device / duration", True),
    "peak_host_gib": ("GiB", "most resident memory of the process", False),
    "peak_device_gib": ("GiB", "most memory that torch held on the GPU", False),
    "weights_gib": ("GiB", "parameters and buffers", False),
    "kv_cache_gib": ("GiB", "KV cache as allocated", False),
    "startup_s": ("s", "start of the process to a ready engine", False),
    "perplexity": ("", "exp of the mean negative log probability of a text's tokens", False),
}
"""Metric -> (unit, meaning, whether more is better). A prefix as in "stream.itl_p99_ms" names a group of requests."""


@dataclass(frozen=True)
class KVState:
    """The KV cache while one step ran, in tokens."""

    time: float
    """Seconds on the requests' clock, when the step was scheduled."""
    seconds: float
    """Until the next step, or to this one's end if it is the last."""
    reserved: int
    """Room in blocks that requests hold."""
    stored: int
    """Tokens in them."""
    pool: int
    """Room in all blocks."""
    holders: int
    """Requests that hold blocks."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the `percent`-th percentile of at least one value, interpolated between neighbours as numpy does."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ttfts(requests: Iterable[RequestRecord]) -> list[float]:
    """Return seconds from arrival to first output, per request that has one."""
    return [request.outputs[0][0] - request.arrival for request in requests if request.outputs]


def inter_token_latencies(requests: Iterable[RequestRecord]) -> list[float]:
    """Return the seconds between outputs, of all requests together."""
    return [later[0] - earlier[0] for request in requests for earlier, later in itertools.pairwise(request.outputs)]


def times_per_output_token(requests: Iterable[RequestRecord]) -> list[float]:
    """Return (last output - first output) / tokens after the first output, per request that has such tokens."""
    found = []
    for request in requests:
        after_first = sum(count for _, count in request.outputs[1:])
        if after_first:
            found.append((request.outputs[-1][0] - request.outputs[0][0]) / after_first)
    return found


def latency_figures(requests: Sequence[RequestRecord], prefix: str = "") -> dict[str, float]:
    """Return TTFT, TPOT, ITL and end-to-end latency, in ms; those without a sample are left out."""
    figures: dict[str, float] = {}
    first, between = ttfts(requests), inter_token_latencies(requests)
    per_token = times_per_output_token(requests)
    whole = [request.outputs[-1][0] - request.arrival for request in requests if request.outputs]
    for name, values, percents in (
        ("ttft", first, (50, 99)),
        ("tpot", per_token, (50,)),
        ("itl", between, (50, 99)),
        ("e2e", whole, (50,)),
    ):
        for percent in percents if values else ():
            figures[f"{prefix}{name}_p{percent}_ms"] = percentile(values, percent) * 1e3
    return figures


def throughput_figures(requests: Sequence[RequestRecord]) -> dict[str, float]:
    """Return duration and rates."""
    start = min(request.arrival for request in requests)
    seconds = max(request.outputs[-1][0] for request in requests if request.outputs) - start
    output = sum(count for request in requests for _, count in request.outputs)
    total = output + sum(request.num_prompt_tokens for request in requests)
    return {
        "duration_s": seconds,
        "output_tok_s": output / seconds,
        "total_tok_s": total / seconds,
        "requests_s": len(requests) / seconds,
    }


def computing_steps(record: WorkloadRecord) -> list[dict[str, Any]]:
    """Return the steps that computed tokens."""
    return [step for step in record.steps if step["num_tokens"]]


def step_seconds(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Return the seconds from each step's start to the next one's; of the last one, its own parts."""
    seconds = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(steps)]
    last = steps[-1]["ms"]
    return [*seconds, (last["schedule"] + last["execute"] + last["update"]) * 1e-3]


def kv_states(record: WorkloadRecord) -> list[KVState]:
    """Replay who held which blocks, and return the state during each step that computed tokens."""
    steps = computing_steps(record)
    if not steps:
        return []
    block_size: int = record.trace_config["block_size"]
    pool = (record.trace_config["num_blocks"] - 1) * block_size  # block 0 is the null block
    holders = _Holders()
    states = []
    for step, seconds in zip(steps, step_seconds(steps), strict=True):
        holders.apply(step)
        reserved = block_size * len(holders.counts)
        unfilled = sum(block_size * len(table) - holders.computed[i] for i, table in holders.tables.items())
        moment = step["time"] - record.clock_offset
        states.append(KVState(moment, seconds, reserved, reserved - unfilled, pool, len(holders.tables)))
        holders.drop(step["finished"])
    return states


class _Holders:
    """Block tables, replayed from the steps' requests as docs/step_trace.md says."""

    def __init__(self) -> None:
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.counts: Counter[int] = Counter()

    def apply(self, step: dict[str, Any]) -> None:
        """Take in the allocations of a step."""
        self.drop(step["aborted"])
        self.drop(step["preempted"])
        for request in step["requests"]:
            request_id, blocks = request["id"], request.get("blocks", [])
            if request.get("state", "running") != "running":
                self.drop([request_id])
                self.tables[request_id] = []
            elif request_id not in self.tables:
                continue  # asynchronous scheduling: it ended in the step before
            self.tables[request_id] += blocks
            self.counts.update(blocks)
            self.computed[request_id] = request["end"]

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget the tables of requests."""
        for request_id in request_ids:
            for block in self.tables.pop(request_id, ()):
                self.counts[block] -= 1
                if not self.counts[block]:
                    del self.counts[block]


def kv_figures(states: Sequence[KVState]) -> dict[str, float]:
    """Return use and waste of the KV cache, means over time, and the largest batch."""
    seconds = sum(state.seconds for state in states)
    reserved = sum(state.reserved * state.seconds for state in states)
    stored = sum(state.stored * state.seconds for state in states)
    return {
        "peak_batch": max(state.holders for state in states),
        "kv_use": reserved / (states[0].pool * seconds),
        "kv_use_peak": max(state.reserved / state.pool for state in states),
        "kv_waste": 1 - stored / reserved,
    }


HOST_PARTS = ("schedule", "update", "prepare")
"""Parts of a step that are the engine's own work on the host, on every device."""
DEVICE_PARTS = ("forward", "sample")
"""On a CPU: the model's work. On CUDA: launching it, which is the host's."""


def step_figures(record: WorkloadRecord) -> dict[str, float]:
    """Return counts and times of the steps; device_ms is left out where nobody measured it."""
    steps = computing_steps(record)
    if not steps:
        return {}
    on_cuda = bool(record.device_ms)
    host_parts = HOST_PARTS + DEVICE_PARTS if on_cuda else HOST_PARTS

    def mean(times: str, parts: tuple[str, ...]) -> float:
        total: float = sum(step[times].get(part, 0.0) for step in steps for part in parts)
        return total / len(steps)

    figures = {
        "num_steps": float(len(steps)),
        "mean_batch": sum(len(step["requests"]) for step in steps) / len(steps),
        "step_ms": sum(step_seconds(steps)) / len(steps) * 1e3,
        "host_ms": mean("cpu_ms", host_parts),
        "num_preemptions": float(sum(len(step["preempted"]) for step in record.steps)),
    }
    if on_cuda:
        figures["device_ms"] = sum(record.device_ms) / len(steps)
    elif all(part in steps[0]["ms"] for part in DEVICE_PARTS):
        figures["device_ms"] = mean("ms", DEVICE_PARTS)
    prompts = {request.id: request.num_prompt_tokens for request in record.requests}
    hits = sum(
        request["start"] for step in steps for request in step["requests"] if request.get("state") == "new"
    )  # a request's first step starts behind what the prefix cache held
    return figures | {"hit_rate": hits / sum(prompts.values())}


def workload_figures(record: WorkloadRecord, least_seconds: float | None = None) -> dict[str, float]:
    """Return all figures of one workload.

    Args:
        record: what happened.
        least_seconds: what the work takes at best (machine.least_seconds), for the share of the roofline.
    """
    figures = throughput_figures(record.requests) | latency_figures(record.requests)
    groups = sorted({request.group for request in record.requests})
    for group in groups if len(groups) > 1 else ():
        members = [request for request in record.requests if request.group == group]
        figures |= latency_figures(members, f"{group}.")
        prompt_tokens = sum(request.num_prompt_tokens for request in members)
        figures[f"{group}.hit_rate"] = sum(request.num_cached_tokens for request in members) / prompt_tokens
    figures |= step_figures(record)
    if record.steps:
        figures |= kv_figures(kv_states(record))
    if least_seconds is not None:
        figures["roofline"] = least_seconds / figures["duration_s"]
    return figures


def process_figures(record: RunRecord) -> dict[str, float]:
    """Return the figures of a whole process."""
    memory: MemoryRecord = record.memory
    figures = {"startup_s": record.startup_s} if record.startup_s else {}
    for name, num_bytes in (
        ("peak_host_gib", memory.peak_rss),
        ("peak_device_gib", memory.peak_device),
        ("weights_gib", memory.weights),
        ("kv_cache_gib", memory.kv_cache),
    ):
        if num_bytes:
            figures[name] = num_bytes / GIB
    if record.perplexity is not None:
        figures["perplexity"] = math.exp(record.perplexity.nats_per_token)
    return figures


def run_figures(
    record: RunRecord, least_seconds: Callable[[WorkloadRecord], float | None] = lambda _: None
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return ({workload: {metric: value}}, {metric of the process: value}) of one run."""
    by_workload = {workload.name: workload_figures(workload, least_seconds(workload)) for workload in record.workloads}
    return by_workload, process_figures(record)
