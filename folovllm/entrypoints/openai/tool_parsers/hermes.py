"""Tool calls as Qwen2.5 and Qwen3 write them (vLLM: `tool_parsers/hermes_tool_parser.py`).

    I will look that up.
    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

The one idea: a call is given out when its closing tag has come and its JSON is right, never before. So what is no
call, because its JSON is broken or was cut, can still be given back as text: nothing that the model wrote is lost.

Simplified (vLLM: arguments are streamed as they are generated): a client can only use complete arguments, and vLLM
has to leave a call that breaks off half sent. Here the text outside the calls streams, each call comes in one piece.

The text before and after the calls is content; white space next to a call is layout and belongs to neither. There is
one parser: a complete text is a stream of one piece, so streamed and complete answers cannot disagree.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

import msgspec

OPEN_TAG = "<tool_call>"
"""What begins a call."""
CLOSE_TAG = "</tool_call>"
"""What ends a call, unless it stands inside a JSON string."""

_QUOTE_OR_CLOSE = re.compile(r'"|</tool_call>')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')


@dataclass(frozen=True)
class ToolCall:
    """One complete call."""

    name: str
    """The function's name."""
    arguments: str
    """A JSON object: the very characters that the model wrote."""


@dataclass(frozen=True)
class ParsedToolCalls:
    """A complete text, taken apart."""

    content: str | None
    """The text outside the calls; None where there is none."""
    tool_calls: list[ToolCall]
    """The calls, in the model's order."""


@dataclass(frozen=True)
class ToolDelta:
    """A piece of a streamed answer: content, or (part of) a call.

    A call is two deltas, as in OpenAI's streams: first `index`, `id`, `name` and empty `arguments`, then `index` and
    the arguments.
    """

    content: str | None = None
    """Text outside the calls; None in a call's delta."""
    index: int | None = None
    """0, 1, ...: which call of the answer; None in a delta of content."""
    id: str | None = None
    """The call's id, in its first delta."""
    name: str | None = None
    """The function's name, in its first delta."""
    arguments: str | None = None
    """"" in a call's first delta, all arguments in its second."""


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    """What stands between the tags. An unknown field makes it no call: it is given back, not dropped."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def make_tool_call_id() -> str:
    """Return a new id in OpenAI's form: `call_` and 24 hexadecimal digits."""
    return f"call_{uuid.uuid4().hex[:24]}"


def parse_tool_calls(text: str) -> ParsedToolCalls:
    """Take a complete text apart. Whatever is no well-formed call stays in the content."""
    parser = HermesStreamParser()
    deltas = parser.feed(text) + parser.finish()
    content = "".join(delta.content for delta in deltas if delta.content is not None)
    return ParsedToolCalls(content or None, list(parser.tool_calls))


class HermesStreamParser:
    """Takes a streamed text apart. Linear in the text's length, however small the pieces."""

    def __init__(self) -> None:
        """Start with an empty text."""
        self.tool_calls: list[ToolCall] = []
        """The calls given out so far."""
        # Text that has come and is not given out: outside a call only what may be the beginning of a tag, and the
        # white space before it; inside a call everything from that white space on.
        self._buffer = ""
        # Where the body of the open call begins in the buffer; None outside a call.
        self._body_start: int | None = None
        # How far the body was searched for its end, and whether that place is inside a JSON string.
        self._scanned = 0
        self._in_string = False
        # Whether what was last given out is a call.
        self._after_call = False

    def feed(self, delta_text: str) -> list[ToolDelta]:
        """Take in the next piece of text; return what is certain by now, which may be nothing."""
        self._buffer += delta_text
        deltas: list[ToolDelta] = []
        while self._take_call(deltas) if self._body_start is not None else self._take_content(deltas):
            pass
        return deltas

    def finish(self) -> list[ToolDelta]:
        """Return what was held back. The text is complete; feed() may not be called again."""
        deltas: list[ToolDelta] = []
        while self._body_start is not None:
            # No closing tag outside a string. Complete JSON is a call all the same: the model left out the tag.
            if self._give_call(self._buffer[self._body_start :], deltas):
                self._close(len(self._buffer))
                break
            # Otherwise a quote was never closed: the first tag inside that string may be the end after all.
            end = self._buffer.find(CLOSE_TAG, self._body_start)
            end = len(self._buffer) if end < 0 else end + len(CLOSE_TAG)
            deltas.append(self._content(end))
            self._close(end)
            deltas += self.feed("")
        # White space after a call is layout; after anything else it is content.
        if self._buffer.strip() or (self._buffer and not self._after_call):
            deltas.append(self._content(len(self._buffer)))
        self._buffer = ""
        return deltas

    def _take_content(self, deltas: list[ToolDelta]) -> bool:
        """Give out content up to the next tag, or what may become one; say whether a call was opened."""
        start = self._buffer.find(OPEN_TAG)
        end = start if start >= 0 else len(self._buffer) - _length_of_tag_begun(self._buffer)
        end = len(self._buffer[:end].rstrip())
        if end:
            deltas.append(self._content(end))
            self._buffer = self._buffer[end:]
        if start < 0:
            return False
        self._body_start = self._scanned = start - end + len(OPEN_TAG)
        self._in_string = False
        return True

    def _take_call(self, deltas: list[ToolDelta]) -> bool:
        """Give out the open call, or its text where it is none; False where its end has not come yet."""
        end = self._find_end()
        if end is None:
            return False
        assert self._body_start is not None
        after = end + len(CLOSE_TAG)
        if not self._give_call(self._buffer[self._body_start : end], deltas):
            deltas.append(self._content(after))
        self._close(after)
        return True

    def _find_end(self) -> int | None:
        """Return where the closing tag of the open call begins; None where it has not come."""
        while True:
            pattern = _QUOTE_OR_ESCAPE if self._in_string else _QUOTE_OR_CLOSE
            match = pattern.search(self._buffer, self._scanned)
            if match is None:
                # Half of a closing tag may stand at the end.
                self._scanned = max(self._scanned, len(self._buffer) - len(CLOSE_TAG) + 1)
                return None
            if match.group() == CLOSE_TAG:
                return match.start()
            if match.group() == '"':
                self._in_string = not self._in_string
                self._scanned = match.end()
            elif match.end() == len(self._buffer):
                self._scanned = match.start()  # the escaped character is still to come
                return None
            else:
                self._scanned = match.end() + 1

    def _give_call(self, body: str, deltas: list[ToolDelta]) -> bool:
        """Give out the call that `body` describes; False where it describes none."""
        call = _parse_call(body)
        if call is None:
            return False
        index = len(self.tool_calls)
        deltas.append(ToolDelta(index=index, id=make_tool_call_id(), name=call.name, arguments=""))
        deltas.append(ToolDelta(index=index, arguments=call.arguments))
        self.tool_calls.append(call)
        self._after_call = True
        return True

    def _content(self, end: int) -> ToolDelta:
        """Return the buffer up to `end` as content; the caller drops it."""
        self._after_call = False
        return ToolDelta(content=self._buffer[:end])

    def _close(self, end: int) -> None:
        """Leave the open call, and drop the buffer up to `end`."""
        self._buffer = self._buffer[end:]
        self._body_start = None


def _parse_call(body: str) -> ToolCall | None:
    """Return the call that `body` describes, None where it is not {"name": a string, "arguments": an object}."""
    try:
        call = msgspec.json.decode(body, type=_Call)
        arguments = bytes(call.arguments).decode()
        msgspec.json.decode(arguments, type=dict)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return ToolCall(call.name, arguments)


def _length_of_tag_begun(text: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of an opening tag."""
    start = text.rfind("<", -(len(OPEN_TAG) - 1))
    return len(text) - start if start >= 0 and OPEN_TAG.startswith(text[start:]) else 0
