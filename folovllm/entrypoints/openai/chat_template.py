"""Text work of the server: conversations to prompts, text to tokens and back (vLLM: `entrypoints/chat_utils.py`).

All of it happens in one thread of its own, on its own copy of the tokenizer: a long prompt must not hold up the streams
of others, and a tokenizer must not be used by two threads at once.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.defaults import DEFAULT_NAMESPACE

from folovllm.engine.processor import PromptType
from folovllm.entrypoints.openai.errors import BadRequestError
from folovllm.entrypoints.openai.protocol import AssistantMessage, TemplateFields

T = TypeVar("T")


class Renderer:
    """Renders and tokenizes for one model."""

    def __init__(self, tokenizer: Any, chat_template: str | None, trust_request_chat_template: bool) -> None:
        """`tokenizer`: None for an engine without; `chat_template`: in place of the tokenizer's."""
        self.tokenizer = copy.deepcopy(tokenizer)
        self.chat_template: str | None = chat_template or getattr(tokenizer, "chat_template", None)
        self.trust_request_chat_template = trust_request_chat_template
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="folovllm-text")
        self._variables: dict[str, frozenset[str]] = {}

    def close(self) -> None:
        """End the thread; what it does at the moment it finishes."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def render_chat(self, request: TemplateFields, show_tools: bool) -> PromptType:
        """Return the prompt of a conversation: its text and its tokens.

        Args:
            request: messages and how to write them.
            show_tools: whether the template gets `tools`.

        Raises:
            BadRequestError: the template refuses the conversation, or the request asks for what it does not have.
        """
        return await self._run(lambda: self._render_chat(request, show_tools))

    async def encode(self, text: str, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Return the tokens of `text`; BadRequestError if it is no valid Unicode."""
        return await self._run(lambda: self._encode(text, add_special_tokens, param))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included.

        Raises:
            BadRequestError: there is no such token.
        """
        return await self._run(lambda: self._decode(token_ids))

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return every token as the vocabulary writes it."""
        return await self._run(lambda: list(self.tokenizer.convert_ids_to_tokens(list(token_ids))))

    async def _run(self, work: Callable[[], T]) -> T:
        if self.tokenizer is None:
            raise BadRequestError(
                "The engine runs without a tokenizer (skip_tokenizer_init): only /v1/completions with token ids works."
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f"{param} is no valid Unicode: {error.reason}.", param) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _decode(self, token_ids: Sequence[int]) -> str:
        limit = len(self.tokenizer)
        for i, token_id in enumerate(token_ids):
            if token_id >= limit:
                raise BadRequestError(f"tokens[{i}]={token_id} is outside the vocabulary: [0, {limit - 1}].", "tokens")
        return str(self.tokenizer.decode(list(token_ids)))

    def _render_chat(self, request: TemplateFields, show_tools: bool) -> PromptType:
        template = self._choose_template(request)
        kwargs = self._template_kwargs(request, template, show_tools)
        continue_final = bool(request.continue_final_message)
        if continue_final and request.add_generation_prompt:
            raise BadRequestError(
                "add_generation_prompt=true begins a new answer, continue_final_message=true goes on with the last "
                "message: ask for one of them.",
                "add_generation_prompt",
            )
        messages = [to_template_message(message, i) for i, message in enumerate(request.messages)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=not continue_final and request.add_generation_prompt is not False,
                continue_final_message=continue_final,
                tokenize=False,
                **kwargs,
            )
        except Exception as error:  # templates raise what they like
            param = "chat_template" if request.chat_template is not None else "messages"
            raise BadRequestError(f"{param}: the chat template refused them: {error}", param) from error
        # The template writes special tokens itself; a second BOS would be wrong.
        special = bool(getattr(request, "add_special_tokens", None))
        return {"prompt_token_ids": self._encode(text, special, "messages"), "prompt": text}

    def _choose_template(self, request: TemplateFields) -> str:
        if request.chat_template is not None:
            if not self.trust_request_chat_template:
                raise BadRequestError(
                    "chat_template: this server takes no templates from requests (--trust-request-chat-template).",
                    "chat_template",
                )
            return request.chat_template
        if self.chat_template is None:
            raise BadRequestError(
                "messages: this model has no chat template. Use /v1/completions, or start the server with "
                "--chat-template.",
                "messages",
            )
        return self.chat_template

    def _template_kwargs(self, request: TemplateFields, template: str, show_tools: bool) -> dict[str, Any]:
        """Return the template's further variables; refuse those that it does not have: they would be ignored."""
        kwargs = dict(request.chat_template_kwargs or {})
        known = self._template_variables(template, "chat_template" if request.chat_template else "messages")
        for name in kwargs:
            if name in _RESERVED:
                raise BadRequestError(
                    f"chat_template_kwargs: {name!r} is set by the server, not by requests.", "chat_template_kwargs"
                )
            if name not in known:
                others = ", ".join(sorted(known - _RESERVED)) or "none"
                raise BadRequestError(
                    f"chat_template_kwargs: {name!r} is no variable of the chat template. Others that it reads: "
                    f"{others}.",
                    "chat_template_kwargs",
                )
        if request.tools and show_tools:
            kwargs["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        return kwargs

    def takes_tools(self, request: TemplateFields) -> bool:
        """Whether the template that `request` will be written with shows tools to the model."""
        template = request.chat_template if self.trust_request_chat_template else None
        return "tools" in self._template_variables(template or self.chat_template or "", "chat_template")

    def _template_variables(self, template: str, param: str) -> frozenset[str]:
        """Return the names that the template reads and does not set itself."""
        if template not in self._variables:
            try:
                environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
                names = jinja2.meta.find_undeclared_variables(environment.parse(template)) - set(DEFAULT_NAMESPACE)
            except (jinja2.TemplateError, RecursionError) as error:
                raise BadRequestError(f"{param}: the chat template is no valid Jinja: {error}", param) from error
            if len(self._variables) > 64:  # templates of requests: no memory of them for ever
                self._variables.clear()
            self._variables[template] = frozenset(names)
        return self._variables[template]


class _GenerationTag(jinja2.ext.Extension):
    """Transformers' `{% generation %}` block, which marks the assistant's tokens; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        """Return the block's content; see jinja2.ext.Extension."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _reserved_names() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(parameters) | {"messages", "conversation", "tools", "raise_exception", "strftime_now"}


_RESERVED = _reserved_names()


def to_template_message(message: Any, index: int) -> dict[str, Any]:
    """Return a message as chat templates expect it: text content, arguments of calls as objects, no nulls.

    Args:
        message: one of protocol.py's.
        index: its place, for errors.

    Raises:
        BadRequestError: a call's arguments are no JSON object.
    """
    # Templates know "system" only, and most skip in silence a role that they do not know.
    fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    fields["content"] = _text(message.content)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name, None)) is not None:
            fields[name] = value
    if isinstance(message, AssistantMessage) and message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"messages[{index}].tool_calls[{i}]"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return fields


def _text(content: Any) -> str:
    """Return a message's content as one text; parts are joined by line ends, as vLLM does."""
    if content is None:
        return ""  # not None: templates add it to strings
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise BadRequestError(f"{param} must be a JSON object, as text.", param)
    return arguments
