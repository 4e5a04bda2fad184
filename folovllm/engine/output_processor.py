"""OutputProcessor: what the core sends becomes what users see (vLLM: `v1/engine/output_processor.py`).

Per step and request: count and time, detokenize and look for stop strings, collect log probabilities, make a
RequestOutput if the request wants one now. It goes into the request's queue (a server's stream) or into the
returned list (LLM.generate). This is the only place that loops over a step's outputs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from folovllm.engine.detokenizer import IncrementalDetokenizer
from folovllm.engine.logprobs import LogprobsProcessor
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.metrics.stats import IterationStats, RequestStateStats
from folovllm.outputs import CompletionOutput, EngineCoreOutput, Logprob, RequestOutput
from folovllm.request import EngineCoreRequest, FinishReason
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector:
    """Hands one request's outputs from the engine to the coroutine that streams them.

    Holds at most one output: where the engine is ahead of the reader, outputs are merged. Not thread-safe:
    both sides run on one event loop.
    """

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        """`request_id`: internal id, for aborting when the reader goes away."""
        self.aggregate = output_kind == RequestOutputKind.DELTA
        self.request_id = request_id
        self.output: RequestOutput | Exception | None = None
        self.ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        """Add an output; or an exception, which replaces what is pending. Never blocks."""
        if isinstance(self.output, Exception):
            return
        if self.output is None or isinstance(output, Exception):
            self.output = output
            self.ready.set()
        else:
            self.output.add(output, aggregate=self.aggregate)

    async def get(self) -> RequestOutput:
        """Wait for an output and take it; raises the exception that was put instead."""
        while self.output is None:
            await self.ready.wait()
        output = self.get_nowait()
        assert output is not None
        return output

    def get_nowait(self) -> RequestOutput | None:
        """Take the pending output, None if there is none; raises the exception that was put instead."""
        output, self.output = self.output, None
        self.ready.clear()
        if isinstance(output, Exception):
            raise output
        return output


@dataclass
class OutputProcessorOutput:
    """What one step leaves for the engine's front to do."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    """Of requests without a queue, in the order the core sent them."""
    reqs_to_abort: list[str] = field(default_factory=list)
    """Internal ids that a stop string ended, of which the core does not know yet."""


class RequestState:
    """Everything between the core's tokens and the user's text, for one sample of one request."""

    def __init__(
        self,
        tokenizer: Any,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None,
        request_index: int,
        queue: RequestOutputCollector | None,
        log_stats: bool,
        stream_interval: int,
    ) -> None:
        params = request.sampling_params
        if not params.detokenize:
            tokenizer = None
        self.request_id = request.request_id
        self.external_req_id = request.external_req_id or request.request_id
        self.parent_req = parent_req
        self.request_index = request_index
        self.output_kind = params.output_kind
        self.prompt = prompt
        # A copy: users may change what they are given, and the core still reads its own.
        self.prompt_token_ids = list(request.prompt_token_ids or ())
        self.max_tokens_param = params.max_tokens
        self.queue = queue
        self.stream_interval = stream_interval
        self.detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self.logprobs_processor = LogprobsProcessor.from_new_request(tokenizer, request)
        self.stats = RequestStateStats(arrival_time=request.arrival_time) if log_stats else None
        self.is_prefilling = True
        """Whether no output token has come yet."""
        self.num_cached_tokens = 0
        self.sent_tokens_offset = 0
        """Output tokens that the last RequestOutput covered."""

    def make_request_output(
        self, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> RequestOutput | None:
        """Return what the client gets now; None where it is too early for this request's output kind."""
        finished = finish_reason is not None
        if not finished and not self._wants_output():
            return None
        completion = self._new_completion_output(finish_reason, stop_reason)
        self.sent_tokens_offset = self.detokenizer.num_output_tokens()
        outputs = [completion]
        if self.parent_req is not None:
            self._share_with_parent(self.parent_req)
            outputs, finished = self.parent_req.get_outputs(self.request_id, completion)
            if not outputs:
                return None
        return RequestOutput(
            request_id=self.external_req_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self._take_prompt_logprobs(),
            outputs=outputs,
            finished=finished,
            metrics=self.stats,
            num_cached_tokens=(self.parent_req or self).num_cached_tokens,
        )

    def _wants_output(self) -> bool:
        """Whether an unfinished request says something now: at its first token, then each stream_interval."""
        if self.output_kind == RequestOutputKind.FINAL_ONLY:
            return False
        num_new = self.detokenizer.num_output_tokens() - self.sent_tokens_offset
        return num_new >= (1 if self.sent_tokens_offset == 0 else self.stream_interval)

    def _new_completion_output(
        self, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> CompletionOutput:
        """Return text, tokens, log probabilities: all of them, or for DELTA those since the last output."""
        delta = self.output_kind == RequestOutputKind.DELTA
        start = self.sent_tokens_offset if delta else 0
        logprobs = self.logprobs_processor.logprobs
        return CompletionOutput(
            index=self.request_index,
            text=self.detokenizer.get_next_output_text(finish_reason is not None, delta),
            token_ids=self.detokenizer.output_token_ids[start:],
            cumulative_logprob=self.logprobs_processor.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[start:],
            finish_reason=None if finish_reason is None else str(finish_reason),
            stop_reason=stop_reason,
        )

    def _share_with_parent(self, parent: ParentRequest) -> None:
        """Give the parent what the first child found out about the prompt."""
        if self.request_index > 0:
            return
        parent.num_cached_tokens = self.num_cached_tokens
        if self.logprobs_processor.prompt_logprobs:
            parent.prompt_logprobs = self.logprobs_processor.pop_prompt_logprobs()

    def _take_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Return the prompt's log probabilities; in a DELTA stream only once, [] after that."""
        source = self.parent_req or self.logprobs_processor
        prompt_logprobs = source.prompt_logprobs
        if prompt_logprobs and self.output_kind == RequestOutputKind.DELTA:
            source.prompt_logprobs = []
        return prompt_logprobs


class OutputProcessor:
    """Holds a RequestState for every unfinished request; finished ones are forgotten."""

    def __init__(self, tokenizer: Any, log_stats: bool, stream_interval: int = 1) -> None:
        """Make a processor without requests.

        Args:
            tokenizer: None (no output has text) or a transformers tokenizer.
            log_stats: keep times and counts per request (RequestOutput.metrics).
            stream_interval: new tokens between two outputs of an unfinished request; the first token and the
                end are always told at once.

        Raises:
            ValueError: stream_interval is below 1.
        """
        if stream_interval < 1:
            raise ValueError(f"stream_interval={stream_interval} must be at least 1 (every token).")
        self.tokenizer = tokenizer
        self.log_stats = log_stats
        self.stream_interval = stream_interval
        self.request_states: dict[str, RequestState] = {}
        self.parent_requests: dict[str, ParentRequest] = {}
        self.external_req_ids: dict[str, list[str]] = {}
        """Client's id -> internal ids that it stands for."""

    def get_num_unfinished_requests(self) -> int:
        """Return the number of unfinished requests; each sample of n > 1 is one."""
        return len(self.request_states)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request is unfinished."""
        return bool(self.request_states)

    def check_ids_free(self, request_ids: list[str]) -> None:
        """Raise ValueError if an unfinished request has one of these internal ids."""
        for request_id in request_ids:
            if request_id in self.request_states:
                raise ValueError(
                    f"request_id={request_id!r} belongs to a request that is still running. "
                    "Give each request an id of its own, or wait for that one to finish."
                )

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt_text: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        """Expect outputs of a request.

        Args:
            request: the message that the core gets.
            prompt_text: shown in its outputs.
            parent_req: for n > 1, the request whose sample `request_index` this is.
            request_index: 0 to n - 1.
            queue: where its outputs go; None returns them from process_outputs.

        Raises:
            ValueError: an unfinished request has the same internal id.
        """
        self.check_ids_free([request.request_id])
        state = RequestState(
            self.tokenizer,
            request,
            prompt_text,
            parent_req,
            request_index,
            queue,
            self.log_stats,
            self.stream_interval,
        )
        self.request_states[request.request_id] = state
        self.external_req_ids.setdefault(state.external_req_id, []).append(request.request_id)
        if parent_req is not None:
            self.parent_requests[parent_req.request_id] = parent_req

    def add_client_request(
        self, request: EngineCoreRequest, prompt_text: str | None, queue: RequestOutputCollector | None = None
    ) -> list[EngineCoreRequest]:
        """Expect outputs of a client's request; return what the core must get: itself, or for n > 1 its n children.

        Args:
            request: from the Processor, not split yet.
            prompt_text: shown in its outputs.
            queue: see add_request.

        Raises:
            ValueError: an unfinished request has one of the internal ids; nothing was added.
        """
        if request.sampling_params.n == 1:
            self.add_request(request, prompt_text, queue=queue)
            return [request]
        parent = ParentRequest(request)
        children = parent.get_child_requests()
        # All or none: a refused child must not leave its siblings running.
        self.check_ids_free([child.request_id for child in children])
        for index, child in enumerate(children):
            self.add_request(child, prompt_text, parent, index, queue)
        return children

    def process_outputs(
        self,
        outputs: list[EngineCoreOutput],
        timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
    ) -> OutputProcessorOutput:
        """Turn one step's outputs into RequestOutputs; those of requests unknown here (aborted) are ignored.

        Args:
            outputs: what the core sent.
            timestamp: monotonic seconds at the end of the step; None means now.
            iteration_stats: filled where log_stats is on.
        """
        now = time.monotonic() if timestamp is None else timestamp
        result = OutputProcessorOutput()
        for output in outputs:
            state = self.request_states.get(output.request_id)
            if state is not None:
                self._process_output(state, output, now, iteration_stats, result)
        return result

    def _process_output(
        self,
        state: RequestState,
        output: EngineCoreOutput,
        timestamp: float,
        iteration_stats: IterationStats | None,
        result: OutputProcessorOutput,
    ) -> None:
        """Process one request's output of a step; append to `result`."""
        if iteration_stats is not None and state.stats is not None:
            if output.events is not None:
                iteration_stats.update_from_events(output.events, state.stats)
            iteration_stats.update_from_output(
                output, timestamp, state.is_prefilling, len(state.prompt_token_ids), state.stats
            )
        if state.is_prefilling:
            state.num_cached_tokens = output.num_cached_tokens
            state.is_prefilling = not output.new_token_ids
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        stop_string = state.detokenizer.update(output.new_token_ids, finish_reason == FinishReason.STOP)
        if stop_string is None and finish_reason is not None:
            stop_string = state.detokenizer.flush()
        if stop_string is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop_string
        state.logprobs_processor.update_from_output(output)

        if finish_reason == FinishReason.ERROR and state.queue is not None:
            state.queue.put(ValueError(str(stop_reason)))
            if state.parent_req is not None:
                state.parent_req.child_requests.discard(state.request_id)
        else:
            self._hand_out(state, state.make_request_output(finish_reason, stop_reason), result)
        if finish_reason is not None:
            self._forget(state)
            if not output.finished:
                result.reqs_to_abort.append(state.request_id)
            if iteration_stats is not None and state.stats is not None:
                self._count_finished(state, finish_reason, iteration_stats, state.stats)

    @staticmethod
    def _hand_out(state: RequestState, output: RequestOutput | None, result: OutputProcessorOutput) -> None:
        """Put an output into the request's queue, or where it has none into `result`."""
        if output is not None and state.queue is not None:
            state.queue.put(output)
        elif output is not None:
            result.request_outputs.append(output)

    def _count_finished(
        self, state: RequestState, reason: FinishReason, iteration: IterationStats, stats: RequestStateStats
    ) -> None:
        iteration.update_from_finished_request(
            finish_reason=reason,
            request_id=state.external_req_id,
            num_prompt_tokens=len(state.prompt_token_ids),
            max_tokens_param=state.max_tokens_param,
            req_stats=stats,
            num_cached_tokens=state.num_cached_tokens,
        )
        ParentRequest.observe_finished_request(state.parent_req, iteration, stats.num_generation_tokens)

    def abort_requests(
        self, ids: Iterable[str], internal: bool = False, iteration_stats: IterationStats | None = None
    ) -> list[str]:
        """Forget requests; return their internal ids, which the core must abort too. Unknown ids are ignored.

        Requests with a queue get a last output with finish_reason "abort"; others get none.

        Args:
            ids: ids of requests; one that stands for several (n > 1) ends them all.
            internal: whether they are internal ids (of children or parents) rather than the clients' own.
            iteration_stats: gets their summaries; None counts nothing.
        """
        internal_ids: list[str] = []
        for request_id in ids:
            if not internal:
                internal_ids.extend(self.external_req_ids.get(request_id, ()))
            elif request_id in self.parent_requests:
                internal_ids.extend(sorted(self.parent_requests[request_id].child_requests))
            else:
                internal_ids.append(request_id)
        aborted = []
        for request_id in internal_ids:
            state = self.request_states.get(request_id)
            if state is None:
                continue
            request_output = state.make_request_output(FinishReason.ABORT, None)
            if state.queue is not None and request_output is not None:
                state.queue.put(request_output)
            self._forget(state)
            if iteration_stats is not None and state.stats is not None:
                self._count_finished(state, FinishReason.ABORT, iteration_stats, state.stats)
            aborted.append(request_id)
        return aborted

    def fail_requests(
        self, request_ids: Iterable[str], error: Exception, iteration_stats: IterationStats | None = None
    ) -> None:
        """Forget requests, given by internal ids, and raise `error` in their readers. Unknown ids are ignored.

        `iteration_stats` gets their summaries, as ended by an error; None counts nothing.
        """
        for request_id in request_ids:
            state = self.request_states.get(request_id)
            if state is None:
                continue
            if state.queue is not None:
                state.queue.put(error)
            if state.parent_req is not None:
                state.parent_req.child_requests.discard(request_id)
            self._forget(state)
            if iteration_stats is not None and state.stats is not None:
                self._count_finished(state, FinishReason.ERROR, iteration_stats, state.stats)

    def propagate_error(self, error: Exception) -> None:
        """Raise `error` in every waiting reader: the engine cannot go on."""
        for state in self.request_states.values():
            if state.queue is not None:
                state.queue.put(error)

    def _forget(self, state: RequestState) -> None:
        """Drop a request from all maps; its parent with the last child."""
        del self.request_states[state.request_id]
        internal_ids = self.external_req_ids[state.external_req_id]
        internal_ids.remove(state.request_id)
        if not internal_ids:
            del self.external_req_ids[state.external_req_id]
        if state.parent_req is not None and not state.parent_req.child_requests:
            self.parent_requests.pop(state.parent_req.request_id, None)
