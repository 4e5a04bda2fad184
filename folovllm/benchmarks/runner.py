"""Runs a workload on an engine and writes down when each output came; figures are metrics.py's business.

The engine's own loop is used, add_request and step, so that a clock can be read after every step. vLLM's LLMEngine has
the same two methods: peers.py drives it with this code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from folovllm.benchmarks.schema import RequestRecord, WorkloadRecord
from folovllm.benchmarks.workload import BenchRequest, Workload

if TYPE_CHECKING:
    from folovllm.engine.llm_engine import LLMEngine

ParamsFactory = Callable[[int], Any]
"""max_tokens -> the engine's SamplingParams: greedy, past any end-of-sequence, outputs as deltas."""


def greedy_params(max_tokens: int, detokenize: bool = False) -> Any:
    """Return FoloVLLM's SamplingParams for a benchmark: exactly `max_tokens` greedy tokens, as they come."""
    from folovllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=detokenize,
        output_kind=RequestOutputKind.DELTA,
    )


class WorkloadRun:
    """One workload on one engine: queues requests when their condition is met, and records what comes."""

    def __init__(self, engine: Any, workload: Workload, make_params: ParamsFactory) -> None:
        """`engine` has add_request, step and has_unfinished_requests; it must be idle."""
        self.engine = engine
        self.make_params = make_params
        self.records: list[RequestRecord] = []
        self._by_id: dict[str, RequestRecord] = {}
        self._prompts: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self._max_tokens = {request.id: request.max_tokens for request in workload.requests}
        self._followers: dict[str, list[BenchRequest]] = {}
        self._at_start: list[BenchRequest] = []
        for request in workload.requests:
            if request.after is None:
                self._at_start.append(request)
            else:
                self._followers.setdefault(request.after, []).append(request)

    def run(self) -> list[RequestRecord]:
        """Run to the end; return the records in order of arrival.

        Raises:
            RuntimeError: a request got more or fewer tokens than it asked for.
        """
        for request in self._at_start:
            self._queue(request)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                self._record(output, now)
            for output in outputs:
                self._queue_followers(output.request_id)
        for record in self.records:
            got, asked = len(self._outputs[record.id]), self._max_tokens[record.id]
            if got != asked:
                raise RuntimeError(f"request {record.id!r} got {got} tokens instead of {asked}.")
        return self.records

    def _queue(self, request: BenchRequest) -> None:
        prompt = list(request.token_ids)
        if request.continues and request.after is not None:
            prompt = self._prompts[request.after] + self._outputs[request.after] + prompt
        self._prompts[request.id], self._outputs[request.id] = prompt, []
        record = RequestRecord(request.id, request.group, time.perf_counter(), len(prompt))
        self.records.append(record)
        self._by_id[request.id] = record
        self.engine.add_request(request.id, {"prompt_token_ids": prompt}, self.make_params(request.max_tokens))

    def _record(self, output: Any, now: float) -> None:
        record, sample = self._by_id[output.request_id], output.outputs[0]
        if sample.token_ids:
            record.outputs.append((now, len(sample.token_ids)))
            self._outputs[record.id].extend(sample.token_ids)
        if output.num_cached_tokens is not None:
            record.num_cached_tokens = output.num_cached_tokens
        record.finish_reason = sample.finish_reason

    def _queue_followers(self, request_id: str) -> None:
        waiting = self._followers.get(request_id, [])
        written = len(self._outputs[request_id])
        finished = self._by_id[request_id].finish_reason is not None
        for request in [r for r in waiting if written >= r.after_tokens and (finished or not r.continues)]:
            waiting.remove(request)
            self._queue(request)


class DeviceClock:
    """CUDA: milliseconds of each step on the device, from events around the runner's launches. Elsewhere: nothing.

    The first event stands before the copy of the step's inputs, which is the step's first work on the device: on an
    idle device it would otherwise time the host, which prepares them. Waits for the next launch count.
    """

    def __init__(self, engine: LLMEngine) -> None:
        """Wrap the model runner's execute_model, and the copy of its inputs."""
        self._events: list[tuple[Any, Any]] = []
        self._begin: Any = None
        runner: Any = engine.executor.worker.model_runner  # type: ignore[attr-defined]
        if runner.device.type == "cuda":
            runner.execute_model = self._timed(runner.execute_model)
            if hasattr(runner, "inputs"):  # not without Triton
                runner.inputs.send = self._begun(runner.inputs.send)

    def _begun(self, send: Callable[[], None]) -> Callable[[], None]:
        def begun() -> None:
            self._begin = self._mark()
            send()

        return begun

    def _timed(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        def timed(scheduler_output: Any, *args: Any) -> Any:
            self._begin = self._mark()
            pending = execute(scheduler_output, *args)
            if scheduler_output.total_num_scheduled_tokens:
                self._events.append((self._begin, self._mark()))
            return pending

        return timed

    @staticmethod
    def _mark() -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> list[float]:
        """Return milliseconds per step that computed tokens since the last call; waits for the device."""
        if not self._events:
            return []
        import torch

        torch.cuda.synchronize()
        events, self._events = self._events, []
        return [begin.elapsed_time(end) for begin, end in events]


class TraceReader:
    """Reads the engine's step trace while the engine still writes it."""

    def __init__(self, engine: LLMEngine) -> None:
        """The engine must have been started with step_trace_path."""
        path = engine.vllm_config.observability_config.step_trace_path
        assert path is not None
        self._path = Path(path)
        self._scheduler: Any = engine.engine_core.engine_core.scheduler
        self._offset = 0
        self.config: dict[str, Any] = {}

    def take(self) -> list[dict[str, Any]]:
        """Return the steps written since the last call."""
        self._scheduler.writer.flush()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        lines = [msgspec.json.decode(line) for line in data.splitlines()]
        if lines and "schema" in lines[0]:
            self.config = lines.pop(0)["config"]
        return lines


class EngineUnderTest:
    """An LLMEngine with everything that watches it."""

    def __init__(self, engine: LLMEngine) -> None:
        """The engine must have been started with step_trace_path."""
        self.engine = engine
        self._trace = TraceReader(engine)
        self._clock = DeviceClock(engine)

    def run(self, workload: Workload, make_params: ParamsFactory = greedy_params) -> WorkloadRecord:
        """Run a workload with an empty prefix cache and return what happened."""
        self.reset()
        self._trace.take()
        self._clock.take()
        offset = time.time() - time.perf_counter()
        requests = WorkloadRun(self.engine, workload, make_params).run()
        steps = self._trace.take()
        return WorkloadRecord(workload.name, requests, steps, self._trace.config, offset, self._clock.take())

    def reset(self) -> None:
        """Forget what earlier prompts left in the prefix cache."""
        while not self.engine.reset_prefix_cache():
            self.engine.step()  # an ended request still holds its blocks
