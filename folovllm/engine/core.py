"""EngineCore: schedule -> execute -> update, once per step; it owns no text (vLLM: `v1/engine/core.py`)."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from folovllm.config import VllmConfig
from folovllm.core.kv_cache_utils import get_kv_cache_configs, get_request_block_hasher, init_none_hash
from folovllm.core.sched.async_scheduler import AsyncScheduler
from folovllm.core.sched.interface import SchedulerInterface
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.core.sched.traced_scheduler import TracedScheduler
from folovllm.engine.processor import check_fits
from folovllm.executor.abstract import Executor
from folovllm.outputs import EngineCoreOutputs, ModelRunnerOutput, PendingOutput
from folovllm.request import EngineCoreRequest, Request, RequestStatus
from folovllm.structured_output.manager import StructuredOutputManager
from folovllm.utils.common import GiB, get_hash_fn_by_name

GRAMMAR_WAIT_S = 0.005
"""How long a step waits for a grammar, where nothing else is to be done: new requests wait as long."""


class EngineCore:
    """Ties scheduler and executor together."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        executor: Executor,
        log_stats: bool = False,
        load_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        """Size the KV cache for what the executor has left, allocate it, and make the scheduler.

        Args:
            vllm_config: the checked configuration.
            executor: started, with the model loaded.
            log_stats: gather statistics.
            load_tokenizer: called with the first request for structured output, in another thread; None fails those.

        Raises:
            ValueError: the KV cache cannot hold one request of max_model_len tokens, or the step trace cannot be
                written.
        """
        self.vllm_config = vllm_config
        self.executor = executor
        specs = executor.get_kv_cache_specs()
        kv_cache_configs = get_kv_cache_configs(vllm_config, specs, executor.determine_available_memory())
        executor.initialize_from_config(kv_cache_configs)
        self.kv_cache_config = kv_cache_configs[0]
        cache_config = vllm_config.cache_config
        overlap = vllm_config.scheduler_config.async_scheduling
        self.async_scheduling = executor.prefers_async_scheduling if overlap is None else overlap
        scheduler_cls = AsyncScheduler if self.async_scheduling else Scheduler
        scheduler = scheduler_cls(
            vllm_config,
            self.kv_cache_config,
            block_size=cache_config.block_size,
            log_stats=log_stats,
            grammar_compiler=StructuredOutputManager(vllm_config, load_tokenizer),
        )
        trace_path = vllm_config.observability_config.step_trace_path
        self.scheduler: SchedulerInterface = scheduler if trace_path is None else TracedScheduler(scheduler, trace_path)
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput | PendingOutput]] = deque()
        self._block_hasher: Callable[[Request], list[Any]] | None = None
        self._hash_block_size = cache_config.block_size
        if cache_config.enable_prefix_caching:
            hash_fn = get_hash_fn_by_name(cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_fn)
            self._block_hasher = get_request_block_hasher(cache_config.block_size, hash_fn)
        # What exists now (torch's modules, the model, the block pool) stays, but every full garbage collection would
        # walk through it, in the middle of a step. Frozen, it is passed over; its reference counts free it as before.
        # This holds for the whole process, until shutdown(). With 10,000 queued requests it halves the pauses.
        gc.collect()
        gc.freeze()

    def check_fits(self, request: EngineCoreRequest) -> None:
        """Raise ValueError if the pool could never hold the prompt and one token more."""
        check_fits(request, self.kv_cache_config.num_blocks, self.vllm_config.cache_config.block_size)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a checked request."""
        self.scheduler.add_request(Request.from_engine_core_request(request, self._block_hasher, self._hash_block_size))

    def abort_requests(self, request_ids: list[str]) -> None:
        """End requests at once; unknown ids are ignored (they may have just finished)."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> EngineCoreOutputs:
        """Run one step: schedule it, execute it, and return what it brought.

        With async scheduling two steps are in flight: this call launches the next one, then waits for the one before
        it, so that the device has work while the host updates and schedules.
        """
        depth = 2 if self.async_scheduling else 1
        while len(self._in_flight) < depth and self.scheduler.has_requests():
            scheduler_output = self.scheduler.schedule()
            self._in_flight.append((scheduler_output, self._launch(scheduler_output)))
            if scheduler_output.total_num_scheduled_tokens == 0:
                # Every request waits for a token in flight, or for its grammar.
                if not any(step.total_num_scheduled_tokens for step, _ in self._in_flight):
                    self.scheduler.wait_for_grammar(GRAMMAR_WAIT_S)
                break
        outputs = self._update_oldest()
        while self._in_flight and not self.scheduler.has_unfinished_requests():
            self._update_oldest()  # a step launched for requests that have ended meanwhile: nobody waits for it
        return outputs

    def _launch(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | PendingOutput:
        if not scheduler_output.structured_output_request_ids:
            return self.executor.execute_model(scheduler_output, non_block=self.async_scheduling)
        # The worker asks for the masks when its forward pass is on the way.
        get_bitmask = partial(self.scheduler.get_grammar_bitmask, scheduler_output)
        return self.executor.execute_model(scheduler_output, self.async_scheduling, get_bitmask)

    def _update_oldest(self) -> EngineCoreOutputs:
        """Wait for the oldest step in flight and let the scheduler take its tokens."""
        if not self._in_flight:
            return EngineCoreOutputs(timestamp=time.monotonic())
        scheduler_output, pending = self._in_flight.popleft()
        model_output = pending.get_output() if isinstance(pending, PendingOutput) else pending
        return self.scheduler.update_from_output(scheduler_output, model_output)[0]

    def startup_report(self, front_seconds: dict[str, float]) -> str:
        """One block of text: model, dtype, backend and why, GiB of weights and KV cache, seconds per phase.

        `front_seconds`: what was done before the executor started -> seconds.
        """
        info = self.executor.get_startup_info()
        config = self.vllm_config
        phases = front_seconds | info.phase_seconds
        lines = {
            "model": f"{config.model_config.model} ({config.model_config.architecture})",
            "device": info.device,
            "dtype": info.dtype,
            "attention": info.attention_backend,
            "weights": f"{info.weight_bytes / GiB:.2f} GiB",
            "KV cache": f"{info.kv_cache_bytes / GiB:.2f} GiB, {self.kv_cache_config.num_blocks} blocks of "
            f"{config.cache_config.block_size} tokens, max_model_len {config.model_config.max_model_len}",
            "seconds": ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
            + f"; total {sum(phases.values()):.2f}",
        }
        return "\n".join(["Engine ready.", *(f"  {name:<10} {text}" for name, text in lines.items())])

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False if requests still hold some."""
        return self.scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the devices, close the step trace, and let the garbage collector see everything again."""
        gc.unfreeze()
        self.scheduler.shutdown()
        self.executor.shutdown()
