"""The machine: what it is, what it does at best, and the least time that a workload can take on it.

Roofline (Williams, Waterman, Patterson 2009): work takes no less than its bytes at the memory's speed or its
multiplications at the processor's. Both speeds are measured here, with large copies and large matrix products of torch.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.benchmarks.schema import Machine, RunRecord, WorkloadRecord
from folovllm.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python")
"""Packages whose versions are written down where they are installed."""
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Far larger than any cache."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""


def describe_machine(device: str, dtype: torch.dtype | None = None) -> Machine:
    """Return what is known of the machine.

    Args:
        device: "cpu" or "cuda".
        dtype: measure the speeds, products in this type; None: do not measure.
    """
    bytes_per_s = flops_per_s = 0.0
    if dtype is not None:
        bytes_per_s, flops_per_s = measure_copy(device), measure_matmul(device, dtype)
    return Machine(
        device=device,
        device_name=_device_name(device),
        cores=_num_cores(),
        host_memory=_host_memory(),
        bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "",
        platform=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={"folovllm": __version__} | _versions(),
    )


def guess_device(device: str) -> str:
    """Return "cpu" or "cuda" for a `device` of EngineArgs, without touching a GPU; loading a model checks it."""
    if device != "auto":
        return device
    import torch

    # As torch.cuda.is_available() with NVML: creates no context in this process.
    return "cuda" if torch.cuda.device_count() else "cpu"


def measure_copy(device: str, num_bytes: int | None = None) -> float:
    """Return bytes per second of a large copy on the device, bytes read and bytes written together."""
    import torch

    num_bytes = num_bytes or COPY_BYTES[device]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device)


def measure_matmul(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Return multiply-adds per second, counted twice, of a product of square matrices."""
    import torch

    size = size or MATRIX_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _seconds(lambda: torch.matmul(a, b), device))


def _seconds(call: Callable[[], object], device: str, runs: int = 5, min_s: float = 0.05) -> float:
    """Median of `runs` timings, each of as many calls as take `min_s`, per call; the first timing only counts calls."""
    import torch

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(1)
    count = max(1, int(min_s / timed(1)))
    return statistics.median(timed(count) / count for _ in range(runs))


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory() -> int:
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 0


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_host_bytes() -> int:
    """Return the most resident memory that this process has had; 0 where the system does not say."""
    try:
        # Not getrusage: what it says a child inherits from the process that started it.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if platform.system() == "Darwin" else peak * 1024)


def peak_device_bytes() -> int:
    """Return the most memory that torch has held on the GPU; 0 where this process uses none."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else 0


def least_seconds(run: RunRecord, record: WorkloadRecord, machine: Machine) -> float | None:
    """Return the least seconds that a workload's work takes: weights, KV cache and arithmetic, one after the other.

    Each step reads the weights once, and there are at least as many steps as the longest request has output tokens
    (those that wait for another's end come on top of it, and are not counted). Each output token reads the keys and
    values before it; each prompt token costs its multiplications. What the prefix cache held is not computed.

    Returns None where sizes or speeds are not known.
    """
    config, memory = run.model, run.memory
    if not (machine.bytes_per_s and machine.flops_per_s and memory.weights and memory.kv_cache and config):
        return None
    hidden, layers, heads = (config[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    layer_params = layers * (hidden * head_size * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"])
    trace = record.trace_config
    kv_bytes = memory.kv_cache / (trace["num_blocks"] * trace["block_size"]) if trace else 0.0
    tied = bool(config.get("tie_word_embeddings"))
    # Of a table of its own a step reads a row per token, which counts as nothing; a tied one is read as the LM head.
    item_bytes = 4 if machine.dtype == "float32" else 2
    read = memory.weights - (0 if tied else item_bytes * config["vocab_size"] * hidden)
    num_bytes = flops = 0.0
    longest = 0
    for request in record.requests:
        output = sum(count for _, count in request.outputs)
        prompt, cached = request.num_prompt_tokens, request.num_cached_tokens
        longest = max(longest, output)
        num_bytes += kv_bytes * (output * prompt + output * (output + 1) / 2)
        new = prompt - cached
        pairs = new * cached + new * new / 2
        flops += 2 * layer_params * new + 4 * layers * heads * head_size * pairs
    return float((num_bytes + longest * read) / machine.bytes_per_s + flops / machine.flops_per_s)


def machine_line(machine: Machine) -> str:
    """Return the machine in a line, for tables."""
    speeds = ""
    if machine.bytes_per_s:
        speeds = (
            f"; copies {machine.bytes_per_s / 1e9:.1f} GB/s, multiplies {machine.flops_per_s / 1e12:.2f} TFLOP/s "
            f"in {machine.dtype}"
        )
    where = machine.device_name if machine.device == "cuda" else f"{machine.device_name}, {machine.cores} cores"
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return f"{where}{speeds}; {versions}"


def memory_of(engine: Any) -> tuple[int, int]:
    """Return (bytes of weights, bytes of KV cache) that an LLMEngine reported when it started."""
    info = engine.executor.get_startup_info()
    return info.weight_bytes, info.kv_cache_bytes


def main(argv: list[str]) -> None:
    """Print the Machine as JSON: python -m folovllm.benchmarks.machine DEVICE DTYPE MODEL_DTYPE.

    For a caller that must not touch the device itself. DTYPE is that of EngineArgs, MODEL_DTYPE the checkpoint's or "".
    """
    import msgspec
    import torch

    from folovllm.config import DeviceConfig
    from folovllm.worker.worker_base import resolve_device, resolve_dtype

    device = resolve_device(DeviceConfig(argv[0]))
    dtype, _ = resolve_dtype(argv[1], {"dtype": argv[2] or None}, device)
    with torch.inference_mode():
        print(msgspec.json.encode(describe_machine(device.type, dtype)).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
