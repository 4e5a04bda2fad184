"""WorkerBase: what a worker does on any device (vLLM: `v1/worker/worker_base.py`).

A worker owns one device: it sets it up, holds the model runner, says how much memory the KV cache may take and
allocates it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.selector import select_attention_backend
from folovllm.config import DeviceConfig, VllmConfig
from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from folovllm.outputs import ModelRunnerOutput, PendingOutput
from folovllm.utils.common import init_logger
from folovllm.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from folovllm.core.sched.output import GrammarOutput, SchedulerOutput
    from folovllm.model_executor.model_loader.source import ModelSource

logger = init_logger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_device(config: DeviceConfig) -> torch.device:
    """Return the device to run on; ValueError if CUDA is asked for and absent."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda":
        raise ValueError("device='cuda': torch sees no CUDA GPU here. Use device='cpu' or 'auto'.")
    return torch.device("cpu")


def resolve_dtype(name: str, hf_config: dict[str, Any], device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to run in and why.

    A named dtype is taken as it is. "auto" is, on the CPU, bfloat16 where the processor multiplies it natively, else
    float32; on CUDA the checkpoint's 16-bit type, and bfloat16 (float16 on older GPUs) for float32 checkpoints.
    """
    if name != "auto":
        return DTYPES[name], "chosen by dtype"
    if device.type == "cpu":
        if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "the CPU multiplies bfloat16 natively"
        return torch.float32, "the CPU has no bfloat16 arithmetic"
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16, "the GPU has no bfloat16 arithmetic"
    if stored == "float16":
        return torch.float16, "the checkpoint's"
    return torch.bfloat16, "the checkpoint's" if stored == "bfloat16" else "16 bits for a float32 checkpoint"


@dataclass
class StartupInfo:
    """What the worker found out while starting, for the start-up report."""

    device: str
    """E.g. "cpu (2 threads)"."""
    dtype: str
    """E.g. "bfloat16 (the CPU has bfloat16 units)"."""
    attention_backend: str
    """Name and reason."""
    weight_bytes: int = 0
    """Parameters and buffers."""
    kv_cache_bytes: int = 0
    """KV cache, all layers."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds, in order."""


class WorkerBase(ABC):
    """One device and its model runner."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, source: ModelSource) -> None:
        """Nothing is allocated yet."""
        self.vllm_config = vllm_config
        self.device = device
        self.source = source
        self.model_runner: ModelRunner
        self.startup_info: StartupInfo

    @abstractmethod
    def describe_device(self) -> str:
        """Return the device in words, for the start-up report."""

    @abstractmethod
    def determine_available_memory(self) -> int:
        """Return the bytes that the KV cache may take; the model must be loaded."""

    def init_device(self) -> None:
        """Choose dtype and attention backend, and make the model runner."""

        model_config = self.vllm_config.model_config
        assert model_config.hf_config is not None
        dtype, dtype_reason = resolve_dtype(model_config.dtype, model_config.hf_config, self.device)
        dtype_name = str(dtype).removeprefix("torch.")
        backend, backend_reason = select_attention_backend(
            self.vllm_config.attention_config.backend,
            self.device,
            dtype,
            model_config.get_head_size(),
            self.vllm_config.cache_config.block_size,
            deterministic=model_config.deterministic,
        )
        self.check_options(backend)
        logger.info("Attention backend: %s (%s).", backend.get_name(), backend_reason)
        self.startup_info = StartupInfo(
            device=self.describe_device(),
            dtype=f"{dtype_name} ({dtype_reason})",
            attention_backend=f"{backend.get_name()} ({backend_reason})",
        )
        self.model_runner = self.make_model_runner(dtype, backend)

    def make_model_runner(self, dtype: torch.dtype, backend: type[AttentionBackend]) -> ModelRunner:
        """Return the model runner for this device."""
        return ModelRunner(self.vllm_config, self.device, dtype, backend)

    def check_options(self, backend: type[AttentionBackend]) -> None:
        """Raise ValueError for options that this device or backend does not have."""
        if self.vllm_config.model_config.deterministic and self.device.type != "cuda":
            raise ValueError(
                f"deterministic=True is for CUDA; this engine runs on {self.device.type}. Leave it out: with "
                "max_num_seqs=1 a request's results do not depend on others anywhere."
            )
        if self.vllm_config.cache_config.cache_dtype == "fp8" and not backend.reads_fp8:
            raise ValueError(
                f"kv_cache_dtype='fp8' needs an attention backend on CUDA that reads it (paged or paged_flash), not "
                f"{backend.get_name()} on {self.device.type}. Use 'auto'."
            )
        sizes = self.vllm_config.compilation_config.cuda_graph_sizes
        if sizes is not None and backend.written_kv_device != "cuda":
            raise ValueError(
                f"cuda_graph_sizes={sizes!r}: steps are recorded on CUDA with attention backend paged or paged_flash, "
                f"not with {backend.get_name()} on {self.device.type}. Leave it out."
            )

    @contextmanager
    def timed_phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the start-up report."""
        start = time.perf_counter()
        yield
        self.startup_info.phase_seconds[name] = time.perf_counter() - start

    def load_model(self, use_tqdm: bool) -> None:
        """Build the model and fill it from the source."""
        with self.timed_phase("load weights"):
            self.startup_info.weight_bytes = self.model_runner.load_model(self.source, use_tqdm)

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        """Return layer name -> cache spec."""
        return self.model_runner.get_kv_cache_spec()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache and bind it to the layers."""
        with self.timed_phase("allocate KV cache"):
            self.startup_info.kv_cache_bytes = self.model_runner.initialize_kv_cache(kv_cache_config)

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        non_block: bool = False,
        get_grammar_output: Callable[[], GrammarOutput] | None = None,
    ) -> ModelRunnerOutput | PendingOutput:
        """Run one step; with `non_block`, only launch it. `get_grammar_output`: see Executor."""
        pending = self.model_runner.execute_model(scheduler_output, get_grammar_output)
        return pending if non_block else pending.get_output()

    def shutdown(self) -> None:
        """Drop model and cache."""
        del self.model_runner
