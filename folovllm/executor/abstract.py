"""Executor: how the engine core reaches the devices (vLLM: `v1/executor/abstract.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from folovllm.outputs import ModelRunnerOutput, PendingOutput
from folovllm.worker.worker_base import StartupInfo


class Executor(ABC):
    """Runs a step on every worker. Lists have one entry per worker."""

    @abstractmethod
    def get_kv_cache_specs(self) -> list[dict[str, FullAttentionSpec]]:
        """Return layer name -> cache spec."""

    @abstractmethod
    def determine_available_memory(self) -> list[int]:
        """Return the bytes that the KV cache may take; call once, before initialize_from_config."""

    @abstractmethod
    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Allocate the KV cache; raises ValueError if the memory is not there."""

    @abstractmethod
    def execute_model(
        self,
        scheduler_output: object,
        non_block: bool = False,
        get_grammar_output: Callable[[], Any] | None = None,
    ) -> ModelRunnerOutput | PendingOutput:
        """Run one step: a core.sched.output.SchedulerOutput in, sampled tokens out.

        `get_grammar_output` comes with a step that has structured output: called once, before sampling, it returns the
        core.sched.output.GrammarOutput.

        With `non_block`, return as soon as the step is launched: PendingOutput.get_output() waits for its tokens.
        The next step may be launched before that; outputs must be fetched in the order of the steps.
        """

    @property
    def prefers_async_scheduling(self) -> bool:
        """Whether overlapping steps pays on this device where the user leaves the choice."""
        return False

    @abstractmethod
    def get_startup_info(self) -> StartupInfo:
        """Return what is known of device, dtype, backend, memory and times."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free what the workers hold; the executor is unusable afterwards."""
