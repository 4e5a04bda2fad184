"""UniProcExecutor: one worker in this process, on a GPU or the CPU (vLLM: `v1/executor/uniproc_executor.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from folovllm.config import VllmConfig
from folovllm.executor.abstract import Executor
from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from folovllm.outputs import ModelRunnerOutput, PendingOutput
from folovllm.worker.worker_base import StartupInfo, WorkerBase, resolve_device

if TYPE_CHECKING:
    from folovllm.core.sched.output import GrammarOutput, SchedulerOutput
    from folovllm.model_executor.model_loader.source import ModelSource


class UniProcExecutor(Executor):
    """Forwards every call to its worker."""

    def __init__(self, vllm_config: VllmConfig, source: ModelSource, use_tqdm: bool = True) -> None:
        """Set up the device and load the model; `use_tqdm` shows the loading progress bar."""
        device = resolve_device(vllm_config.device_config)
        self.worker = _worker_class(device.type)(vllm_config, device, source)
        self.worker.init_device()
        self.worker.load_model(use_tqdm)

    def get_kv_cache_specs(self) -> list[dict[str, FullAttentionSpec]]:
        """See Executor."""
        return [self.worker.get_kv_cache_spec()]

    def determine_available_memory(self) -> list[int]:
        """See Executor."""
        return [self.worker.determine_available_memory()]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """See Executor."""
        self.worker.initialize_from_config(kv_cache_configs[0])

    def execute_model(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        non_block: bool = False,
        get_grammar_output: Callable[[], GrammarOutput] | None = None,
    ) -> ModelRunnerOutput | PendingOutput:
        """See Executor."""
        return self.worker.execute_model(scheduler_output, non_block, get_grammar_output)

    @property
    def prefers_async_scheduling(self) -> bool:
        """See Executor."""
        return self.worker.device.type == "cuda"

    def get_startup_info(self) -> StartupInfo:
        """See Executor."""
        return self.worker.startup_info

    def shutdown(self) -> None:
        """See Executor."""
        self.worker.shutdown()


def _worker_class(device_type: str) -> type[WorkerBase]:
    if device_type == "cuda":
        from folovllm.worker.gpu_worker import GPUWorker

        return GPUWorker
    from folovllm.worker.cpu_worker import CPUWorker

    return CPUWorker
