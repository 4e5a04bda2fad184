"""AsyncScheduler: decides step k+1 while step k runs on the device (vLLM: `core/sched/async_scheduler.py`).

        host    schedule k | schedule k+1 | update k | schedule k+2 | update k+1 | ...
        device             | ====== step k ====== | ===== step k+1 ===== | ...

When step k+1 is decided, the token that step k samples is not known here; but that there will be one is. It
counts as a placeholder: the sequence is one token longer than the host knows, and the worker, which has the
token on the device, feeds it to step k+1. What differs from the Scheduler is only this:

- a request is behind by its placeholders too (`_num_uncomputed_tokens`);
- what may follow under a grammar depends on the token in flight: such a request sits out every other step;
- a token may turn out to be a stop when the next step is under way already: that step's token is dropped;
- a preempted request is not admitted again before its last token has arrived.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler, _Step
from folovllm.outputs import EngineCoreOutputs, ModelRunnerOutput
from folovllm.request import Request


class AsyncScheduler(Scheduler):
    """A Scheduler whose schedule() may be called again before update_from_output of the steps before.

    Steps must be executed, and updated from, in the order in which they were scheduled. The number of steps
    in flight is the caller's choice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The arguments of Scheduler."""
        super().__init__(*args, **kwargs)
        # Request id -> tokens in flight for a request that has ended: not for a newcomer of the same id.
        self._num_stale_tokens: dict[str, int] = {}

    def _num_uncomputed_tokens(self, request: Request) -> int:
        """How far a running request is behind, placeholders included; 0 if it will surely end with those."""
        num_tokens = request.num_tokens + request.num_output_placeholders
        if request.num_output_placeholders:
            if request.grammar is not None:
                return 0
            max_tokens = request.max_tokens
            num_output_tokens = num_tokens - request.num_prompt_tokens
            if num_tokens >= self.max_model_len or (max_tokens is not None and num_output_tokens >= max_tokens):
                return 0
        return num_tokens - request.num_computed_tokens

    def _try_admit(self, request: Request, step: _Step) -> bool:
        # Tokens in flight come before whatever a resumed request would sample: it has to wait for them.
        if request.num_output_placeholders:
            return False
        return super()._try_admit(request, step)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Count the step as computed, and a placeholder for each request that it samples for."""
        super()._update_after_schedule(scheduler_output)
        requests = self.requests
        for request_id in scheduler_output.num_scheduled_tokens:
            request = requests[request_id]
            if request.num_computed_tokens == request.num_tokens + request.num_output_placeholders:
                request.num_output_placeholders += 1

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As Scheduler; tokens for requests that have ended since the step was scheduled are dropped."""
        if self._num_stale_tokens:
            scheduler_output = self._without_stale(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _without_stale(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> SchedulerOutput:
        """Return the step without the requests whose token in it is for an ended request of the same id."""
        stale = self._num_stale_tokens
        alive = dict(scheduler_output.num_scheduled_tokens)
        for request_id in stale.keys() & alive.keys():
            index = model_runner_output.req_id_to_index[request_id]
            sampled = model_runner_output.sampled_token_ids
            num_tokens = len(sampled[index]) if sampled else 0
            if num_tokens:
                del alive[request_id]
                stale[request_id] -= num_tokens
                if stale[request_id] <= 0:
                    del stale[request_id]
        return replace(scheduler_output, num_scheduled_tokens=alive)

    def _update_request_with_output(self, request: Request, new_token_ids: list[int]) -> tuple[list[int], bool]:
        num_new_tokens = len(new_token_ids)
        num_left = request.num_output_placeholders - num_new_tokens
        request.num_output_placeholders = num_left if num_left > 0 else 0
        # Not super(): looking that up takes longer than the call, for every request of every step.
        result = Scheduler._update_request_with_output(self, request, new_token_ids)
        if request.num_tokens % self.block_size < num_new_tokens:
            # A block that ends with a token in flight could not be named when its step was scheduled.
            self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        return result

    def _free_request(self, request: Request) -> None:
        if request.num_output_placeholders:
            request_id = request.request_id
            num_stale = self._num_stale_tokens.get(request_id, 0)
            self._num_stale_tokens[request_id] = num_stale + request.num_output_placeholders
            request.num_output_placeholders = 0
        super()._free_request(request)
