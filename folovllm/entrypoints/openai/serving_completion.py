"""POST /v1/completions: text or tokens in, a continuation out (vLLM: `entrypoints/openai/completion/serving.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response

from folovllm.engine.processor import PromptType
from folovllm.entrypoints.openai.errors import BadRequestError, from_value_error
from folovllm.entrypoints.openai.logprobs import completion_logprobs, joined, prompt_logprobs, with_first
from folovllm.entrypoints.openai.params import aliases, completion_params
from folovllm.entrypoints.openai.protocol import CompletionRequest
from folovllm.entrypoints.openai.serving import ChunkWriter, OpenAIServing, Run, UsageCounter, finish_reason
from folovllm.entrypoints.openai.sse import DONE
from folovllm.outputs import CompletionOutput, Logprob, RequestOutput


class OpenAIServingCompletion:
    """The endpoint. A request's prompts run together; choice p * n + i is sample i of prompt p."""

    def __init__(self, serving: OpenAIServing) -> None:
        self.serving = serving

    async def create_completion(self, request: CompletionRequest, raw: Request) -> Response:
        """Answer a request; see OpenAIServing.start for what it raises."""
        self.serving.check_model(request.model)
        prompts = self._prompts(request)
        settings = self.serving.settings
        try:
            params = completion_params(request, self.serving.engine.get_default_sampling_params(), settings)
        except ValueError as error:
            raise from_value_error(error, type(request).model_fields, aliases(request)) from error
        run = await self.serving.start(raw, request, prompts, params, "cmpl", aliases(request))
        try:
            answer = _Answer(request, run, self.serving.model_names[0], params.n)
            if request.echo:
                await answer.read_prompts(self.serving)
        except BaseException:
            await run.close()
            raise
        return await self.serving.answer(run, bool(request.stream), answer.complete, answer.events)

    def _prompts(self, request: CompletionRequest) -> list[PromptType]:
        """Return the request's prompts as a list; refuse none, and too many."""
        prompt = request.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise BadRequestError("prompt is empty: it must have at least one token.", "prompt")
        if isinstance(prompt[0], int):
            return [cast("PromptType", {"prompt_token_ids": prompt})]
        if len(prompt) > self.serving.settings.max_prompts:
            raise BadRequestError(
                f"prompt has {len(prompt)} prompts; at most {self.serving.settings.max_prompts} are allowed on this "
                "server.",
                "prompt",
            )
        return [item if isinstance(item, str) else {"prompt_token_ids": item} for item in cast("list[Any]", prompt)]


class _Answer:
    """Builds one answer, whole or in chunks."""

    def __init__(self, request: CompletionRequest, run: Run, model: str, n: int) -> None:
        self.request = request
        self.run = run
        self.n = n
        self.fields = {"id": run.request_id, "object": "text_completion", "created": run.created, "model": model}
        self.usage = UsageCounter()
        # Under echo: per prompt its text and its first token's.
        self.prompt_texts: list[tuple[str, str]] = []
        # Per prompt, once they have come: a stream brings them with one output only.
        self.prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}
        # Per choice of a stream: where its next token's text begins; a choice not in it has sent nothing. Not how much
        # text was sent: what may become a stop string is held back, while its tokens' log probabilities are not.
        self.offsets: dict[int, int] = {}

    async def read_prompts(self, serving: OpenAIServing) -> None:
        """Get what echo needs: the prompts' texts."""
        for output in self.run.stream.first:
            ids = output.prompt_token_ids or []
            first = await serving.renderer.decode(ids[:1]) if self.request.logprobs is not None else ""
            text = output.prompt if output.prompt is not None else await serving.renderer.decode(ids)
            self.prompt_texts.append((text, first))

    def complete(self) -> dict[str, Any]:
        """Return the whole answer; the run's first outputs are final."""
        choices = []
        for prompt_index, output in enumerate(self.run.stream.first):
            self._take(prompt_index, output)
            choices += [self._choice(prompt_index, output, item) for item in output.outputs]
        return {**self.fields, "choices": choices, "usage": self.usage.usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer in chunks."""
        writer = ChunkWriter(self.fields, self.request.stream_options, self.usage)
        waiting: dict[int, list[RequestOutput]] = {}
        async for prompt_index, output in self.run.stream:
            self._take(prompt_index, output)
            outputs = [output]
            if self._lacks_prompt_logprobs(prompt_index):
                waiting.setdefault(prompt_index, []).append(output)
                continue
            if waiting:
                outputs = [*waiting.pop(prompt_index, ()), output]
            data = [
                writer.chunk(self._choice(prompt_index, some, item))
                for some in outputs
                for item in some.outputs
                if item.text
                or item.finish_reason is not None
                or (item.token_ids and self._shows_tokens())
                or (prompt_index * self.n + item.index not in self.offsets and self.request.echo)
            ]
            if data:
                yield b"".join(data)
        if writer.include_usage:
            yield writer.usage(self.usage.usage())
        yield DONE

    def _take(self, prompt_index: int, output: RequestOutput) -> None:
        """Count an output, keep the prompt's log probabilities, drop the token that max_tokens=0 did not ask for."""
        if output.prompt_logprobs:
            self.prompt_logprobs.setdefault(prompt_index, output.prompt_logprobs)
        if self.request.max_tokens == 0:
            for item in output.outputs:
                item.text, item.token_ids, item.logprobs = "", [], None if item.logprobs is None else []
                item.finish_reason, item.stop_reason = item.finish_reason and "length", None
        self.usage.add(prompt_index, output)

    def _lacks_prompt_logprobs(self, prompt_index: int) -> bool:
        """Whether the first chunk needs log probabilities that are still to come: samples may overtake them."""
        wanted = self.request.prompt_logprobs is not None or bool(
            self.request.echo and self.request.logprobs is not None
        )
        return wanted and prompt_index not in self.prompt_logprobs

    def _shows_tokens(self) -> bool:
        """Whether a chunk says something even where its tokens have no text yet."""
        return self.request.logprobs is not None or bool(self.request.return_token_ids)

    def _choice(self, prompt_index: int, output: RequestOutput, item: CompletionOutput) -> dict[str, Any]:
        """Return one choice, or what is new of it."""
        index = prompt_index * self.n + item.index
        is_first = index not in self.offsets
        offset = self.offsets.get(index, 0)
        text, logprobs = item.text, None
        if is_first and self.request.echo:
            text = self.prompt_texts[prompt_index][0] + text
            offset = len(self.prompt_texts[prompt_index][0])
        if item.logprobs is not None:
            logprobs = completion_logprobs(item.logprobs, self.request.logprobs or 0, offset)
            offset += sum(len(token) for token in logprobs["tokens"])
            if is_first and self.request.echo:
                logprobs = joined(self._prompt_shape(prompt_index), logprobs)
        self.offsets[index] = offset
        reason = finish_reason(item)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = item.stop_reason
        if is_first and self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self.prompt_logprobs.get(prompt_index))
        if self.request.return_token_ids:
            choice["token_ids"] = list(item.token_ids)
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _prompt_shape(self, prompt_index: int) -> dict[str, Any]:
        """Return the log probabilities of a prompt in the completion's shape, for echo.

        What the tokenizer put before the text is among the tokens, but has no characters in the text.
        """
        text, first_token = self.prompt_texts[prompt_index]
        positions = [item for item in self.prompt_logprobs.get(prompt_index, [])[1:] if item is not None]
        shape = with_first(first_token, completion_logprobs(positions, self.request.logprobs or 0, len(first_token)))
        # What comes too much is at the front.
        excess = sum(len(token) for token in shape["tokens"]) - len(text)
        shape["text_offset"] = [max(0, offset - excess) for offset in shape["text_offset"]]
        return shape
