"""The records of a benchmark, and the one JSON file that every `folovllm bench` command writes. Torch-free.

Two levels. Records hold what happened and when, nothing else: RunRecord is the file of raw events of one run. A
BenchmarkResult holds figures, each of which metrics.py derives from records. `json_schema()` describes the latter; it
is generated from the classes, so it cannot drift from them.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec

SCHEMA = "folovllm.benchmark"
"""`schema` of every result."""
VERSION = 1
"""`version` of every result: raised when a field changes its meaning or goes away, not when one is added."""


class RequestRecord(msgspec.Struct):
    """What one request saw. Times are seconds of the process's monotonic clock."""

    id: str
    """Its id, in the step trace as well."""
    group: str
    """See BenchRequest."""
    arrival: float
    """Handed to the engine."""
    num_prompt_tokens: int
    """Length of the prompt."""
    num_cached_tokens: int = 0
    """Prompt tokens that the engine says it took from its prefix cache."""
    outputs: list[tuple[float, int]] = []
    """(time, new tokens) of each output that reached the caller."""
    finish_reason: str | None = None
    """"length" for a request that ran to its end."""


class WorkloadRecord(msgspec.Struct):
    """What happened while one workload ran."""

    name: str
    """The workload's."""
    requests: list[RequestRecord]
    """In order of arrival."""
    steps: list[dict[str, Any]] = []
    """Lines of the step trace (docs/step_trace.md); empty for engines without one."""
    trace_config: dict[str, Any] = {}
    """`config` of the trace's header: block size, number of blocks, ..."""
    clock_offset: float = 0.0
    """Unix time minus monotonic time: a step's `time` less this is on the requests' clock."""
    device_ms: list[float] = []
    """CUDA: milliseconds from a step's first work on the device to its last, one per entry of `steps`."""


class MemoryRecord(msgspec.Struct):
    """Memory of the process, in bytes."""

    peak_rss: int = 0
    """Most resident memory of the host so far."""
    weights: int = 0
    """Parameters and buffers."""
    kv_cache: int = 0
    """KV cache as allocated; on a CPU pages that were never written take no memory."""
    peak_device: int = 0
    """CUDA: most memory that torch held; 0 on CPUs."""


class PerplexityRecord(msgspec.Struct):
    """What `folovllm eval perplexity` would say, and over what."""

    nats_per_token: float
    num_scored_tokens: int
    window: int
    stride: int
    text: str
    """Name of the file."""


class RunRecord(msgspec.Struct):
    """One engine, started once: all that was written down."""

    rung: str
    round: int
    engine: str
    """"folovllm" or a peer's name and version."""
    engine_args: dict[str, Any]
    env: dict[str, str]
    memory: MemoryRecord
    workloads: list[WorkloadRecord]
    startup_report: str = ""
    startup_s: float = 0.0
    """Seconds from the process's first line to an engine that is ready."""
    perplexity: PerplexityRecord | None = None
    model: dict[str, Any] = {}
    """The model's config."""


class Machine(msgspec.Struct):
    """Where it was measured."""

    device: str
    """"cpu" or "cuda"."""
    device_name: str
    cores: int
    """CPU cores that the process may use."""
    host_memory: int
    """Bytes; 0 if unknown."""
    bytes_per_s: float
    """Copying large buffers on the device, bytes read and written; 0 if it was not measured."""
    flops_per_s: float
    """Multiplying large matrices of `dtype` on the device; 0 if it was not measured."""
    dtype: str
    platform: str
    versions: dict[str, str]
    """Package -> version."""


class Figure(msgspec.Struct):
    """One number, over the rounds."""

    median: float
    min: float
    max: float
    values: list[float]
    """One per round."""


class Entry(msgspec.Struct):
    """One thing that was measured: a rung, a peer, or the only configuration of a command."""

    name: str
    """"m1", "transformers", "throughput", ..."""
    title: str
    """For a table."""
    idea: str = ""
    """What it adds to the one before, in a sentence."""
    engine: str = "folovllm"
    engine_args: dict[str, Any] = {}
    env: dict[str, str] = {}
    workloads: dict[str, dict[str, Figure]] = {}
    """Workload -> metric -> figure; metrics.DESCRIPTIONS explains them."""
    process: dict[str, Figure] = {}
    """Figures of the whole process: memory, start-up, perplexity."""
    notes: list[str] = []


class BenchmarkResult(msgspec.Struct):
    """What every `folovllm bench` command writes."""

    kind: str
    """"ladder", "throughput", "latency" or "serve"."""
    time: float
    """Unix seconds."""
    command: list[str]
    """The command line."""
    machine: Machine | None
    """None where the engine runs elsewhere (serve)."""
    settings: dict[str, Any]
    """Model, workload sizes, rounds."""
    entries: list[Entry]
    skipped: dict[str, str] = {}
    """Name of what was not measured -> why."""
    interrupted: bool = False
    """Whether it was stopped before its end: entries may have fewer rounds, or be missing."""
    schema: str = SCHEMA
    version: int = VERSION


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of BenchmarkResult."""
    return msgspec.json.schema(BenchmarkResult)


def write_result(path: str | Path, result: BenchmarkResult) -> None:
    """Write the file, indented; a reader sees the old one or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    temporary.replace(path)


def read_result(path: str | Path) -> BenchmarkResult:
    """Return the content of a file that a `folovllm bench` command wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        result = msgspec.json.decode(Path(path).read_bytes(), type=BenchmarkResult)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no result of `folovllm bench`: {error}") from error
    if result.schema != SCHEMA or result.version != VERSION:
        raise ValueError(f"{path}: schema {result.schema!r}, version {result.version}; this reads {SCHEMA} {VERSION}.")
    return result


def write_record(path: str | Path, record: RunRecord) -> None:
    """Write the raw events of a run, as gzip where the name ends in .gz."""
    data = msgspec.json.encode(record)
    Path(path).write_bytes(gzip.compress(data, 6) if str(path).endswith(".gz") else data)


def read_record(path: str | Path) -> RunRecord:
    """Return what write_record wrote."""
    data = Path(path).read_bytes()
    return msgspec.json.decode(gzip.decompress(data) if str(path).endswith(".gz") else data, type=RunRecord)
