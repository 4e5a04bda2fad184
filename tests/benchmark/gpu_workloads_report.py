"""What gpu_workloads.py compares with and how it shows it: vLLM's figures, targets, roofline, table row, profile."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# (model, metric) -> (vLLM 0.24.0 on an H100, target); None where there is no such figure.
REFERENCE: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("0.6B", "A: output tok/s"): (18000, 21600),
    ("0.6B", "B: output tok/s"): (17200, 22400),
    ("0.6B", "D: ms per output token"): (1.64, 1.1),
    ("0.6B", "D: first token of 2048, ms"): (20.8, 11),
    ("0.6B", "steps: ms, batch 32"): (2.05, 1.5),
    ("0.6B", "steps: ms, batch 128"): (4.49, None),
    ("0.6B", "steps: ms, batch 256"): (6.39, 3.8),
    ("0.6B", "E: cold s"): (0.135, None),
    ("0.6B", "E: warm s"): (0.113, 0.05),
    ("0.6B", "E: unshared s"): (0.40, None),
    ("0.6B", "S: cold s"): (79, 20),
    ("0.6B", "S: warm s"): (None, 10),
    ("0.6B", "profile: GPU idle %, batch 1"): (None, 15),
    ("0.6B", "profile: GPU idle %, batch 256"): (None, 5),
    ("8B", "C: output tok/s"): (7650, 8400),
    ("8B", "D: ms per output token"): (6.81, 6.0),
    ("8B", "D: first token of 2048, ms"): (54.5, 48),
    ("8B", "steps: ms, batch 32"): (7.47, None),
    ("8B", "steps: ms, batch 128"): (9.39, None),
    ("8B", "steps: ms, batch 256"): (12.7, None),
    ("8B", "S: cold s"): (84, 20),
    ("8B", "S: warm s"): (None, 10),
    ("8B", "profile: GPU idle %, batch 1"): (None, 15),
    ("8B", "profile: GPU idle %, batch 256"): (None, 5),
    # GPTQ: vLLM's Marlin for the stream, its Machete for the rest; targets: 0.55 and 0.9 of what bfloat16 makes here.
    ("8B-4bit", "C: output tok/s"): (7780, 7150),
    ("8B-4bit", "D: ms per output token"): (3.80, 3.0),
    ("8B-4bit", "D: first token of 2048, ms"): (55, 55),
}
TABLE_HEAD = f"{'metric':31} {'median (min-max)':27} | roofline  here |    vLLM faster |  target        | note"
# What a profile lists on the device beside kernels, copies and fills.
NO_WORK = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")
# Host calls that wait for the device, or may; beside them every ...Synchronize.
BLOCKING = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpy",
)


@dataclass(frozen=True)
class Ceiling:
    """What the device does at best."""

    bytes_per_s: float
    """Copying on the device, read and written bytes together."""
    flops_per_s: float
    """Multiplying square bfloat16 matrices."""

    @classmethod
    def measure(cls, device: str) -> Ceiling:
        """Time a copy of 1 GiB and a product of 8192 x 8192 matrices (on a CPU: of far smaller ones)."""
        gpu = device == "cuda"
        num_bytes, n = (1 << 30, 8192) if gpu else (1 << 24, 256)
        copy_s = _copy_seconds(num_bytes, device)
        product_s = _product_seconds(n, device)
        if gpu:
            torch.cuda.empty_cache()
        return cls(2 * num_bytes / copy_s, 2 * n**3 / product_s)


def _copy_seconds(num_bytes: int, device: str) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device == "cuda")


def _product_seconds(n: int, device: str) -> float:
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return _seconds(lambda: torch.matmul(a, b), device == "cuda")


def _seconds(call: Callable[[], object], gpu: bool, count: int = 20) -> float:
    """Return the median of 5 times `count` calls, per call."""
    runs = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(count):
            call()
        if gpu:
            torch.cuda.synchronize()
        runs.append((time.perf_counter() - start) / count)
    return statistics.median(runs[1:])


class Roofline:
    """Least seconds for a model's work on a device."""

    def __init__(self, config: dict[str, Any], ceiling: Ceiling) -> None:
        """Derive sizes from a Qwen3 config; bfloat16 cache and weights, of layers as its quantization_config says."""
        hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        attention = hidden * head * (2 * heads + 2 * kv_heads)
        self.ceiling = ceiling
        self.layer_params = layers * (attention + 3 * hidden * config["intermediate_size"])
        self.head_params = config["vocab_size"] * hidden
        # Of the embedding table a step reads a row per token, which counts as nothing; tied, it is read as LM head.
        quantization = config.get("quantization_config")
        bytes_per_param = quantization["bits"] / 8 + 2 / quantization["group_size"] if quantization else 2
        self.weight_bytes = bytes_per_param * self.layer_params + 2 * self.head_params
        self.kv_bytes_per_token = 2 * 2 * layers * kv_heads * head
        self._attention_flops = 4 * layers * heads * head

    def decode(self, num_steps: float, num_context_tokens: float) -> float:
        """Seconds to read the weights in each step, and keys and values of so many tokens in all."""
        num_bytes = num_steps * self.weight_bytes + num_context_tokens * self.kv_bytes_per_token
        return float(num_bytes / self.ceiling.bytes_per_s)

    def prefill(self, num_tokens: int, prefix: int = 0) -> float:
        """Seconds to compute the layers for a prompt of num_tokens behind `prefix` cached ones."""
        pairs = num_tokens * prefix + num_tokens * num_tokens / 2
        flops = 2 * self.layer_params * num_tokens + self._attention_flops * pairs
        return float(flops / self.ceiling.flops_per_s)

    def throughput(self, input_lens: Sequence[int], output_lens: Sequence[int]) -> float:
        """Seconds for requests that all run at once."""
        context = sum(n * i + n * (n + 1) // 2 for i, n in zip(input_lens, output_lens, strict=True))
        return self.decode(max(output_lens), context) + sum(map(self.prefill, input_lens))


@dataclass
class Row:
    """One metric; `runs` and `roofline` in the unit that its name tells."""

    metric: str
    runs: list[float]
    roofline: float | None
    vllm: float | None
    target: float | None
    note: str = ""

    @property
    def value(self) -> float:
        """The median run."""
        return statistics.median(self.runs)

    def better(self, other: float | None) -> float | None:
        """How many times better this is than `other`: above 1 is better, whichever way the metric counts."""
        if other is None or not other or not self.value:
            return None
        return self.value / other if "tok/s" in self.metric else other / self.value

    def as_json(self) -> dict[str, Any]:
        """Every field and what follows from them."""
        reached, ratio, by_target = self.better(self.roofline), self.better(self.vllm), self.better(self.target)
        derived = {"value": self.value, "of_roofline": reached, "vs_vllm": ratio}
        return asdict(self) | derived | {"met": None if by_target is None else by_target >= 1}

    def as_line(self) -> str:
        """A line of the table."""
        spread = f"{self.value:.5g} ({min(self.runs):.5g}-{max(self.runs):.5g})" if len(self.runs) > 1 else ""
        reached, ratio, by_target = self.better(self.roofline), self.better(self.vllm), self.better(self.target)
        cells = [
            f"{self.metric:31} {spread or format(self.value, '.5g'):27}",
            f"{_number(self.roofline):>8} {'-' if reached is None else format(reached, '.0%'):>5}",
            f"{_number(self.vllm):>7} {'-' if ratio is None else format(ratio, '.2f') + 'x':>6}",
            f"{_number(self.target):>7} {'-' if by_target is None else 'met' if by_target >= 1 else 'MISSED':6}",
        ]
        return " | ".join(cells) + (f" | {self.note}" if self.note else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


class CallTimes:
    """Inside `with`: `seconds` is the time that Python spent in some methods, which do not call each other."""

    def __init__(self, *methods: tuple[Any, str]) -> None:
        """`methods`: (class or object, name)."""
        self.seconds = 0.0
        self._saved = [(owner, name, getattr(owner, name)) for owner, name in methods]

    def __enter__(self) -> CallTimes:
        for owner, name, method in self._saved:
            setattr(owner, name, self._timed(method))
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, method in self._saved:
            setattr(owner, name, method)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def host_waits() -> CallTimes:
    """Return the time in synchronize() of torch.cuda's events and streams."""
    owners: tuple[Any, ...] = (torch.cuda.Event, torch.cuda.Stream, torch.cuda)
    return CallTimes(*((owner, "synchronize") for owner in owners))


class ProfileReport:
    """What a profile of decode steps says; microseconds."""

    def __init__(self, events: Iterable[Any], num_steps: int) -> None:
        """Sort torch.profiler's events."""
        self.num_steps = num_steps
        self.kernel_us: Counter[str] = Counter()
        self.kernel_counts: Counter[str] = Counter()
        self.host_us: Counter[str] = Counter()
        self.host_counts: Counter[str] = Counter()
        spans: list[tuple[float, float]] = []
        for event in events:
            start, end = event.time_range.start, event.time_range.end
            if event.device_type.name == "CPU":
                self.host_us[event.name] += end - start
                self.host_counts[event.name] += 1
            elif not (getattr(event, "is_user_annotation", False) or event.name in NO_WORK):
                spans.append((start, end))
                self.kernel_us[event.name] += end - start
                self.kernel_counts[event.name] += 1
        spans.sort()
        self.num_kernels = len(spans)
        self.gaps: list[float] = []
        self.window_us, self.busy_us = self._union(spans)

    def _union(self, spans: list[tuple[float, float]]) -> tuple[float, float]:
        """Return (first start to last end, time in which some kernel runs); fills `gaps`."""
        if not spans:
            return 0.0, 0.0
        begin, reached = spans[0][0], spans[0][0]
        busy = 0.0
        for start, end in spans:
            if start > reached:
                self.gaps.append(start - reached)
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return reached - begin, busy

    def text(self, step_us: float, host_us: float, num_rows: int = 25) -> str:
        """Return the report; step_us and host_us were taken without the profiler."""
        n = self.num_steps
        lines = [
            f"step {step_us / 1e3:.3f} ms without profiler, of it host (not waiting) {host_us / 1e3:.3f} ms",
            f"{n} steps profiled, {self.num_kernels / n:.1f} kernels and copies a step",
        ]
        if self.window_us:
            largest = ", ".join(f"{gap:.0f}" for gap in sorted(self.gaps, reverse=True)[:5])
            mean_gap = sum(self.gaps) / max(1, len(self.gaps))
            lines += [
                f"GPU busy {self.busy_us / n / 1e3:.3f} ms a step: {self.busy_us / self.window_us:.1%} of the "
                f"{self.window_us / n / 1e3:.3f} ms under the profiler, {self.busy_us / n / step_us:.1%} of it without",
                f"{len(self.gaps) / n:.1f} gaps a step, mean {mean_gap:.2f} us, largest {largest} us",
            ]
        launches = {name: c for name, c in self.host_counts.items() if "Launch" in name and name.startswith("cu")}
        lines.append("launches a step: " + (", ".join(f"{k} {c / n:.1f}" for k, c in launches.items()) or "none"))
        lines.append("calls that wait or may wait (cudaEventSynchronize once a step is the design's own):")
        for name, count in self.host_counts.items():
            if "Synchronize" in name or name in BLOCKING:
                lines.append(f"  {self.host_us[name] / n:9.1f} us {count / n:7.2f} a step  {name}")
        copies = {name: c for name, c in self.kernel_counts.items() if name.startswith("Memcpy")}
        for name, count in copies.items():
            remark = "  <- the host waits" if "Pageable" in name and "DtoH" in name else ""
            lines.append(f"  {self.kernel_us[name] / n:9.1f} us {count / n:7.2f} a step  {name}{remark}")
        lines.append("us a step  count   mean   share  kernel")
        for name, us in self.kernel_us.most_common(num_rows):
            count = self.kernel_counts[name]
            share = us / max(self.busy_us, 1e-9)
            lines.append(f"{us / n:9.1f} {count / n:7.1f} {us / count:7.2f} {share:6.1%}  {name[:90]}")
        return "\n".join(lines)
