"""EngineCore: schedule -> execute -> update, once per step; it owns no text (vLLM: `v1/engine/core.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from folovllm.config import VllmConfig
from folovllm.core.kv_cache_utils import get_kv_cache_configs, get_request_block_hasher, init_none_hash
from folovllm.core.sched.scheduler import Scheduler
from folovllm.executor.abstract import Executor
from folovllm.outputs import EngineCoreOutputs
from folovllm.request import EngineCoreRequest, Request, RequestStatus
from folovllm.utils.common import cdiv, get_hash_fn_by_name


class EngineCore:
    """Ties scheduler and executor together."""

    def __init__(self, vllm_config: VllmConfig, executor: Executor, log_stats: bool = False) -> None:
        """Size the KV cache for what the executor has left, allocate it, and make the scheduler.

        Raises:
            ValueError: the KV cache cannot hold one request of max_model_len tokens.
        """
        self.vllm_config = vllm_config
        self.executor = executor
        specs = executor.get_kv_cache_specs()
        kv_cache_configs = get_kv_cache_configs(vllm_config, specs, executor.determine_available_memory())
        executor.initialize_from_config(kv_cache_configs)
        self.kv_cache_config = kv_cache_configs[0]
        cache_config = vllm_config.cache_config
        self.scheduler = Scheduler(
            vllm_config, self.kv_cache_config, block_size=cache_config.block_size, log_stats=log_stats
        )
        self._block_hasher: Callable[[Request], list[Any]] | None = None
        if cache_config.enable_prefix_caching:
            hash_fn = get_hash_fn_by_name(cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_fn)
            self._block_hasher = get_request_block_hasher(cache_config.block_size, hash_fn)

    def check_fits(self, request: EngineCoreRequest) -> None:
        """Raise ValueError if the pool could never hold the prompt and one token more."""
        block_size = self.vllm_config.cache_config.block_size
        needed, usable = (
            cdiv(len(request.prompt_token_ids) + 1, block_size),
            self.kv_cache_config.num_blocks - 1,
        )
        if needed > usable:
            raise ValueError(
                f"prompt of {len(request.prompt_token_ids)} tokens needs {needed} KV cache blocks of {block_size} "
                f"tokens, and the cache has {usable}. Shorten it, or raise kv_cache_memory_bytes, "
                "gpu_memory_utilization or num_gpu_blocks_override."
            )

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a checked request."""
        self.scheduler.add_request(Request.from_engine_core_request(request, self._block_hasher))

    def abort_requests(self, request_ids: list[str]) -> None:
        """End requests at once; unknown ids are ignored (they may have just finished)."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> EngineCoreOutputs:
        """Run one step: what is scheduled, executed, and thereby finished."""
        if not self.scheduler.has_requests():
            return EngineCoreOutputs(timestamp=time.monotonic())
        scheduler_output = self.scheduler.schedule()
        model_output = self.executor.execute_model(scheduler_output)
        outputs = self.scheduler.update_from_output(scheduler_output, model_output)
        return outputs.get(0) or EngineCoreOutputs(timestamp=time.monotonic())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False if requests still hold some."""
        return self.scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the devices."""
        self.executor.shutdown()
