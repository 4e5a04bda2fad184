"""CPUWorker (vLLM: `v1/worker/cpu_worker.py`)."""

from __future__ import annotations

import ctypes
import os

import torch

from folovllm.config import DEFAULT_CPU_KV_CACHE_BYTES
from folovllm.utils import cpu_kernels
from folovllm.utils.common import GiB, cdiv, init_logger
from folovllm.worker.worker_base import WorkerBase

logger = init_logger(__name__)


class CPUWorker(WorkerBase):
    """Runs the model on all cores that torch uses."""

    def init_device(self) -> None:
        """See WorkerBase."""
        keep_freed_memory()
        usable, reason = cpu_kernels.available()
        if usable or reason == cpu_kernels.SWITCHED_OFF:
            logger.info("CPU kernels: %s.", reason)
        else:
            logger.warning("No CPU kernels, torch's operators take their place and are slower: %s.", reason)
        super().init_device()

    def describe_device(self) -> str:
        """See WorkerBase."""
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"

    def determine_available_memory(self) -> int:
        """Return kv_cache_memory_bytes, or 1 GiB but no more than max_num_seqs longest requests need.

        Raises:
            ValueError: the machine has less memory free than that.
        """
        cache_config, scheduler_config = self.vllm_config.cache_config, self.vllm_config.scheduler_config
        block_bytes = sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())
        wanted = cache_config.kv_cache_memory_bytes
        if wanted is None:
            max_model_len = self.vllm_config.model_config.max_model_len
            assert max_model_len is not None
            blocks_per_seq = cdiv(max_model_len, cache_config.block_size)
            # Block 0 is the null block; it takes memory too.
            most_useful = (scheduler_config.max_num_seqs * blocks_per_seq + 1) * block_bytes
            wanted = min(DEFAULT_CPU_KV_CACHE_BYTES, most_useful)
        if cache_config.num_gpu_blocks_override is not None:
            wanted = cache_config.num_gpu_blocks_override * block_bytes
        free = available_memory_bytes()
        if free is not None and wanted > free:
            raise ValueError(
                f"The KV cache needs {wanted / GiB:.2f} GiB, but the machine has {free / GiB:.2f} GiB free. Lower "
                "kv_cache_memory_bytes (or num_gpu_blocks_override), or free memory."
            )
        return wanted


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation, in this process; does nothing on other C libraries.

    Else activations of some megabytes may go back to the system after every operator, depending on what happens to
    lie behind them, and come back page by page: 220,000 page faults, 0.3 s in a step of 2048 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    for option in (m_mmap_threshold, m_trim_threshold):
        mallopt(option, 1 << 30)


def available_memory_bytes() -> int | None:
    """Return the memory that can be used without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
