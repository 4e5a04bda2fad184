"""AsyncLLM: the engine for a server, which reads many streams on one event loop (vLLM: `v1/engine/async_llm.py`).

    generate()   prompt -> Processor -> EngineCoreRequest -> OutputProcessor (text state) and, as bytes, the core
    one task     the core's StepOutputs -> OutputProcessor -> one RequestOutputCollector per request -> generate()

The core runs in its own process (core_client.py, core_proc.py): while this one makes text, the device works. Nothing
here ever waits for a reader: what a slow one has not taken is merged in its collector.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from folovllm.config import VllmConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core_client import AsyncCoreClient, AsyncMPClient, AsyncThreadClient
from folovllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from folovllm.engine.processor import Processor, PromptType, check_fits
from folovllm.engine.protocol import EngineClient, EngineDeadError
from folovllm.engine.serial import (
    AbortRequests,
    AddRequests,
    EngineDead,
    FromCore,
    PrefixCacheReset,
    RequestsFailed,
    ResetPrefixCache,
    StepOutputs,
)
from folovllm.metrics.loggers import LoggingStatLogger, StatLoggerBase
from folovllm.metrics.stats import IterationStats, SchedulerStats
from folovllm.outputs import EngineCoreOutputs, RequestOutput
from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import SamplingParams
from folovllm.utils.common import init_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTPUT_CHUNK_SIZE = 64
"""Outputs of a step that are processed before other tasks get a turn: a millisecond or two (vLLM:
VLLM_V1_OUTPUT_PROC_CHUNK_SIZE)."""
MAX_STEPS_AT_ONCE = 8
"""Steps that are processed in one go where the engine is ahead: what they bring a stream is then one event of it."""
DRAIN_POLL_SECONDS = 0.02
"""How often shutdown looks whether the running requests have ended."""
LONG_PROMPT_CHARS = 4096
"""A text of this length or more is tokenized in a thread: about a millisecond."""
LONG_PROMPT_TOKENS = 16384
"""The same for token ids, which are only checked."""

logger = init_logger(__name__)


class AsyncLLM(EngineClient):
    """An engine whose requests are async generators. Belongs to the event loop of its first use."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        core_client: AsyncCoreClient,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: Mapping[str, Any],
        *,
        stat_loggers: Sequence[StatLoggerBase] = (),
        log_stats: bool = False,
        stream_interval: int = 1,
    ) -> None:
        """Compose an engine from parts; most callers want from_engine_args.

        Args:
            vllm_config: the checked configuration.
            core_client: a core that is ready.
            tokenizer: None runs on token ids alone.
            generation_config: the model's generation_config.json, {} without one.
            stat_loggers: get the statistics of every step, for which the core must have been started with log_stats.
            log_stats: log a line of statistics every ten seconds, like LLMEngine.
            stream_interval: new tokens between two outputs of a request; its first token and its end come at once.

        Raises:
            ValueError: stream_interval is below 1.
        """
        self.vllm_config = vllm_config
        self.core_client = core_client
        self.stat_loggers = list(stat_loggers)
        self._log_line = LoggingStatLogger() if log_stats else None
        self.processor = Processor(vllm_config, tokenizer, generation_config)
        self.output_processor = OutputProcessor(tokenizer, log_stats or bool(stat_loggers), stream_interval)
        self._tokenizer = tokenizer
        self._tokenizing_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._being_tokenized: set[str] = set()
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._death: str | None = None
        self._is_closing = False
        """No new requests."""
        self._is_shut_down = False
        """No running ones either, and no core."""
        self._deadline = math.inf
        # What follows belongs to one event loop: see _attach.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[StepOutputs | RequestsFailed] = deque()
        self._has_messages = asyncio.Event()
        self._dead, self._stopped = asyncio.Event(), asyncio.Event()
        self._output_task: asyncio.Task[None] | None = None

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        *,
        stat_loggers: Sequence[StatLoggerBase] = (),
        in_process: bool = False,
        stream_interval: int = 1,
    ) -> AsyncLLM:
        """Start the engine process, wait until the model is loaded, and log the start-up report.

        May be called before an event loop runs, or inside one, which then stands still until it returns.

        Args:
            engine_args: see EngineArgs; statistics are gathered unless disable_log_stats, or if there are
                stat_loggers.
            stat_loggers: get the statistics of every step, on the event loop.
            in_process: run the core in a thread of this process instead.
            stream_interval: see __init__.

        Raises:
            ValueError: anything that is wrong with the arguments or the model.
            RuntimeError: the engine process failed otherwise.
        """
        log_stats = not engine_args.disable_log_stats
        engine_args = dataclasses.replace(engine_args, disable_log_stats=not (log_stats or stat_loggers))
        source = engine_args.resolve_model_source()
        vllm_config = engine_args.create_engine_config(source)
        generation_config = source.generation_config()
        core_client = _start_thread(engine_args) if in_process else AsyncMPClient(engine_args)
        try:
            # While the other process loads its weights.
            tokenizer = None if engine_args.skip_tokenizer_init else source.tokenizer()
            if isinstance(core_client, AsyncMPClient):
                core_client.wait_ready()
            engine = cls(
                vllm_config,
                core_client,
                tokenizer,
                generation_config,
                stat_loggers=stat_loggers,
                log_stats=log_stats,
                stream_interval=stream_interval,
            )
        except BaseException:
            core_client.close()
            raise
        logger.info("%s", engine.startup_report)
        # As in EngineCore, which does it for its own process: collections pass over what stays.
        gc.collect()
        gc.freeze()
        return engine

    # ---- Requests ----

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient."""
        collector = await self._add_request(prompt, sampling_params, request_id, priority)
        try:
            while True:
                output = collector.get_nowait() or await collector.get()
                yield output
                if output.finished:
                    return
        finally:
            # Closed or cancelled early: nobody reads the rest. By identity: the id may be another request's by now.
            states = self.output_processor.request_states
            ids = self.output_processor.external_req_ids.get(request_id, ())
            self._abort([i for i in ids if states[i].queue is collector])

    async def _add_request(
        self, prompt: PromptType, params: SamplingParams, request_id: str, priority: int
    ) -> RequestOutputCollector:
        """Check, tokenize and queue a request; return where its outputs will come."""
        arrival_time = time.time()
        self._attach()
        self._check_running()
        if request_id in self._being_tokenized or request_id in self.output_processor.external_req_ids:
            raise ValueError(
                f"request_id={request_id!r} belongs to a request that is still running. "
                "Give each request an id of its own, or wait for that one to finish."
            )
        process = functools.partial(self.processor.process_inputs, request_id, prompt, params, arrival_time, priority)
        self._being_tokenized.add(request_id)
        try:
            # A schema is parsed too, and the first one imports xgrammar: more than a second.
            if _is_long(prompt) or getattr(params, "structured_outputs", None) is not None:
                text, request = await asyncio.get_running_loop().run_in_executor(self._tokenizing_thread, process)
            else:
                text, request = process()
        finally:
            self._being_tokenized.discard(request_id)
        check_fits(request, self.core_client.ready.num_blocks, self.vllm_config.cache_config.block_size)
        if self._death is not None or self._is_shut_down:  # meanwhile
            raise self.dead_error
        return self._queue(text, request)

    def _queue(self, prompt_text: str | None, request: EngineCoreRequest) -> RequestOutputCollector:
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        core_requests = self.output_processor.add_client_request(request, prompt_text, collector)
        try:
            self.core_client.send(AddRequests(core_requests))
        except ValueError as error:
            self.output_processor.fail_requests([r.request_id for r in core_requests], error)
            raise
        return collector

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """See EngineClient."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._attach()
        self._abort([i for external in ids for i in self.output_processor.external_req_ids.get(external, ())])

    def _abort(self, internal_ids: list[str]) -> None:
        """End requests here and in the core."""
        stats = IterationStats() if self.output_processor.log_stats else None
        aborted = self.output_processor.abort_requests(list(internal_ids), internal=True, iteration_stats=stats)
        if aborted and stats is not None:
            self._record(None, stats)
        if aborted and self._death is None and not self._is_shut_down:
            self.core_client.send(AbortRequests(aborted))

    # ---- What the core sends ----

    def _attach(self) -> None:
        """Receive the core's messages on the running event loop.

        Raises:
            RuntimeError: another event loop has them.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this AsyncLLM belongs to another event loop, which is not closed.")
        self._loop = loop
        self._has_messages, self._dead, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        if self._death is not None:
            self._dead.set()
        if self._is_shut_down:
            self._stopped.set()
            return
        self._output_task = loop.create_task(self._process_messages())
        self.core_client.attach(loop, self._on_message, self._die)

    def _on_message(self, message: FromCore) -> None:
        if isinstance(message, (StepOutputs, RequestsFailed)):
            self._inbox.append(message)
            self._has_messages.set()
        elif isinstance(message, PrefixCacheReset):
            call = self._calls.pop(message.call_id, None)
            if call is not None and not call.done():
                call.set_result(message.succeeded)
        elif isinstance(message, EngineDead):
            self._die(f"A step of the engine failed:\n{message.reason}")
        else:
            self._die(f"The engine sent {type(message).__name__} when it was running.")

    async def _process_messages(self) -> None:
        """Task: turn what the core sends into outputs, in order, for as long as the engine lives."""
        try:
            while True:
                await self._has_messages.wait()
                self._has_messages.clear()
                while self._inbox:
                    await self._process_some()
        except Exception as error:
            logger.exception("The outputs of a step could not be processed.")
            self._die(f"The outputs of a step could not be processed: {error!r}")

    async def _process_some(self) -> None:
        """Process the oldest message; or the oldest few at once, where the engine is ahead.

        Making text of a token takes less time than sending it, and an event of three tokens is sent as fast as one of a
        single token. So a front that falls behind catches up by sending fewer and longer events.
        """
        count = min(len(self._inbox), MAX_STEPS_AT_ONCE)
        for _ in range(count):
            message = self._inbox.popleft()
            if isinstance(message, StepOutputs):
                await self._process_step(message.outputs, gives_turns=count == 1)
            else:
                self._fail_requests(message)
        if count > 1:
            await asyncio.sleep(0)

    async def _process_step(self, step: EngineCoreOutputs, gives_turns: bool) -> None:
        """Process one step's outputs; with `gives_turns`, other tasks have theirs after every chunk."""
        has_stats = self.output_processor.log_stats
        iteration_stats = IterationStats() if has_stats else None
        for start in range(0, len(step.outputs), OUTPUT_CHUNK_SIZE):
            chunk = step.outputs[start : start + OUTPUT_CHUNK_SIZE]
            processed = self.output_processor.process_outputs(chunk, step.timestamp, iteration_stats)
            if processed.reqs_to_abort:
                # The core knows nothing of text: requests that met a stop string still run there.
                self.core_client.send(AbortRequests(processed.reqs_to_abort))
            if gives_turns:
                await asyncio.sleep(0)
        if has_stats and self._death is None:
            self._record(step.scheduler_stats, iteration_stats)

    def _record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        """Tell the loggers; one that fails is dropped, since requests matter more than their statistics."""
        for stat_logger in list(self.stat_loggers):
            try:
                stat_logger.record(scheduler_stats, iteration_stats)
            except Exception:
                logger.exception("%s fails and is not asked again.", type(stat_logger).__name__)
                self.stat_loggers.remove(stat_logger)
        if self._log_line is not None:
            self._log_line.record(scheduler_stats, iteration_stats)
            self._log_line.log_if_due()

    def _fail_requests(self, message: RequestsFailed) -> None:
        error: Exception
        if message.is_user_error:
            error = ValueError(message.message)
        else:
            logger.error("The engine could not queue %s:\n%s", message.request_ids, message.message)
            error = RuntimeError("the engine could not queue the request; its log has the reason.")
        self.output_processor.fail_requests(message.request_ids, error)

    # ---- Life and death ----

    def _die(self, reason: str) -> None:
        """Remember why the engine cannot go on, and raise EngineDeadError in everyone who waits for it."""
        if self._death is not None or self._is_shut_down:
            return
        self._death = reason
        logger.error("The engine is dead. %s", reason)
        stats = IterationStats() if self.output_processor.log_stats else None
        for request_id in list(self.output_processor.request_states):
            # One error object for each reader: raising it adds to its traceback.
            self.output_processor.fail_requests([request_id], self.dead_error, stats)
        if stats is not None:
            # No step will say so any more; the loggers may outlive this engine.
            self._record(SchedulerStats(), stats)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(self.dead_error)
        self._calls.clear()
        self._dead.set()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """See EngineClient."""
        return self._tokenizer

    @property
    def startup_report(self) -> str:
        """One block of text: model, dtype, backend and why, GiB of weights and KV cache, seconds per phase."""
        return self.core_client.ready.startup_report

    @property
    def errored(self) -> bool:
        """See EngineClient."""
        return self._death is not None

    @property
    def is_running(self) -> bool:
        """See EngineClient."""
        return self._death is None and not self._is_closing

    @property
    def dead_error(self) -> EngineDeadError:
        """See EngineClient."""
        return EngineDeadError(self._death or "The engine has been shut down.")

    def _check_running(self) -> None:
        if not self.is_running:
            raise self.dead_error

    async def check_health(self) -> None:
        """See EngineClient."""
        self._attach()
        self._check_running()

    async def wait_dead(self) -> None:
        """See EngineClient."""
        self._attach()
        await self._dead.wait()

    async def reset_prefix_cache(self) -> bool:
        """See EngineClient."""
        self._attach()
        self._check_running()
        call_id = next(self._call_ids)
        self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self.core_client.send(ResetPrefixCache(call_id))
            return await self._calls[call_id]
        finally:
            self._calls.pop(call_id, None)

    def get_default_sampling_params(self) -> SamplingParams:
        """See EngineClient."""
        return self.processor.get_default_sampling_params()

    def num_unfinished_requests(self) -> int:
        """See EngineClient."""
        return len(self.output_processor.external_req_ids) + len(self._being_tokenized)

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """See EngineClient. A second call may shorten the first one's time, and returns with it."""
        self._attach()
        self._deadline = min(self._deadline, time.monotonic() + timeout_s)
        if self._is_closing:
            await self._stopped.wait()
            return
        self._is_closing = True
        while self._death is None and self.num_unfinished_requests() and time.monotonic() < self._deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        self._abort(list(self.output_processor.request_states))
        self._is_shut_down = True
        try:
            await self.core_client.shutdown()
        finally:
            self.core_client.close()
            self._tokenizing_thread.shutdown(wait=False)
            if self._output_task is not None:
                self._output_task.cancel()
            for call in self._calls.values():
                call.cancel()
            gc.unfreeze()
            self._stopped.set()


def _start_thread(engine_args: EngineArgs) -> AsyncThreadClient:
    from folovllm.engine.core_proc import start_core

    return AsyncThreadClient(*start_core(engine_args))


def _is_long(prompt: PromptType) -> bool:
    """Whether checking the prompt may take so long that other requests should go on meanwhile."""
    if isinstance(prompt, Mapping):
        token_ids = prompt.get("prompt_token_ids")
        prompt = prompt.get("prompt", "") if token_ids is None else token_ids
    try:
        return len(prompt) >= (LONG_PROMPT_CHARS if isinstance(prompt, str) else LONG_PROMPT_TOKENS)
    except TypeError:
        return False  # no prompt at all: the Processor says so
