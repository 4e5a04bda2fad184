"""GPUWorker: a CUDA device (vLLM: `v1/worker/gpu_worker.py`)."""

from __future__ import annotations

import gc
import importlib.util

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.kv_cache_interface import KVCacheConfig
from folovllm.utils.common import GiB
from folovllm.worker.model_runner import ModelRunner
from folovllm.worker.worker_base import WorkerBase


class GPUWorker(WorkerBase):
    """Runs the model on one CUDA GPU."""

    def describe_device(self) -> str:
        """See WorkerBase."""
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    def init_device(self) -> None:
        """See WorkerBase."""
        # cuDNN's attention plans anew, for milliseconds on the host, whenever a context has grown by a token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        super().init_device()

    def check_options(self, backend: type[AttentionBackend]) -> None:
        """See WorkerBase."""
        super().check_options(backend)
        if self.vllm_config.model_config.deterministic and importlib.util.find_spec("triton") is None:
            raise ValueError("deterministic=True needs Triton, whose products do not depend on the batch: install it.")
        capability = torch.cuda.get_device_capability(self.device)
        if self.vllm_config.cache_config.cache_dtype == "fp8" and capability < (8, 9):
            name = torch.cuda.get_device_name(self.device)
            raise ValueError(
                f"kv_cache_dtype='fp8' needs compute capability 8.9 or later; {name} has "
                f"{capability[0]}.{capability[1]}. Use 'auto'."
            )

    def determine_available_memory(self) -> int:
        """Return what is left of gpu_memory_utilization after weights and the largest step's activations.

        The largest step is run once to measure them. Other processes' memory counts as taken.

        Raises:
            ValueError: nothing is left.
        """
        cache_config = self.vllm_config.cache_config
        if cache_config.kv_cache_memory_bytes is not None:
            return cache_config.kv_cache_memory_bytes
        with self.timed_phase("profile memory"):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.model_runner.profile_run()
            torch.cuda.synchronize(self.device)
            activations = torch.cuda.max_memory_allocated(self.device) - before
            gc.collect()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            graphs = self.model_runner.profile_graph_memory()
        available = int(total * cache_config.gpu_memory_utilization) - (total - free) - activations - graphs
        if available <= 0:
            raise ValueError(
                f"gpu_memory_utilization={cache_config.gpu_memory_utilization} of {total / GiB:.1f} GiB leaves no room "
                f"for the KV cache: {(total - free) / GiB:.1f} GiB are taken and a step needs "
                f"{activations / GiB:.1f} GiB. Raise it, or lower max_num_batched_tokens."
            )
        return available

    def load_model(self, use_tqdm: bool) -> None:
        """See WorkerBase; then compiles the kernels, so that their memory is seen by what follows."""
        super().load_model(use_tqdm)
        with self.timed_phase("compile kernels"):
            self.model_runner.compile_kernels()

    def make_model_runner(self, dtype: torch.dtype, backend: type[AttentionBackend]) -> ModelRunner:
        """See WorkerBase; without Triton (it does not come with every build of torch) steps run as on the CPU."""
        if importlib.util.find_spec("triton") is None:
            return super().make_model_runner(dtype, backend)
        from folovllm.worker.gpu_model_runner import GPUModelRunner

        return GPUModelRunner(self.vllm_config, self.device, dtype, backend)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """See WorkerBase; then records the CUDA graphs."""
        super().initialize_from_config(kv_cache_config)
        with self.timed_phase("record CUDA graphs"):
            self.model_runner.record_graphs()
            torch.cuda.synchronize(self.device)
