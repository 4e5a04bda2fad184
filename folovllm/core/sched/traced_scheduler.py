"""TracedScheduler: a scheduler, and beside it one line of the step trace per step (vLLM has no counterpart).

It stands around a Scheduler or an AsyncScheduler and lets every call through, so that an engine without a trace has
not one instruction of it. What a line says comes from four sources:

    SchedulerOutput             who computes what, with which blocks
    BlockPool.event_sink        what happened to blocks, in order
    ModelRunnerOutput           tokens sampled; wall and CPU times inside the worker, where it took them
    EngineCoreOutputs           who finished, and why
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from folovllm.core.sched.async_scheduler import AsyncScheduler
from folovllm.core.sched.interface import SchedulerInterface
from folovllm.core.sched.output import GrammarOutput, SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.metrics.stats import SchedulerStats
from folovllm.metrics.step_trace import StepTraceWriter, TracedRequest, TracedStep, token_kind
from folovllm.outputs import EngineCoreOutputs, ModelRunnerOutput
from folovllm.request import Request, RequestStatus

WORKER_PARTS = ("prepare", "forward", "sample")
"""Parts of a step that only the worker can time."""


class TracedScheduler(SchedulerInterface):
    """Does what `scheduler` does, and writes it down."""

    def __init__(self, scheduler: Scheduler, path: str) -> None:
        """Start a trace of `scheduler`, which must be new: the trace starts with an empty pool.

        Raises:
            ValueError: the file `path` cannot be written.
        """
        self.scheduler = scheduler
        self.writer = StepTraceWriter(path, _describe(scheduler))
        self._pool = scheduler.kv_cache_manager.block_pool
        self._pool.event_sink = self._on_block_event
        self._events: list[tuple[str, list[int]]] = []
        self._num_steps = 0
        # Scheduled, not updated yet: (line, clocks at the end of schedule(), ids that the worker is told have ended).
        self._in_flight: deque[tuple[TracedStep, float, float, set[str]]] = deque()
        # Ids whose end a line has told already, but not yet a SchedulerOutput.
        self._reported: set[str] = set()

    def _on_block_event(self, kind: str, block_ids: list[int]) -> None:
        events = self._events
        # Frees stay apart: each goes to the head or tail of the free queue as one piece.
        if kind != "free" and events and events[-1][0] == kind:
            events[-1][1].extend(block_ids)
        else:
            events.append((kind, block_ids))

    # ---- A step ----

    def schedule(self) -> SchedulerOutput:
        """As the scheduler; opens the step's line."""
        step_id = self._num_steps
        self._num_steps += 1
        self._events.append(("schedule", [step_id]))
        now, cpu, wall = time.time(), time.thread_time(), time.perf_counter()
        output = self.scheduler.schedule()
        scheduled, cpu_scheduled = time.perf_counter(), time.thread_time()
        ended = output.finished_req_ids - self._reported
        self._reported -= output.finished_req_ids
        line = TracedStep(
            step=step_id,
            time=now,
            ms={"schedule": _milliseconds(scheduled - wall)},
            cpu_ms={"schedule": _milliseconds(cpu_scheduled - cpu)},
            num_tokens=output.total_num_scheduled_tokens,
            requests=self._trace_requests(output),
            aborted=[],
            preempted=sorted(output.preempted_req_ids),
            finished={},
            num_running=0,
            num_waiting=0,
            num_free_blocks=0,
            events=[],
        )
        self._in_flight.append((line, time.perf_counter(), time.thread_time(), ended))
        return output

    def _trace_requests(self, output: SchedulerOutput) -> list[TracedRequest]:
        """One entry per scheduled request, in the order of scheduling."""
        requests = self.scheduler.requests
        num_scheduled = output.num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        traced: list[TracedRequest] = []
        for request_id, start, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            end = start + num_scheduled[request_id]
            kind = token_kind(start, end, requests[request_id].num_prompt_tokens)
            state = "resumed" if request_id in resumed else "running"
            # A copy: the worker appends to the lists it is given.
            blocks = block_ids[0].copy() if block_ids is not None else []
            traced.append(TracedRequest(request_id, start, end, kind, state, blocks))
        for new in output.scheduled_new_reqs:
            start = new.num_computed_tokens
            end = start + num_scheduled[new.req_id]
            kind = token_kind(start, end, len(new.prompt_token_ids))
            traced.append(TracedRequest(new.req_id, start, end, kind, "new", new.block_ids[0].copy()))
        return traced

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As the scheduler; completes the line of the oldest step in flight and writes it."""
        wall, cpu = time.perf_counter(), time.thread_time()
        line, launched, cpu_launched, ended = self._in_flight.popleft()
        self._events.append(("update", [line.step]))
        began, cpu_began = time.perf_counter(), time.thread_time()
        outputs = self.scheduler.update_from_output(scheduler_output, model_runner_output)
        line.ms["update"] = _milliseconds(time.perf_counter() - began)
        line.cpu_ms["update"] = _milliseconds(time.thread_time() - cpu_began)
        line.ms["execute"] = _milliseconds(wall - launched)
        line.cpu_ms["execute"] = _milliseconds(cpu - cpu_launched)
        step_times = model_runner_output.step_times
        if step_times is not None:
            for part in WORKER_PARTS:
                line.ms[part] = _milliseconds(step_times[f"{part}_ms"] * 1e-3)
                line.cpu_ms[part] = _milliseconds(step_times[f"{part}_cpu_ms"] * 1e-3)
        sampled = model_runner_output.sampled_token_ids
        if sampled:
            index = model_runner_output.req_id_to_index
            for request in line.requests:
                request.sampled = len(sampled[index[request.id]])
        for output in outputs[0].outputs:
            if output.finish_reason is not None:
                line.finished[output.request_id] = str(output.finish_reason)
        self._end_line(line, ended, scheduler_output)
        return outputs

    def _end_line(self, line: TracedStep, ended: set[str], scheduler_output: SchedulerOutput) -> None:
        """Fill in the state after the step, and write the line."""
        scheduled = scheduler_output.num_scheduled_tokens
        # The scheduler gave these up in schedule(), before any token: nobody aborted them.
        given_up = {request_id for request_id in line.finished if request_id not in scheduled}
        self._reported |= line.finished.keys() - given_up
        line.aborted = sorted(ended - given_up)
        line.num_running, line.num_waiting = self.scheduler.get_request_counts()
        line.num_free_blocks = self._pool.get_num_free_blocks()
        line.events, self._events = self._events, []
        self.writer.write(line)
        if not line.num_running and not line.num_waiting:
            self.writer.flush()  # nobody knows when the next step comes

    # ---- Everything else goes straight through ----

    def add_request(self, request: Request) -> None:
        """As the scheduler."""
        self.scheduler.add_request(request)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput:
        """As the scheduler."""
        return self.scheduler.get_grammar_bitmask(scheduler_output)

    def wait_for_grammar(self, timeout_s: float) -> None:
        """As the scheduler."""
        self.scheduler.wait_for_grammar(timeout_s)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[str]:
        """As the scheduler; what it frees stands in the next line."""
        return self.scheduler.finish_requests(request_ids, finished_status)

    def get_request_counts(self) -> tuple[int, int]:
        """As the scheduler."""
        return self.scheduler.get_request_counts()

    def get_num_unfinished_requests(self) -> int:
        """As the scheduler."""
        return self.scheduler.get_num_unfinished_requests()

    def has_finished_requests(self) -> bool:
        """As the scheduler."""
        return self.scheduler.has_finished_requests()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """As the scheduler; what it forgets stands in the next line."""
        return self.scheduler.reset_prefix_cache(reset_running_requests)

    def make_stats(self) -> SchedulerStats | None:
        """As the scheduler."""
        return self.scheduler.make_stats()

    def shutdown(self) -> None:
        """Close the file; steps still in flight, which never ended, are not in it."""
        self._pool.event_sink = None
        self.writer.close()
        self.scheduler.shutdown()


def _milliseconds(seconds: float) -> float:
    """Milliseconds with four decimals: below that a clock says nothing."""
    return round(seconds * 1e3, 4)


def _describe(scheduler: Scheduler) -> dict[str, Any]:
    """What a reader of the trace must know of the engine."""
    config = scheduler.scheduler_config
    return {
        "model": scheduler.vllm_config.model_config.model,
        "block_size": scheduler.block_size,
        "num_blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        "max_model_len": scheduler.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "long_prefill_token_threshold": config.long_prefill_token_threshold,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "enable_prefix_caching": scheduler.cache_config.enable_prefix_caching,
        "policy": config.policy,
        "async_scheduling": isinstance(scheduler, AsyncScheduler),
    }
