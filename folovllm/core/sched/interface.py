"""SchedulerInterface: what EngineCore needs of a scheduler (vLLM: `v1/core/sched/interface.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from folovllm.core.sched.output import GrammarOutput, SchedulerOutput
from folovllm.metrics.stats import SchedulerStats
from folovllm.outputs import EngineCoreOutputs, ModelRunnerOutput
from folovllm.request import Request, RequestStatus


class SchedulerInterface(ABC):
    """Decides, step by step, which requests compute how many tokens. Not thread-safe."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Queue a request; ValueError for an id that is still known."""

    @abstractmethod
    def schedule(self) -> SchedulerOutput:
        """Decide the next step; total_num_scheduled_tokens is 0 where there is nothing to compute.

        Blocks are allocated and progress advances at once: the step must be executed, and steps in the order
        of their schedule() calls. The result is the caller's.
        """

    @abstractmethod
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in the sampled tokens of an executed step; return {0: what every request got}.

        To be called once per schedule(), in the same order, also where nothing was scheduled.
        """

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput:
        """Return the masks of a step with `structured_output_request_ids`; before update_from_output of that step."""
        raise NotImplementedError

    def wait_for_grammar(self, timeout_s: float) -> None:
        """Where requests wait for nothing but their grammar: return once one is ready, at most after `timeout_s`."""
        return

    @abstractmethod
    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[str]:
        """End requests from outside, at any moment: an id, several, or None for all. Unknown ids are ignored.

        Returns the ids that were ended. They get no further output.
        """

    @abstractmethod
    def get_request_counts(self) -> tuple[int, int]:
        """Return (running, waiting)."""

    @abstractmethod
    def get_num_unfinished_requests(self) -> int:
        """Return how many requests run or wait."""

    def has_unfinished_requests(self) -> bool:
        """Return whether any request runs or waits."""
        return self.get_num_unfinished_requests() > 0

    @abstractmethod
    def has_finished_requests(self) -> bool:
        """Return whether ended requests are still to be reported (to worker or client): a step is due."""

    def has_requests(self) -> bool:
        """Return whether another step is due for whatever reason."""
        return self.has_unfinished_requests() or self.has_finished_requests()

    @abstractmethod
    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all cached blocks; False, and no change, while requests hold any.

        With `reset_running_requests` all running requests are preempted first, so it succeeds.
        """

    @abstractmethod
    def make_stats(self) -> SchedulerStats | None:
        """Return the state of the queues and the counts since the last call; None without log_stats."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release what the scheduler holds outside itself."""
