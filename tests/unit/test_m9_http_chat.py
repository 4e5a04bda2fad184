"""Conversations on their way to prompts, and tool calls out of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from folovllm.entrypoints.openai.tool_calls import NamedCallParser, RequiredCallsParser, parse_complete
from folovllm.outputs import CompletionOutput
from tests.http_utils import FakeEngine, Served, events, serve, wait_until

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "$defs": {"City": {"type": "string"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server: Served) -> Iterator[None]:
    yield
    wait_until(lambda: server.engine.num_running == 0)
    server.engine.reset()


def prompt_of(server: Served, **fields: Any) -> str:
    response = server.post("/v1/chat/completions", {"messages": [USER], **fields})
    assert response.status_code == 200, response.text
    prompt = server.engine.seen[-1][0]
    assert prompt["prompt_token_ids"] == server.engine.tokenizer.encode(prompt["prompt"], add_special_tokens=False)
    text: str = prompt["prompt"]
    return text


def test_messages_of_every_role(server: Served) -> None:
    messages = [
        {"role": "developer", "content": "be kind", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "three", "reasoning_content": "hm", "refusal": None, "annotations": []},
        USER,
    ]
    text = prompt_of(server, messages=messages)
    turns = ["system: be kind", "user: a\nb", "assistant: ", "tool: 2", "assistant: three", "user: hi"]
    assert text == "".join(f"{turn}<end>\n" for turn in turns) + "|A"
    seen = server.engine.tokenizer.kwargs_seen[-1]["messages"]
    assert seen[0] == {"role": "system", "content": "be kind", "name": "boss"}
    assert seen[2]["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert seen[3] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    assert seen[4] == {"role": "assistant", "content": "three", "reasoning_content": "hm"}


@pytest.mark.parametrize("arguments", ["", "{", "[]", "5", "[" * 100000])
def test_arguments_of_earlier_calls_must_be_objects(server: Served, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    response = server.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].tool_calls[0].function.arguments"


def test_how_the_prompt_ends(server: Served) -> None:
    assert prompt_of(server) == "user: hi<end>\n|A"
    assert prompt_of(server, add_generation_prompt=False) == "user: hi<end>\n"
    assert prompt_of(server, continue_final_message=True).endswith("|C")
    assert prompt_of(server, continue_final_message=True, add_generation_prompt=False).endswith("|C")


def test_template_kwargs_reach_the_template_and_unknown_ones_are_refused(server: Served) -> None:
    assert "True" in prompt_of(server, chat_template_kwargs={"enable_thinking": True})
    error = server.chat(chat_template_kwargs={"enable_thinkin": True}).json()["error"]
    assert error["param"] == "chat_template_kwargs" and "enable_thinking" in error["message"]


def test_a_template_that_fails_is_a_400() -> None:
    template = "{{ raise_exception('only the user may speak') if messages[0].role != 'user' }}{{ messages[0].content }}"
    with serve(chat_template=template) as server:
        assert server.chat().status_code == 200
        assert server.engine.seen[-1][0]["prompt"] == "hi|A"
        response = server.chat(messages=[{"role": "system", "content": "x"}])
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "messages"
        assert "only the user may speak" in error["message"]


def test_a_template_of_the_request_needs_trust_and_runs_in_the_sandbox() -> None:
    with serve(trust_request_chat_template=True) as server:
        assert server.chat(chat_template="<{{ messages[0].content }}>").status_code == 200
        assert server.engine.seen[-1][0]["prompt"] == "<hi>|A"
        for template in (
            "{{ messages.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''.__class__.__base__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{% for i in range(10**9) %}x{% endfor %}",
            "{% if",
            "{{ messages.append(1) }}",
        ):
            response = server.chat(chat_template=template)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template"), response.text


def test_an_engine_without_chat_template_or_tokenizer() -> None:
    engine = FakeEngine()
    engine.tokenizer.chat_template = None
    with serve(engine) as server:
        response = server.chat()
        assert response.status_code == 400 and "--chat-template" in response.json()["error"]["message"]
    engine = FakeEngine()
    engine._tokenizer = None  # type: ignore[assignment]
    engine.processor.tokenizer = None
    with serve(engine) as server:
        assert server.chat().status_code == 400
        assert server.complete().status_code == 400
        assert server.complete(prompt=[5, 6]).status_code == 200
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 400
        assert server.post("/detokenize", {"tokens": [5]}).status_code == 400


# ---- Tools ----


def test_the_template_gets_the_tools_unless_none_is_chosen(server: Served) -> None:
    assert "get_weather" in prompt_of(server, tools=[WEATHER])
    assert "get_weather" in prompt_of(server, tools=[WEATHER], tool_choice="auto")
    assert "get_weather" not in prompt_of(server, tools=[WEATHER], tool_choice="none")
    assert server.engine.last_params.structured_outputs is None
    assert server.engine.tokenizer.kwargs_seen[-2]["tools"] == [WEATHER]


def test_tools_that_the_template_does_not_show_are_refused_unless_forced() -> None:
    with serve(chat_template="{{ messages[0].content }}") as server:
        response = server.chat(tools=[WEATHER])
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        server.engine.words = ['{"city": "Paris"}']
        named = {"type": "function", "function": {"name": "get_weather"}}
        assert server.chat(tools=[WEATHER], tool_choice=named).status_code == 200


def test_auto_finds_calls_in_the_text(server: Served) -> None:
    server.engine.words = ["Let me see.", CALL[:20], CALL[20:], "\n", CALL]
    choice = server.chat(tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}] * 2
    assert calls[0]["id"] != calls[1]["id"]
    one = server.chat(tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    text = server.chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]
    assert "tool_calls" not in text["message"] and text["message"]["content"] == "Let me see." + CALL + "\n" + CALL
    server.engine.words = [CALL]
    assert server.chat(tools=[WEATHER]).json()["choices"][0]["message"]["content"] is None
    server.engine.words = ["no call"]
    plain = server.chat(tools=[WEATHER]).json()["choices"][0]
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", "no call")


def streamed(server: Served, **fields: Any) -> tuple[str, dict[int, dict[str, str]], str]:
    """Return content, calls and finish_reason of a stream, joined as clients join them."""
    content, calls, reason = "", {}, ""
    for data in events(server.chat(stream=True, **fields).text)[:-1]:
        choice = data["choices"][0]
        content += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", []):
            call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
            if "id" in part:
                assert part["type"] == "function" and part["id"].startswith("call_")
                call["id"] = part["id"]
            call["name"] += part["function"].get("name", "")
            call["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    assert all(call.pop("id") for call in calls.values())
    return content, calls, reason


def test_calls_in_a_stream(server: Served) -> None:
    server.engine.words = ["Let me see.", *(CALL[i : i + 3] for i in range(0, len(CALL), 3))]
    content, calls, reason = streamed(server, tools=[WEATHER])
    assert (content.strip(), reason) == ("Let me see.", "tool_calls")
    assert calls == {0: {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    server.engine.words = list("[" + '{"name": "get_time", "parameters": {}}' + "]")
    assert streamed(server, tools=[TIME], tool_choice="required")[1] == {0: {"name": "get_time", "arguments": "{}"}}
    server.engine.words = list('{"city": "Paris"}')
    named = {"type": "function", "function": {"name": "get_weather"}}
    # "stop": as OpenAI and vLLM say it of a call that the client itself named.
    assert streamed(server, tools=[WEATHER], tool_choice=named) == (
        "",
        {0: {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        "stop",
    )
    whole = server.chat(tools=[WEATHER], tool_choice=named).json()["choices"][0]
    assert whole["finish_reason"] == "stop" and len(whole["message"]["tool_calls"]) == 1
    # Every token's log probabilities are there, once, whatever the parser holds back.
    server.engine.words = ["a", "<tool", "_call>", '{"name": "x"}', "</tool_call>"]
    found = events(server.chat(stream=True, tools=[TIME], logprobs=True).text)[:-1]
    positions = [p for data in found for p in (data["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [p["token"] for p in positions] == server.engine.words


def forced(server: Served, **fields: Any) -> Any:
    assert server.chat(**fields).status_code == 200
    text = server.engine.last_params.structured_outputs.json
    return json.loads(text) if isinstance(text, str) else text


def test_required_and_named_force_the_output(server: Served) -> None:
    schema = forced(server, tools=[WEATHER, TIME], tool_choice="required")
    jsonschema.Draft202012Validator.check_schema(schema)
    good = [{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "get_time", "parameters": {}}]
    jsonschema.validate(good, schema)
    for bad in (
        [],
        [{"name": "other", "parameters": {}}],
        [{"name": "get_weather", "parameters": {"city": 5}}],
        [{"name": "get_time", "parameters": {"x": 1}}],
        [{"name": "get_time"}],
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    one = forced(server, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good, one)
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert forced(server, tools=[WEATHER, TIME], tool_choice=named) == WEATHER["function"]["parameters"]  # type: ignore[index]


def test_tool_fields_that_contradict_each_other(server: Served) -> None:
    named = {"type": "function", "function": {"name": "nothing"}}
    other = json.loads(json.dumps(WEATHER).replace("get_weather", "other").replace('"string"', '"number"'))
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER], "tool_choice": named}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER, other], "tool_choice": "required"}, "tools"),
        ({"tools": [strict]}, "tools[0].function.strict"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ]
    for fields, param in cases:
        response = server.chat(**fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), (fields, response.text)
    server.engine.words = ['[{"name": "f", "parameters": {}}]']
    assert server.chat(tools=[strict], tool_choice="required").status_code == 200


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_required_calls_are_found_however_the_text_is_cut(step: int) -> None:
    calls = [{"name": "a", "parameters": {"x": '}{"[,', "y": {"z": [1, {"é": None}]}}}, {"name": "b", "parameters": {}}]
    text = json.dumps(calls, indent=1, ensure_ascii=False)
    parser = RequiredCallsParser()
    deltas = [d for i in range(0, len(text), step) for d in parser.feed(text[i : i + step])] + parser.finish()
    named = [delta for delta in deltas if delta.name is not None]
    assert [(d.index, d.name) for d in named] == [(0, "a"), (1, "b")]
    assert [json.loads(d.arguments or "") for d in deltas if d.name is None] == [c["parameters"] for c in calls]


@pytest.mark.parametrize("value", ["1e999", r'"\ud800"', "3.14159265358979323846", "[1,\n 2]"])
def test_arguments_are_what_the_model_wrote(server: Served, value: str) -> None:
    """Not what Python reads in it: Infinity is no JSON, half of a surrogate pair cannot be sent."""
    server.engine.words = [f'[{{"name": "get_time", "parameters": {{"x": {value}}}}}]']
    response = server.chat(tools=[TIME], tool_choice="required")
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == f'{{"x": {value}}}'


def test_a_forced_call_that_was_cut_off_is_not_lost() -> None:
    content, calls = parse_complete(RequiredCallsParser(), '[{"name": "a", "parameters": {}}, {"name": "b", "par')
    assert content == '{"name": "b", "par' and [call["function"]["name"] for call in calls] == ["a"]
    content, calls = parse_complete(RequiredCallsParser(), '[{"name": "b", "parameters": {"x": [1]')
    assert content == '{"name": "b", "parameters": {"x": [1]' and not calls
    deep = '[{"name": "b", "parameters": ' + '{"x": ' * 50_000 + "1" + "}" * 50_000 + "}]"
    assert parse_complete(RequiredCallsParser(), deep) == (deep[1:], [])
    content, calls = parse_complete(NamedCallParser("f"), '{"x": ')
    assert content is None and calls[0]["function"] == {"name": "f", "arguments": '{"x": '}


def test_a_cut_answer_keeps_length_as_its_reason(server: Served) -> None:
    server.engine.words = [CALL, "x", "y"]
    choice = server.chat(tools=[WEATHER], max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"]


def test_each_sample_has_its_own_parser(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(index: int, word: str, params: Any, finish: Any) -> CompletionOutput:
        return CompletionOutput(index, word if index else "plain", [1], None, None, finish[0], finish[1])

    monkeypatch.setattr(server.engine, "_sample", sample)
    server.engine.words = [CALL[:25], CALL[25:]]
    choices = server.chat(tools=[WEATHER], n=2).json()["choices"]
    assert choices[0]["message"]["content"] == "plainplain" and "tool_calls" not in choices[0]["message"]
    assert choices[1]["finish_reason"] == "tool_calls"


def test_round_trip_with_the_official_client(server: Served) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=20) as client:
        messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
        server.engine.words = [CALL]
        first = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
        (call,) = first.choices[0].message.tool_calls or []
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        server.engine.words = ["It is sunny."]
        second = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
        assert second.choices[0].message.content == "It is sunny."
        assert "tool: sunny" in server.engine.seen[-1][0]["prompt"]
