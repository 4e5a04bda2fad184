"""What all endpoints share: the engine, the bound on the queue, the life of a request (vLLM: `engine/serving.py`).

A handler checks its request, starts a `Run`, and builds an answer from the run's stream. A run that has been started is
closed, whatever happens: by the handler, or by the response once it has been sent or its client has left.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from folovllm.engine.processor import PromptType
from folovllm.engine.protocol import EngineClient, EngineDeadError
from folovllm.entrypoints.openai.chat_template import Renderer
from folovllm.entrypoints.openai.errors import APIError, BadRequestError, dead_engine_error, from_value_error
from folovllm.entrypoints.openai.protocol import GenerationRequest, StreamOptions
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.entrypoints.openai.sse import (
    EventStreamResponse,
    OutputStream,
    event,
    run_until_disconnect,
)
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import SamplingParams
from folovllm.utils.common import init_logger

logger = init_logger(__name__)

RETRY_AFTER_S = 1
"""What a client is told to wait when the queue is full: a request ends and makes room several times a second."""
MAX_LOGGED_PROMPT = 2000
"""Characters of a prompt that --log-requests writes."""


class OpenAIServing:
    """The state behind all endpoints. One event loop's."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        """`engine`: running; the launcher puts another in its place when it restarts one."""
        self.engine = engine
        self.settings = settings
        self.created = int(time.time())
        self.model_names = settings.served_model_name or [engine.vllm_config.model_config.model]
        self.max_model_len = engine.vllm_config.model_config.max_model_len
        self.renderer = Renderer(engine.tokenizer, settings.chat_template, settings.trust_request_chat_template)
        self.max_sequences = engine.vllm_config.scheduler_config.max_num_seqs + settings.max_queued_requests
        self.num_sequences = 0
        """Sequences (prompts times n) of the requests that are being answered."""
        # Of this process: the cache, which it guards, does not outlive it either.
        self._salt_key = secrets.token_bytes(32)

    def check_model(self, name: str | None) -> None:
        """Raise a 404 unless `name` is the served model's; None is."""
        if name is not None and name not in self.model_names:
            raise APIError(
                404,
                f"The model {name!r} does not exist; this server has {', '.join(self.model_names)}.",
                "model",
                "model_not_found",
            )

    async def start(
        self,
        raw: Request,
        request: GenerationRequest,
        prompts: Sequence[PromptType],
        params: SamplingParams,
        id_prefix: str,
        aliases: Mapping[str, str],
        is_admitted: bool = False,
    ) -> Run:
        """Queue `prompts`; return when each has its first output (all of it, unless it streams).

        Args:
            raw: the HTTP request.
            request: its body.
            prompts: text, token ids, or dicts of them.
            params: for all prompts.
            id_prefix: begins the id that the client sees.
            aliases: SamplingParams' names -> the request's, for errors.
            is_admitted: `admit` has counted it in already.

        Raises:
            APIError: the queue is full (429), a prompt or parameter cannot be (400), the engine is gone (503).
            ClientDisconnected: the client left; nothing runs any more.
        """
        num_sequences = len(prompts) * params.n
        if not is_admitted:
            self.admit(num_sequences)
        request_id = f"{id_prefix}-{uuid.uuid4().hex}"
        try:
            self._log_request(raw, request, request_id, prompts, params)
            names = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
            salted = [self._salted(prompt, request, raw) for prompt in prompts]
            generate, priority = self.engine.generate, request.priority or 0
            stream = OutputStream(
                [generate(prompt, params, name, priority=priority) for prompt, name in zip(salted, names, strict=True)]
            )
        except BaseException:
            self.release(num_sequences)
            raise
        run = Run(self, request_id, stream, num_sequences)
        try:
            await run_until_disconnect(raw.receive, stream.start())
        except ValueError as error:
            await run.close()
            raise from_value_error(error, type(request).model_fields, aliases) from error
        except BaseException:
            await run.close()
            raise
        return run

    def admit(self, num_sequences: int) -> None:
        """Count a request's sequences in, or refuse it: before anything is done for it that others wait for.

        Raises:
            APIError: there is no room for them now (429), or there never will be (400).
        """
        if num_sequences > self.max_sequences:
            raise BadRequestError(
                f"n: prompts x n = {num_sequences} sequences, and this server holds {self.max_sequences} at most. Send "
                "several requests.",
                "n",
            )
        if self.num_sequences + num_sequences > self.max_sequences:
            raise APIError(
                429,
                f"The queue is full ({self.num_sequences} sequences); try again later.",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.num_sequences += num_sequences

    def release(self, num_sequences: int) -> None:
        """Make room again; `start` and what it returns do so for their own."""
        self.num_sequences -= num_sequences

    def _salted(self, prompt: PromptType, request: GenerationRequest, raw: Request) -> PromptType:
        """Return `prompt` with the cache salt of its request, and of its API key under --isolate-prefix-cache."""
        salt = request.cache_salt
        if self.settings.isolate_prefix_cache:
            # No key holds a zero byte: keys and salts cannot run into each other.
            text = raw.state.api_key + (b"" if salt is None else b"\0" + salt.encode())
            salt = hmac.new(self._salt_key, text, hashlib.sha256).hexdigest()
        if salt is None:
            return prompt
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        if not isinstance(fields, Mapping):
            fields = {"prompt_token_ids": fields}
        return {**fields, "cache_salt": salt}

    def _log_request(
        self,
        raw: Request,
        request: GenerationRequest,
        request_id: str,
        prompts: Sequence[PromptType],
        params: SamplingParams,
    ) -> None:
        if not self.settings.log_requests:
            return
        labels = request.model_dump(include={"user", "safety_identifier"}, exclude_none=True)
        for prompt in prompts:
            text = repr(prompt.get("prompt", prompt) if isinstance(prompt, Mapping) else prompt)
            if len(text) > MAX_LOGGED_PROMPT:
                text = f"{text[:MAX_LOGGED_PROMPT]}... ({len(text) - MAX_LOGGED_PROMPT} more characters)"
            logger.info(
                "Request %s (X-Request-Id %s, %s): %s, %s", request_id, raw.state.request_id, labels, text, params
            )

    async def answer(
        self,
        run: Run,
        stream: bool,
        complete: Callable[[], dict[str, Any]],
        events: Callable[[], AsyncGenerator[bytes, None]],
    ) -> Response:
        """Return the response of a started run, which it closes.

        Args:
            run: from `start`.
            stream: which of the two.
            complete: () -> JSON object; called at once.
            events: () -> async generator of events.
        """
        if stream:
            return EventStreamResponse(self._ended_well(events()), run.close)
        try:
            return json_response(complete())
        finally:
            await run.close()

    async def _ended_well(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Pass events on; an error becomes the last one, and no [DONE] comes after it."""
        try:
            async for data in events:
                yield data
        except Exception as error:
            yield b"data: " + as_api_error(error).encode() + b"\n\n"
        finally:
            await events.aclose()


def as_api_error(error: Exception) -> APIError:
    """Return what a client may know of an error in the middle of a stream; what is our fault is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineDeadError):
        return dead_engine_error()
    if isinstance(error, ValueError):
        return BadRequestError(str(error))
    logger.error("A stream failed", exc_info=error)
    return APIError(500, "Internal server error.")


class Run:
    """One request in the engine."""

    def __init__(self, serving: OpenAIServing, request_id: str, stream: OutputStream, num_sequences: int) -> None:
        self.request_id = request_id
        self.stream = stream
        self.created = int(time.time())
        self._serving = serving
        self._num_sequences = num_sequences

    async def close(self) -> None:
        """End what still runs and make room in the queue; may be called again."""
        self._serving.release(self._num_sequences)
        self._num_sequences = 0
        await self.stream.aclose()


class ChunkWriter:
    """Writes the chunks of one stream: what all of them share is encoded once, a chunk costs microseconds."""

    def __init__(self, fields: Mapping[str, Any], options: StreamOptions | None, counter: UsageCounter) -> None:
        """`fields`: what comes before `choices`; `counter`: has counted what a chunk is written for."""
        self._fields = dict(fields)
        self.include_usage = include_usage = bool(options and options.include_usage)
        self._counter = counter if include_usage and options and options.continuous_usage_stats else None
        self._head = b"data: " + msgspec.json.encode(self._fields)[:-1] + b',"choices":['
        # With include_usage every chunk has the field, as OpenAI's have: null until the last one.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """Return the event of one choice's news."""
        tail = self._tail
        if self._counter is not None:
            tail = b'],"usage":' + self._encode(self._counter.usage()) + b"}\n\n"
        return b"".join((self._head, self._encode(choice), tail))

    def first_chunk(self, choice: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
        """Return the event of one choice's news with further fields beside `choices`."""
        usage = {"usage": self._counter and self._counter.usage()} if self.include_usage else {}
        return event({**self._fields, **extra, "choices": [choice], **usage})

    def usage(self, counts: Mapping[str, Any]) -> bytes:
        """Return the event with the token counts."""
        return event({**self._fields, "choices": [], "usage": counts})


class UsageCounter:
    """Counts the tokens of one request."""

    def __init__(self) -> None:
        self.num_completion_tokens = 0
        self._prompts: dict[int, tuple[int, int]] = {}

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count an output: a delta, or all there is."""
        self._prompts[prompt_index] = (len(output.prompt_token_ids or ()), output.num_cached_tokens or 0)
        for completion in output.outputs:
            self.num_completion_tokens += len(completion.token_ids)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's `usage`."""
        num_prompt_tokens = sum(prompt for prompt, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


def finish_reason(completion: CompletionOutput) -> str | None:
    """Return why a sample ended, in OpenAI's words; None while it goes on.

    Raises:
        APIError: the engine ended it before its time.
    """
    if completion.finish_reason in (None, "stop", "length"):
        return completion.finish_reason
    reason = completion.stop_reason if isinstance(completion.stop_reason, str) else "the server is shutting down"
    raise APIError(503, f"The request was ended: {reason}.", code="request_aborted")


def json_response(data: Any, status: int = 200) -> Response:
    """Return `data` as a JSON response."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")
