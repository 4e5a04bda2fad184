"""The official `openai` client against a real server with a real model: every endpoint, every field, both modes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jsonschema")
pytest.importorskip("openai")

import httpx
import jsonschema
import openai

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.openai.local_server import LocalServer

pytestmark = [pytest.mark.network, pytest.mark.slow]
MODEL = "smollm2-135m-instruct"
FLAGS = ["--dtype", "float32", "--device", "cpu", "--max-num-seqs", "8", "--max-model-len", "1024"]
FLAGS += ["--kv-cache-memory-bytes", str(1 << 28), "--scheduling-policy", "priority", "--trust-request-chat-template"]
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 999}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find_city", "description": "Find a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop_now", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer([MODEL, *FLAGS], env={"OMP_NUM_THREADS": "1"}) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    """A completion; fields that OpenAI does not have go into extra_body."""
    known = {"max_tokens", "temperature", "n", "stop", "seed", "logprobs", "echo", "top_p", "stream", "logit_bias"}
    known |= {"presence_penalty", "frequency_penalty", "stream_options", "user"}
    own = {name: value for name, value in fields.items() if name in known}
    extra = {name: value for name, value in fields.items() if name not in known}
    return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **{**GREEDY, **own})


def text(client: openai.OpenAI, **fields: Any) -> str:
    return str(complete(client, **fields).choices[0].text)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **GREEDY, **fields})


def test_the_other_endpoints(client: openai.OpenAI, server: LocalServer) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL] and models[0].max_model_len == 1024  # type: ignore[attr-defined]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back["prompt"] == PROMPT
    chat_tokens = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat_tokens["count"] == chat(client).usage.prompt_tokens
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert re.fullmatch(r"\d+\.\d+.*", httpx.get(f"{server.url}/version").json()["version"])
    assert "folovllm:generation_tokens_total" in httpx.get(f"{server.url}/metrics").text
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    assert httpx.get(f"{server.url}/health").headers["X-Request-Id"]


def test_answers_are_those_of_the_engine(client: openai.OpenAI) -> None:
    llm = LLM(MODEL, dtype="float32", device="cpu", max_model_len=1024, kv_cache_memory_bytes=1 << 28)
    prompts = [PROMPT, "Once upon a time", "1, 2, 3,"]
    for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}):
        expected = llm.generate(prompts, SamplingParams(max_tokens=12, **params), use_tqdm=False)  # type: ignore
        answer = complete(client, prompts, **params)
        assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in expected]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert chat(client).choices[0].message.content == expected[0].outputs[0].text


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"stop": [" is", "Par"]}])
def test_streams_are_the_same(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    texts, reasons = [""] * len(whole.choices), [""] * len(whole.choices)
    for event in complete(client, stream=True, **fields):
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    whole = chat(client, **fields)
    texts, usage = [""] * len(whole.choices), None
    for event in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def contains(part: str) -> Callable[[str, str], bool]:
    return lambda base, changed: part in changed and part not in base


def differs(base: str, changed: str) -> bool:
    return base != changed


def same(base: str, changed: str) -> bool:
    return base == changed


EFFECTS: list[tuple[dict[str, Any], Callable[[str, str], bool]]] = [
    ({"max_tokens": 3}, lambda base, changed: base.startswith(changed) and len(changed) < len(base)),
    ({"temperature": 1.5, "seed": 1}, differs),
    ({"temperature": 1.5, "seed": 1, "top_k": 1}, same),
    ({"temperature": 1.5, "seed": 1, "top_p": 1e-6}, same),
    ({"temperature": 1.5, "seed": 1, "min_p": 1.0}, same),
    ({"stop": " Paris"}, lambda base, changed: changed == base[: base.index(" Paris")]),
    ({"stop": " Paris", "include_stop_str_in_output": True}, lambda base, changed: changed.endswith(" Paris")),
    ({"presence_penalty": 2.0, "max_tokens": 40}, differs),
    ({"frequency_penalty": 2.0, "max_tokens": 40}, differs),
    ({"repetition_penalty": 3.0}, differs),
    ({"bad_words": ["Paris"]}, lambda base, changed: "Paris" in base and "Paris" not in changed),
    ({"echo": True}, lambda base, changed: changed == PROMPT + base),
    ({"cache_salt": "mine"}, same),
    ({"priority": -1}, same),
    ({"user": "me"}, same),
    ({"structured_outputs": {"choice": ["Oslo", "Rome"]}}, lambda base, changed: changed in ("Oslo", "Rome")),
    ({"response_format": {"type": "text"}}, same),
]


@pytest.mark.parametrize(("fields", "holds"), EFFECTS, ids=[", ".join(fields) for fields, _ in EFFECTS])
def test_fields_change_what_they_should(
    client: openai.OpenAI, fields: dict[str, Any], holds: Callable[[str, str], bool]
) -> None:
    base, changed = text(client), text(client, **fields)
    assert holds(base, changed), (base, changed)


def test_fields_of_tokens(client: openai.OpenAI, server: LocalServer) -> None:
    base = complete(client, return_token_ids=True).choices[0]
    ids = base.token_ids
    assert len(ids) == 12
    first, second = ids[0], ids[1]
    assert complete(client, logit_bias={str(first): -100}, return_token_ids=True).choices[0].token_ids[0] != first
    only = complete(client, allowed_token_ids=[second], max_tokens=3, return_token_ids=True).choices[0].token_ids
    assert only == [second] * 3
    stopped = complete(client, stop_token_ids=[ids[3]]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == ids[3]
    assert len(complete(client, stop_token_ids=[ids[3]], min_tokens=6, return_token_ids=True).choices[0].token_ids) > 6
    prompt_ids = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert complete(client, prompt_ids).choices[0].text == base.text
    assert [c.text for c in complete(client, [prompt_ids, prompt_ids]).choices] == [base.text] * 2


def test_ends(client: openai.OpenAI) -> None:
    """The answer to a question ends by itself; ignore_eos goes on; max_tokens cuts."""
    ended = chat(client, max_tokens=60)
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens < 60
    longer = chat(client, max_tokens=60, extra_body={"ignore_eos": True})
    assert longer.choices[0].finish_reason == "length" and longer.usage.completion_tokens == 60
    shown = chat(client, max_tokens=60, extra_body={"skip_special_tokens": False, "ignore_eos": True})
    assert "<|im_end|>" in shown.choices[0].message.content
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"
    assert chat(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, echo=True, max_tokens=4).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert [choice.text[offset:].startswith(t) for offset, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)]
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(len(top) >= 3 for top in logprobs.top_logprobs[1:])
    # Greedy: what was chosen is the best.
    assert logprobs.token_logprobs[-1] == pytest.approx(max(logprobs.top_logprobs[-1].values()))
    assert complete(client).choices[0].logprobs is None
    assert len(complete(client, logprobs=0).choices[0].logprobs.tokens) == 12


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    streamed = [
        token
        for event in chat(client, logprobs=True, top_logprobs=2, max_tokens=4, stream=True)
        if event.choices and event.choices[0].logprobs
        for token in event.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, prompt_logprobs=1, max_tokens=1).choices[0]
    assert choice.prompt_logprobs[0] is None and len(choice.prompt_logprobs) == 5


def test_usage(client: openai.OpenAI) -> None:
    prompt = "A prompt long enough for several blocks of the cache, which nobody has asked for before. " * 3
    first, second = (complete(client, prompt, max_tokens=1).usage for _ in range(2))
    assert first.total_tokens == first.prompt_tokens + 1
    assert first.prompt_tokens_details.cached_tokens == 0 and second.prompt_tokens_details.cached_tokens >= 32
    salted = complete(client, prompt, max_tokens=1, cache_salt="other").usage
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_templates(client: openai.OpenAI) -> None:
    own = {"chat_template": "{{ messages[0].content }}{{ ending }}", "chat_template_kwargs": {"ending": "!"}}
    assert chat(client, extra_body=own).usage.prompt_tokens < chat(client).usage.prompt_tokens
    going_on = [*MESSAGES, {"role": "assistant", "content": "The capital of France is the city of"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, messages=going_on, extra_body=fields).choices[0].message.content.lstrip().startswith("Paris")
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert chat(client, messages=parts).choices[0].message.content == chat(client).choices[0].message.content


def test_structured_outputs_are_valid(client: openai.OpenAI) -> None:
    json_schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    constraints: list[dict[str, Any]] = [
        {"response_format": json_schema, "temperature": 0},
        {"response_format": json_schema, "temperature": 1.5, "seed": 1},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}, "temperature": 1.5, "seed": 2},
        {"extra_body": {"structured_outputs": {"json": json.dumps(SCHEMA)}}, "temperature": 1.5, "seed": 3},
    ]
    for fields in constraints:
        answer = chat(client, **{**fields, "max_tokens": 60}).choices[0]
        assert answer.finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    streamed = chat(client, response_format=json_schema, max_tokens=100, stream=True)
    joined = "".join(event.choices[0].delta.content or "" for event in streamed)
    jsonschema.validate(json.loads(joined), SCHEMA)
    code = chat(client, extra_body={"structured_outputs": {"regex": r"[A-Z]{3}-\d{4}"}}, temperature=1.0).choices[0]
    assert re.fullmatch(r"[A-Z]{3}-\d{4}", code.message.content)
    grammar = {"structured_outputs": {"grammar": 'root ::= "yes" | "no" " way"'}}
    assert chat(client, extra_body=grammar).choices[0].message.content in ("yes", "no way")
    some_object = chat(client, response_format={"type": "json_object"}, max_tokens=40, temperature=0).choices[0]
    if some_object.finish_reason == "stop":
        assert isinstance(json.loads(some_object.message.content), dict)
    else:
        assert some_object.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_forced_tools(client: openai.OpenAI, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "find_city"}}
    for choice in ("required", named):
        fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 100, "temperature": 1.2, "seed": 4}
        if stream:
            name = arguments = ""
            for event in chat(client, stream=True, **fields):
                for call in (event.choices[0].delta.tool_calls or [])[:1]:
                    if call.index == 0:
                        name += call.function.name or ""
                        arguments += call.function.arguments or ""
        else:
            call = chat(client, **fields).choices[0].message.tool_calls[0]
            name, arguments = call.function.name, call.function.arguments
        assert name in ("find_city", "stop_now") and (choice == "required" or name == "find_city")
        if name == "find_city":
            jsonschema.validate(json.loads(arguments), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, None),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0]"),
        ({"messages": []}, "messages"),
        ({"store": True}, "store"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_errors_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]
    assert param is None or (caught.value.body["param"] or "").startswith(param), caught.value.body


def test_other_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(client, model="another-model")
    with pytest.raises(openai.BadRequestError, match=r"1024|max_model_len|context"):
        complete(client, "word " * 2000)
