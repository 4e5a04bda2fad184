"""Requests to SamplingParams: every field does what it should, every bad value is a 400 that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.http_utils import FakeEngine, Served, serve

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serve(
        FakeEngine(policy="priority"), max_n=3, max_stop_strings=2, max_stop_length=5, max_schema_bytes=200
    ) as s:
        yield s


# Field, value, what SamplingParams then has (field, value); None: nothing in SamplingParams.
SAME = [
    ("n", 2),
    ("temperature", 0.5),
    ("top_p", 0.5),
    ("top_k", 5),
    ("min_p", 0.1),
    ("presence_penalty", 1.0),
    ("frequency_penalty", -1.0),
    ("repetition_penalty", 1.5),
    ("seed", 7),
    ("include_stop_str_in_output", True),
    ("ignore_eos", True),
    ("min_tokens", 2),
    ("skip_special_tokens", False),
    ("spaces_between_special_tokens", False),
    ("allowed_token_ids", [5]),
    ("bad_words", ["no"]),
    ("stop_token_ids", [9]),
    ("prompt_logprobs", 1),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(("name", "value"), SAME)
def test_fields_of_both_reach_sampling_params(server: Served, path: str, name: str, value: Any) -> None:
    body = {"prompt": "abc"} if path == "completions" else {"messages": MESSAGES}
    assert getattr(SamplingParams(), name) != value
    assert server.post(f"/v1/{path}", {**body, name: value}).status_code == 200
    assert getattr(server.engine.last_params, name) == value


def test_fields_that_have_other_names_or_shapes(server: Served) -> None:
    def params(request: Any) -> SamplingParams:
        assert request.status_code == 200, request.text
        found: SamplingParams = server.engine.last_params
        return found

    assert params(server.complete(stop="x")).stop == ["x"]
    assert params(server.complete(stop=["x", "y"])).stop == ["x", "y"]
    assert params(server.complete(logit_bias={"5": 1})).logit_bias == {5: 1.0}
    assert params(server.complete(top_k=-1)).top_k == 0
    assert params(server.complete()).max_tokens == 16
    assert params(server.complete(max_tokens=3)).max_tokens == 3
    assert params(server.complete(logprobs=2)).logprobs == 2
    assert params(server.complete(logprobs=0)).logprobs == 0
    assert params(server.complete(logprobs=2)).prompt_logprobs is None
    assert params(server.complete(logprobs=2, echo=True)).prompt_logprobs == 2
    assert params(server.complete(logprobs=2, echo=True, prompt_logprobs=1)).prompt_logprobs == 1
    assert params(server.complete()).output_kind == RequestOutputKind.FINAL_ONLY
    assert params(server.complete(stream=True)).output_kind == RequestOutputKind.DELTA
    assert params(server.chat(max_tokens=3)).max_tokens == 3
    assert params(server.chat(max_completion_tokens=3)).max_tokens == 3
    assert params(server.chat(max_completion_tokens=3, max_tokens=3)).max_tokens == 3
    prompt_len = len("user: hi<end>\n|A")
    assert params(server.chat()).max_tokens == 512 - prompt_len
    assert params(server.chat(logprobs=False)).logprobs is None
    assert params(server.chat(logprobs=True)).logprobs == 0
    assert params(server.chat(logprobs=True, top_logprobs=3)).logprobs == 3
    server.complete(priority=-5)
    assert server.engine.seen[-1][3] == -5
    server.complete(cache_salt="s")
    assert server.engine.seen[-1][0] == {"prompt": "abc", "cache_salt": "s"}
    server.complete(prompt=[5, 6], cache_salt="s")
    assert server.engine.seen[-1][0] == {"prompt_token_ids": [5, 6], "cache_salt": "s"}


def test_structured_outputs(server: Served) -> None:
    def found(**fields: Any) -> dict[str, Any]:
        assert server.chat(**fields).status_code == 200
        params = server.engine.last_params.structured_outputs
        fields = {} if params is None else {k: v for k, v in vars(params).items() if v is not None}
        if isinstance(fields.get("json"), str):
            fields["json"] = json.loads(fields["json"])
        return fields

    schema = {"type": "object"}
    assert found(response_format={"type": "text"}) == {}
    assert found(response_format={"type": "json_object"}) == {"json_object": True}
    json_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert found(response_format=json_schema) == {"json": schema}
    assert found(structured_outputs={"json": json.dumps(schema)}) == {"json": schema}
    cases: list[dict[str, Any]] = [
        {"json": schema},
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'root ::= "a"'},
        {"json_object": True},
    ]
    for fields in cases:
        assert found(structured_outputs=fields) == fields
        assert server.complete(structured_outputs=fields).status_code == 200


def test_defaults_are_the_models(server: Served) -> None:
    server.engine.defaults = SamplingParams(temperature=0.6, top_k=20, max_tokens=9)
    try:
        server.chat()
        assert (server.engine.last_params.temperature, server.engine.last_params.top_k) == (0.6, 20)
        assert server.engine.last_params.max_tokens == 9
        server.chat(temperature=0, top_k=None)  # null is the default
        assert (server.engine.last_params.temperature, server.engine.last_params.top_k) == (0.0, 20)
        server.complete()
        assert server.engine.last_params.max_tokens == 16  # OpenAI's
    finally:
        server.engine.defaults = SamplingParams()


def test_values_that_change_nothing_are_accepted(server: Served) -> None:
    labels = {"user": "me", "model": "fake"}
    assert server.complete(**labels, best_of=1, suffix="", stream_options=None).status_code == 200
    harmless: dict[str, Any] = {
        "audio": None,
        "function_call": None,
        "functions": None,
        "metadata": None,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prediction": None,
        "prompt_cache_key": "k",
        "reasoning_effort": None,
        "safety_identifier": "s",
        "service_tier": "auto",
        "store": False,
        "tool_choice": "none",
        "verbosity": None,
        "web_search_options": None,
    }
    assert server.chat(**labels, **harmless).status_code == 200
    # null is the default of every field but these.
    for model, base, needed in (
        (CompletionRequest, {"prompt": "a"}, "prompt"),
        (ChatCompletionRequest, {"messages": MESSAGES}, "messages"),
    ):
        path = "/v1/completions" if needed == "prompt" else "/v1/chat/completions"
        nulls = {name: None for name in model.model_fields if name != needed}
        assert server.post(path, base | nulls).status_code == 200


BAD_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 4}, "n"),  # the server's bound
    ({"n": 2, "temperature": 0}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a", "b", "c"]}, "stop"),
    ({"stop": "abcdef"}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids"),
    ({"bad_words": ["abcdef"]}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"bogus": 1}}, "stream_options.bogus"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 300}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "\ud800"}, "cache_salt"),
    ({"priority": "high"}, "priority"),
    ({"model": 5}, "model"),
    ({"bogus": 1}, "bogus"),
    ({"use_beam_search": True}, "use_beam_search"),
]
BAD_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": "a" * 600}, "prompt"),
    ({"prompt": ["a"] * 300}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": MESSAGES}, "messages"),
]
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "bogus": 1}]}, "messages[0].bogus"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [{"type": "code"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"bogus": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_BOTH + BAD_COMPLETION)
def test_bad_completion(server: Served, fields: dict[str, Any], param: str) -> None:
    check_refused(server, "/v1/completions", {"prompt": "abc", **fields}, param)


@pytest.mark.parametrize(("fields", "param"), BAD_BOTH + BAD_CHAT)
def test_bad_chat(server: Served, fields: dict[str, Any], param: str) -> None:
    check_refused(server, "/v1/chat/completions", {"messages": MESSAGES, **fields}, param)


def check_refused(server: Served, path: str, body: Any, param: str) -> None:
    """`body` is a 400 in OpenAI's shape that names `param`; nothing reached the engine."""
    before = len(server.engine.seen)
    # Not httpx's json=, which refuses half of a surrogate pair.
    response = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]
    assert len(error["message"]) < 700
    assert len(server.engine.seen) == before
    assert server.engine.num_running == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'"x"', b"\xff", b"null", b"[" * 100000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_request_is_a_400(server: Served, path: str, body: bytes) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_json_with_another_content_type_is_refused(server: Served) -> None:
    """A web page could send text/plain to localhost without the browser asking first."""
    response = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_nan_and_infinity_are_no_numbers(server: Served) -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = b'{"prompt": "a", "temperature": %s}' % text.encode()
        response = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
