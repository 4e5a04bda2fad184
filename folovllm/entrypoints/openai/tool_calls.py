"""Tool calls of a chat completion: what `tool_choice` means, and the parser that finds the calls in the text.

auto: the template shows the tools, the model calls them in its own format (tool_parsers/). required, or a named
function: the text is forced into JSON that is nothing but calls, as vLLM does; the arguments then follow the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from folovllm.entrypoints.openai.errors import BadRequestError
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, FunctionDefinition, NamedToolChoice
from folovllm.entrypoints.openai.tool_parsers import HermesStreamParser, ToolDelta, make_tool_call_id

_DECODER = json.JSONDecoder()
_CALL_START = re.compile(r'[\s\[,]*\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"parameters"\s*:\s*')
_CALL_END = re.compile(r"\s*\}")

ToolMode = Literal["none", "auto", "required", "named"]


class ToolParser(Protocol):
    """Takes a streamed text apart into content and calls."""

    def feed(self, delta_text: str) -> list[ToolDelta]:
        """Take in the next piece of text; return what is certain by now."""

    def finish(self) -> list[ToolDelta]:
        """Return what was held back; the text is complete."""


def tool_mode(request: ChatCompletionRequest) -> ToolMode:
    """Return how `request` uses tools.

    Raises:
        BadRequestError: its fields about tools contradict each other.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none"):
            raise BadRequestError("tool_choice needs tools: give at least one.", "tool_choice")
        return "none"
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise BadRequestError("tools: two functions have the same name.", "tools")
    if isinstance(choice, NamedToolChoice):
        if choice.function.name not in names:
            raise BadRequestError(
                f"tool_choice: there is no function {choice.function.name!r} in tools; there are {', '.join(names)}.",
                "tool_choice",
            )
        return "named"
    if choice == "required":
        return "required"
    for i, tool in enumerate(request.tools):
        if tool.function.strict and choice != "none":
            raise BadRequestError(
                f"tools[{i}].function.strict: calls are only sure to follow the schema with tool_choice 'required' or "
                "a named function.",
                f"tools[{i}].function.strict",
            )
    return "none" if choice == "none" else "auto"


def forced_schema(request: ChatCompletionRequest, mode: ToolMode) -> dict[str, Any] | None:
    """Return the JSON schema that the whole output must follow; None where the model is free.

    Named: the arguments alone. Required: [{"name": ..., "parameters": {...}}, ...], at least one.

    Raises:
        BadRequestError: two functions' schemas define the same name differently.
    """
    tools = {tool.function.name: tool.function for tool in request.tools or ()}
    if mode == "named":
        assert isinstance(request.tool_choice, NamedToolChoice)
        return _parameters(tools[request.tool_choice.function.name])
    if mode != "required":
        return None
    # References point from the root of a document: definitions move there.
    definitions: dict[str, dict[str, Any]] = {"$defs": {}, "definitions": {}}
    calls = []
    for function in tools.values():
        parameters = _parameters(function)
        for place, known in definitions.items():
            for name, schema in parameters.pop(place, {}).items():
                if known.setdefault(name, schema) != schema:
                    raise BadRequestError(f"tools: their schemas define {place}.{name} in different ways.", "tools")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    forced: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
    }
    if request.parallel_tool_calls is False:
        forced["maxItems"] = 1
    return forced | {place: known for place, known in definitions.items() if known}


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    """Return a copy of the schema of a function's arguments; without one, it takes none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | function.parameters


def make_parser(request: ChatCompletionRequest, mode: ToolMode) -> ToolParser | None:
    """Return a new parser for one answer; None where its text is content as it stands."""
    if mode == "none":
        return None
    parser: ToolParser
    if mode == "named":
        assert isinstance(request.tool_choice, NamedToolChoice)
        return NamedCallParser(request.tool_choice.function.name)
    parser = HermesStreamParser() if mode == "auto" else RequiredCallsParser()
    return FirstCallOnly(parser) if request.parallel_tool_calls is False else parser


class NamedCallParser:
    """The text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        """`name`: the function's."""
        self.name = name
        self._begun = False

    def feed(self, delta_text: str) -> list[ToolDelta]:
        """See ToolParser."""
        if not delta_text:
            return []
        deltas = [ToolDelta(index=0, arguments=delta_text)]
        if not self._begun:
            self._begun = True
            deltas.insert(0, ToolDelta(index=0, id=make_tool_call_id(), name=self.name, arguments=""))
        return deltas

    def finish(self) -> list[ToolDelta]:
        """See ToolParser."""
        return []


class RequiredCallsParser:
    """The text is a JSON array of {"name", "parameters"}; a call is given out when it is complete.

    A call that was cut off (finish_reason "length") is given out as content: it cannot be used, nor is it lost.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._num_calls = 0

    def feed(self, delta_text: str) -> list[ToolDelta]:
        """See ToolParser."""
        self._buffer += delta_text
        deltas: list[ToolDelta] = []
        while "}" in delta_text and (call := self._first_call()) is not None:  # else none can have become complete
            name, arguments, end = call
            self._buffer = self._buffer[end:]
            index = self._num_calls
            self._num_calls += 1
            deltas.append(ToolDelta(index=index, id=make_tool_call_id(), name=name, arguments=""))
            deltas.append(ToolDelta(index=index, arguments=arguments))
        return deltas

    def _first_call(self) -> tuple[str, str, int] | None:
        """Return the buffer's first call if it is complete: name, arguments, and where it ends.

        The arguments are the very characters that the model wrote: read and written again, 1e999 would become
        Infinity, and half of a surrogate pair what no answer can hold.
        """
        start = _CALL_START.match(self._buffer)
        if start is None:
            return None
        try:
            _, end = _DECODER.raw_decode(self._buffer, start.end())
        except (ValueError, RecursionError):
            return None
        close = _CALL_END.match(self._buffer, end)
        return None if close is None else (start[1], self._buffer[start.end() : end], close.end())

    def finish(self) -> list[ToolDelta]:
        """See ToolParser."""
        rest = self._buffer.lstrip(" \t\r\n[,")
        return [ToolDelta(content=rest)] if rest.strip() not in ("", "]") else []


class FirstCallOnly:
    """Leaves out every call but the first: parallel_tool_calls=false."""

    def __init__(self, parser: ToolParser) -> None:
        """`parser`: finds the calls."""
        self._parser = parser

    def feed(self, delta_text: str) -> list[ToolDelta]:
        """See ToolParser."""
        return self._kept(self._parser.feed(delta_text))

    def finish(self) -> list[ToolDelta]:
        """See ToolParser."""
        return self._kept(self._parser.finish())

    @staticmethod
    def _kept(deltas: Iterable[ToolDelta]) -> list[ToolDelta]:
        return [delta for delta in deltas if not delta.index]


def delta_fields(delta: ToolDelta) -> dict[str, Any]:
    """Return a piece as the `delta` of a streamed choice."""
    if delta.index is None:
        return {"content": delta.content}
    function: dict[str, Any] = {} if delta.name is None else {"name": delta.name}
    function["arguments"] = delta.arguments or ""
    call: dict[str, Any] = {"index": delta.index}
    if delta.id is not None:
        call |= {"id": delta.id, "type": "function"}
    return {"tool_calls": [call | {"function": function}]}


def parse_complete(parser: ToolParser, text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return a complete text's content (None without any) and its calls, as `message` holds them."""
    content = ""
    calls: dict[int, dict[str, Any]] = {}
    for delta in [*parser.feed(text), *parser.finish()]:
        if delta.index is None:
            content += delta.content or ""
            continue
        call = calls.setdefault(
            delta.index, {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        )
        function: Mapping[str, str] = call["function"]
        call["function"] = {"name": function["name"], "arguments": function["arguments"] + (delta.arguments or "")}
    return content or None, [calls[index] for index in sorted(calls)]
