"""Tool calls in hermes' format: what is a call, what stays text, and that streaming cannot change either."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.entrypoints.openai.tool_parsers import (
    HermesStreamParser,
    ParsedToolCalls,
    ToolCall,
    ToolDelta,
    make_tool_call_id,
    parse_tool_calls,
)

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
WEATHER_CALL = ToolCall("get_weather", '{"city": "Paris"}')
TIME_CALL = ToolCall("get_time", "{}")

PIECES = [
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "<", "/", '"', "\\", "\\u00e9", "{", "}", " ", "\n", "é", "ab"),
    *('{"name": "f", "arguments": {"x": {"y": "}"}}}', '{"name": "f"}', '{"name": 1}', '{"arguments": {}}'),
    *(WEATHER, TIME, WEATHER.replace("}}", "}"), '{"name": "f", "arguments": {"x": "a</tool_call>b"}}'),
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def stream(pieces: list[str]) -> list[ToolDelta]:
    parser = HermesStreamParser()
    return [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()


def joined(deltas: list[ToolDelta]) -> ParsedToolCalls:
    """What a client makes of a stream, with the checks that it relies on."""
    content = ""
    calls: list[dict[str, str]] = []
    for delta in deltas:
        if delta.content is not None:
            assert delta.content and delta.index is None and delta.id is delta.name is delta.arguments is None
            content += delta.content
            continue
        assert delta.index is not None and delta.arguments is not None
        if delta.id is not None:
            assert delta.index == len(calls) and delta.name is not None and delta.arguments == ""
            calls.append({"id": delta.id, "name": delta.name, "arguments": ""})
        else:
            assert delta.index == len(calls) - 1 and delta.name is None
            calls[delta.index]["arguments"] += delta.arguments
    assert len({call["id"] for call in calls}) == len(calls)
    return ParsedToolCalls(content or None, [ToolCall(call["name"], call["arguments"]) for call in calls])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", None, []),
        ("Hello.", "Hello.", []),
        ("  Hello. \n", "  Hello. \n", []),
        (" \n", " \n", []),
        (WEATHER, None, [WEATHER_CALL]),
        (f"\n{WEATHER}\n", None, [WEATHER_CALL]),
        (f"{WEATHER}\n{TIME}", None, [WEATHER_CALL, TIME_CALL]),
        (f"Let me look.\n{WEATHER}\n{TIME}\n", "Let me look.", [WEATHER_CALL, TIME_CALL]),
        (f"One {WEATHER} two {TIME} three \n", "One two three \n", [WEATHER_CALL, TIME_CALL]),
        ('<tool_call>{"name":"f"}</tool_call>', None, [ToolCall("f", "{}")]),
        ('<tool_call>{"arguments":{"a":[{"b":{}}]},"name":"f"}</tool_call>', None, [ToolCall("f", '{"a":[{"b":{}}]}')]),
        # The closing tag inside a string is text.
        (
            '<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>\\"b"}}</tool_call>!',
            "!",
            [ToolCall("f", '{"x": "a</tool_call>\\"b"}')],
        ),
        # Escapes and precision are the model's.
        (
            '<tool_call>{"name": "\\u00e9", "arguments": {"x": "\\u00e9\\n", "y": 1.10, "z": 12345678901234567890}}'
            "</tool_call>",
            None,
            [ToolCall("é", '{"x": "\\u00e9\\n", "y": 1.10, "z": 12345678901234567890}')],
        ),
        # The end tag was left out.
        (WEATHER.removesuffix("</tool_call>"), None, [WEATHER_CALL]),
    ],
)
def test_what_is_a_call(text: str, content: str | None, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text) == ParsedToolCalls(content, calls)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no json",
        "{",
        '{"name": "f", "arguments": {"x": 1}',
        '{"name": "f", "arguments": {"x": 1}}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": null}',
        '{"name": 1, "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": {}, "extra": 1}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "unclosed}}',
        '[{"name": "f", "arguments": {}}]',
        '{"name": "f", "arguments": ' + '{"x": ' * 100_000,
    ],
)
def test_what_is_none_is_given_back(body: str) -> None:
    text = f"Before <tool_call>{body}</tool_call> after "
    assert parse_tool_calls(text) == ParsedToolCalls(text, [])
    # The next call does not suffer from it.
    assert parse_tool_calls(text + WEATHER) == ParsedToolCalls(text.rstrip(), [WEATHER_CALL])


@pytest.mark.parametrize("length", range(len(WEATHER) + 1))
def test_a_call_that_was_cut_is_text(length: int) -> None:
    cut = f"Hm.\n{WEATHER[:length]}"
    parsed = parse_tool_calls(cut)
    if parsed.tool_calls:
        assert cut.rstrip().endswith(("}}", "}}\n", "/", "</tool_call>")) and parsed.content == "Hm."
    else:
        assert parsed == ParsedToolCalls(cut, [])


@settings(max_examples=400, deadline=None)
@given(texts, st.data())
def test_splits_change_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse_tool_calls(text)
    assert joined(stream(pieces)) == whole
    assert joined(stream(list(text))) == whole


@settings(max_examples=300, deadline=None)
@given(texts)
def test_nothing_is_lost(text: str) -> None:
    """Without white space, content and calls together are the text: the content in order, around the calls."""
    parsed = parse_tool_calls(text)
    rest = "".join(text.split())
    calls = r"(?:<tool_call>.*?(?:</tool_call>|$))"
    content = [re.escape(char) for char in "".join((parsed.content or "").split())]
    pattern = f"{calls}*" + "".join(f"{char}{calls}*" for char in content) if parsed.tool_calls else "".join(content)
    assert re.fullmatch(pattern, rest, re.DOTALL)
    for call in parsed.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.arguments in text or call.arguments == "{}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.text(), st.dictionaries(st.text(), json_values, max_size=3), st.booleans()), max_size=3),
    st.integers(1, 9),
)
def test_what_was_written_is_read(calls: list[tuple[str, dict[str, object], bool]], size: int) -> None:
    written = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
        for name, arguments, ascii_only in calls
    ]
    text = "Yes.\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)
    parsed = joined(stream([text[start : start + size] for start in range(0, len(text), size)]))
    assert parsed.content == ("Yes." if calls else "Yes.\n")
    assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == [call[:2] for call in calls]


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(0, len("<tool_call>")))
def test_nothing_is_taken_back(text: str, length: int) -> None:
    """What is shown at any time is how the content begins, even if a half tag becomes a call in the end."""
    parser = HermesStreamParser()
    shown = "".join(delta.content for char in text for delta in parser.feed(char) if delta.content is not None)
    assert (parse_tool_calls(text).content or "").startswith(shown)
    assert (parse_tool_calls(text + WEATHER[length:]).content or "").startswith(shown)


def test_content_is_not_held_back() -> None:
    parser = HermesStreamParser()
    assert parser.feed("Hello") == [ToolDelta(content="Hello")]
    assert parser.feed(" ") == []  # may be the layout before a call
    assert parser.feed("you <") == [ToolDelta(content=" you")]
    assert parser.feed("b>") == [ToolDelta(content=" <b>")]
    assert parser.feed("\n" + WEATHER[:-1]) == []
    first, second = parser.feed(">")
    assert (first.index, first.name, first.arguments) == (0, "get_weather", "")
    assert second == ToolDelta(index=0, arguments='{"city": "Paris"}')
    assert parser.tool_calls == [WEATHER_CALL]
    assert parser.finish() == []


def test_time_is_linear() -> None:
    """A call that writes a file of 200,000 characters, letter by letter; quadratic scanning would take minutes."""
    source = 'print(\\"x\\")\\n' * 15_000
    start = time.perf_counter()
    parser = HermesStreamParser()
    for char in '<tool_call>{"name": "write", "arguments": {"text": "' + source + '"}}</tool_call>':
        parser.feed(char)
    assert len(parser.tool_calls) == 1
    assert time.perf_counter() - start < 10


def test_ids() -> None:
    ids = {make_tool_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call_id) for call_id in ids)
