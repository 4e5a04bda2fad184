"""POST /v1/chat/completions: a conversation in, its next message out.

vLLM's file is `entrypoints/openai/chat_completion/serving.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from folovllm.entrypoints.openai.errors import BadRequestError, from_value_error
from folovllm.entrypoints.openai.logprobs import chat_logprobs, prompt_logprobs
from folovllm.entrypoints.openai.params import aliases, chat_params, check_size
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, ResponseFormatText
from folovllm.entrypoints.openai.serving import ChunkWriter, OpenAIServing, Run, UsageCounter, finish_reason
from folovllm.entrypoints.openai.sse import DONE
from folovllm.entrypoints.openai.tool_calls import (
    ToolMode,
    ToolParser,
    delta_fields,
    forced_schema,
    make_parser,
    parse_complete,
    tool_mode,
)
from folovllm.entrypoints.openai.tool_parsers import ToolDelta
from folovllm.outputs import CompletionOutput, RequestOutput


class OpenAIServingChat:
    """The endpoint."""

    def __init__(self, serving: OpenAIServing) -> None:
        self.serving = serving

    async def create_chat_completion(self, request: ChatCompletionRequest, raw: Request) -> Response:
        """Answer a request; see OpenAIServing.start for what it raises."""
        self.serving.check_model(request.model)
        mode = tool_mode(request)
        if request.tools:
            check_size("tools", [tool.model_dump(exclude_none=True) for tool in request.tools], self.serving.settings)
            self._check_auto(request, mode)
        defaults = self.serving.engine.get_default_sampling_params()
        try:
            params = chat_params(request, defaults, self.serving.settings, forced_schema(request, mode))
        except ValueError as error:
            raise from_value_error(error, type(request).model_fields, aliases(request)) from error
        self.serving.admit(params.n)  # templates are rendered one after the other: a burst must not wait there
        try:
            prompt = await self.serving.renderer.render_chat(request, show_tools=mode != "none")
        except BaseException:
            self.serving.release(params.n)
            raise
        run = await self.serving.start(raw, request, [prompt], params, "chatcmpl", aliases(request), is_admitted=True)
        answer = _Answer(request, run, self.serving.model_names[0], params.n, mode)
        return await self.serving.answer(run, bool(request.stream), answer.complete, answer.events)

    def _check_auto(self, request: ChatCompletionRequest, mode: ToolMode) -> None:
        """Refuse tools that the model, left to itself, could not call."""
        if mode != "auto":
            return
        if not self.serving.renderer.takes_tools(request):
            raise BadRequestError(
                "tools: this model's chat template does not show them to the model. Force a call with tool_choice, "
                "or serve a model that was trained to call tools.",
                "tools",
            )
        for name in ("response_format", "structured_outputs"):
            value = getattr(request, name)
            if value is not None and not isinstance(value, ResponseFormatText):
                raise BadRequestError(
                    f"{name} leaves no room for tool calls: set tool_choice to 'none', or leave {name} out.", name
                )


class _Answer:
    """Builds one answer, whole or in chunks."""

    def __init__(self, request: ChatCompletionRequest, run: Run, model: str, n: int, mode: ToolMode) -> None:
        self.request = request
        self.run = run
        self.n = n
        self.model = model
        self.usage = UsageCounter()
        self.parsers: list[ToolParser | None] = [make_parser(request, mode) for _ in range(n)]
        self.has_calls = [False] * n
        # As OpenAI and vLLM have it: a call that the client itself named is no news to it.
        self.calls_reason = "stop" if mode == "named" else "tool_calls"

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.run.request_id, "object": kind, "created": self.run.created, "model": self.model}

    def complete(self) -> dict[str, Any]:
        """Return the whole answer; the run's first output is final."""
        (output,) = self.run.stream.first
        self.usage.add(0, output)
        answer: dict[str, Any] = self._fields("chat.completion")
        answer |= {"choices": [self._choice(item) for item in output.outputs], "usage": self.usage.usage()}
        return answer | self._about_prompt(output)

    def _choice(self, item: CompletionOutput) -> dict[str, Any]:
        """Return one complete choice."""
        reason = finish_reason(item)
        message: dict[str, Any] = {"role": "assistant", "content": item.text, "refusal": None}
        parser = self.parsers[item.index]
        if parser is not None:
            message["content"], calls = parse_complete(parser, item.text)
            if calls:
                message["tool_calls"] = calls
                reason = self.calls_reason if reason == "stop" else reason
        choice = {
            "index": item.index,
            "message": message,
            "logprobs": self._logprobs(item),
            "finish_reason": reason,
            "stop_reason": item.stop_reason,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = list(item.token_ids)
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer in chunks: per choice its role, its pieces, its finish_reason; then usage."""
        writer = ChunkWriter(self._fields("chat.completion.chunk"), self.request.stream_options, self.usage)
        begun = told = False
        async for _, output in self.run.stream:
            self.usage.add(0, output)
            data: list[bytes] = []
            # Usually with the first output, but a sample may overtake the one that brings the log probabilities.
            about = {} if told else self._about_prompt(output)
            told = told or bool(output.prompt_logprobs)
            if not begun:
                begun = True
                data = [writer.chunk(_start(index)) for index in range(self.n)]
                if about:
                    data[0] = writer.first_chunk(_start(0), about)
            elif output.prompt_logprobs and about:
                data.append(writer.first_chunk(_piece(0, {}), about))
            for item in output.outputs:
                data += [writer.chunk(choice) for choice in self._news(item)]
            if data:
                yield b"".join(data)
        if writer.include_usage:
            yield writer.usage(self.usage.usage())
        yield DONE

    def _about_prompt(self, output: RequestOutput) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self.request.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.request.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        return about

    def _news(self, item: CompletionOutput) -> list[dict[str, Any]]:
        """Return what is new of a choice, one entry per chunk; log probabilities go with the first of them."""
        index = item.index
        reason = finish_reason(item)
        parser = self.parsers[index]
        deltas: list[dict[str, Any]]
        if parser is None:
            deltas = [{"content": item.text}] if item.text else []
        else:
            pieces: list[ToolDelta] = parser.feed(item.text)
            if reason is not None:
                pieces = [*pieces, *parser.finish()]
            self.has_calls[index] |= any(piece.index is not None for piece in pieces)
            deltas = [delta_fields(piece) for piece in pieces]
        logprobs = self._logprobs(item)
        shows_tokens = bool(self.request.return_token_ids)
        if not deltas and item.token_ids and (logprobs is not None or shows_tokens):
            deltas = [{}]
        news: list[dict[str, Any]] = []
        for delta in deltas:
            choice = _piece(index, delta) | {"logprobs": logprobs}
            if shows_tokens:
                choice["token_ids"] = [] if news else list(item.token_ids)
            logprobs = None
            news.append(choice)
        if reason is not None:
            reason = self.calls_reason if reason == "stop" and self.has_calls[index] else reason
            news.append(_piece(index, {}) | {"finish_reason": reason, "stop_reason": item.stop_reason})
        return news

    def _logprobs(self, item: CompletionOutput) -> dict[str, Any] | None:
        """Return the log probabilities of a choice's (new) tokens, where they were asked for."""
        return None if item.logprobs is None else chat_logprobs(item.logprobs, self.request.top_logprobs or 0)


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    """Return a streamed choice that has not ended."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _start(index: int) -> dict[str, Any]:
    """Return the first piece of a streamed choice."""
    return _piece(index, {"role": "assistant", "content": ""})
