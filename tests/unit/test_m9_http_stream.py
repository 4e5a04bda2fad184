"""Answers as they go over the wire: golden transcripts, the official client, clients that leave, engines that die."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from folovllm.outputs import CompletionOutput, Logprob
from tests.http_utils import Served, events, serve, wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server: Served) -> Iterator[None]:
    yield
    wait_until(lambda: server.engine.num_running == 0)
    server.engine.reset()


def normalized(text: str) -> str:
    """Replace what differs from run to run."""
    return re.sub(r'"created":\d+', '"created":1', re.sub(r"(cmpl|call_)-?[0-9a-f]{24,32}", r"\1-1", text))


def chunk(choice: str, kind: str = "text_completion", prefix: str = "cmpl", end: str = "]") -> str:
    return f'data: {{"id":"{prefix}-1","object":"{kind}","created":1,"model":"fake","choices":[{choice}{end}}}\n\n'


def chat_chunk(choice: str, end: str = "]") -> str:
    return chunk(choice, "chat.completion.chunk", "chatcmpl", end)


USAGE = (
    '],"usage":{"prompt_tokens":4,"completion_tokens":4,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":3}}'
)
CHAT_USAGE = USAGE.replace('"prompt_tokens":4', '"prompt_tokens":16').replace('"total_tokens":8', '"total_tokens":20')


def test_golden_completion_stream(server: Served) -> None:
    response = server.complete(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert normalized(response.text) == (
        chunk('{"index":0,"text":"Hel","logprobs":null,"finish_reason":null}')
        + chunk('{"index":0,"text":"lo","logprobs":null,"finish_reason":null}')
        + chunk('{"index":0,"text":" wor","logprobs":null,"finish_reason":null}')
        + chunk('{"index":0,"text":"ld","logprobs":null,"finish_reason":"stop","stop_reason":null}')
        + "data: [DONE]\n\n"
    )


def test_golden_chat_stream_with_usage(server: Served) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": True})
    null = '],"usage":null'

    def piece(delta: str, finish: str = "null", more: str = "") -> str:
        return chat_chunk(f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}{more}}}', null)

    assert normalized(response.text) == (
        piece('{"role":"assistant","content":""}')
        + piece('{"content":"Hel"}')
        + piece('{"content":"lo"}')
        + piece('{"content":" wor"}')
        + piece('{"content":"ld"}')
        + piece("{}", '"stop"', ',"stop_reason":null')
        + chat_chunk("", CHAT_USAGE)
        + "data: [DONE]\n\n"
    )


def test_continuous_usage_counts_up(server: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for response in (
        server.complete(stream=True, stream_options=options),
        server.chat(stream=True, stream_options=options),
    ):
        found = events(response.text)[:-1]
        counts = [data["usage"]["completion_tokens"] for data in found]
        assert counts == sorted(counts) and set(counts) == {1, 2, 3, 4}
        assert found[-1]["choices"] == []


def test_golden_whole_answers(server: Served) -> None:
    assert normalized(server.complete().text) == (
        '{"id":"cmpl-1","object":"text_completion","created":1,"model":"fake","choices":[{"index":0,"text":'
        '"Hello world","logprobs":null,"finish_reason":"stop","stop_reason":null}' + USAGE + "}"
    )
    assert normalized(server.chat().text) == (
        '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"fake","choices":[{"index":0,"message":'
        '{"role":"assistant","content":"Hello world","refusal":null},"logprobs":null,"finish_reason":"stop",'
        '"stop_reason":null}' + CHAT_USAGE + "}"
    )


def test_finish_reasons(server: Served) -> None:
    for fields in ({"max_tokens": 2}, {"max_tokens": 2, "stream": True}):
        response = server.complete(**fields)
        last = events(response.text)[-2] if "stream" in fields else response.json()
        assert last["choices"][0]["finish_reason"] == "length"
    server.engine.finish = ("stop", "x")
    assert server.complete().json()["choices"][0]["stop_reason"] == "x"
    assert events(server.chat(stream=True).text)[-2]["choices"][0]["stop_reason"] == "x"


def collect(found: list[Any], n: int) -> list[dict[str, Any]]:
    """Join a completion stream into its choices."""
    assert found[-1] == "[DONE]"
    choices = [{"text": "", "logprobs": None, "token_ids": []} for _ in range(n)]
    for data in found[:-1]:
        for new in data["choices"]:
            choice = choices[new["index"]]
            choice["text"] += new["text"]
            choice["token_ids"] += new.get("token_ids", [])
            if new["logprobs"] is not None:
                old = choice["logprobs"] or {key: [] for key in new["logprobs"]}
                choice["logprobs"] = {key: old[key] + new["logprobs"][key] for key in old}
            for key in ("finish_reason", "stop_reason", "prompt_token_ids", "prompt_logprobs"):
                if new.get(key) is not None or (key in new and key not in choice):
                    choice[key] = new[key]
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ["abc", "de"], "n": 2},
        {"prompt": [[5, 6], [7]]},
        {"prompt": [5, 6]},
        {"echo": True},
        {"echo": True, "logprobs": 2, "n": 2},
        {"echo": True, "max_tokens": 0, "logprobs": 0},
        {"logprobs": 0, "return_token_ids": True},
        {"prompt_logprobs": 0, "prompt": ["abc", "de"]},
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(server: Served, fields: dict[str, Any]) -> None:
    whole = server.complete(**fields).json()
    streamed = events(server.complete(**fields, stream=True, stream_options={"include_usage": True}).text)
    usage = streamed.pop(-2)
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    expected = sorted(whole["choices"], key=lambda choice: choice["index"])
    for choice in expected:
        del choice["index"]
        choice.setdefault("token_ids", [])
    assert collect(streamed, len(expected)) == expected


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_do_not_depend_on_text_that_is_held_back(
    server: Served, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    """As under `stop`: the tokens and their log probabilities come, their text later."""
    late = {"Hel": "", "lo": "", " wor": "Hel", "ld": "lo world"}

    def sample(index: int, word: str, params: Any, finish: Any) -> CompletionOutput:
        return CompletionOutput(index, late[word], [1], None, [{1: Logprob(-1.5, 1, word)}], finish[0], finish[1])

    monkeypatch.setattr(server.engine, "_sample", sample)
    whole = server.complete(logprobs=0, echo=echo).json()["choices"][0]
    (streamed,) = collect(events(server.complete(logprobs=0, echo=echo, stream=True).text), 1)
    assert whole["logprobs"]["text_offset"] == ([0, 0, 1, 2, 3, 6, 8, 12] if echo else [0, 3, 5, 9])
    assert (streamed["text"], streamed["logprobs"]) == (whole["text"], whole["logprobs"])


def test_several_prompts_and_samples(server: Served) -> None:
    body = server.complete(prompt=["abc", "de"], n=2).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "Hello world"),
        (1, "HELLO WORLD"),
        (2, "Hello world"),
        (3, "HELLO WORLD"),
    ]
    assert body["usage"]["prompt_tokens"] == 7 and body["usage"]["completion_tokens"] == 16
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


def test_echo_and_logprobs(server: Served) -> None:
    assert server.complete(echo=True).json()["choices"][0]["text"] == "abcHello world"
    tokens = server.engine.tokenizer.encode("abc", False)
    assert server.complete(prompt=tokens, echo=True).json()["choices"][0]["text"] == "abcHello world"
    choice = server.complete(echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert choice["logprobs"] == {
        # The tokenizer's <bos> is a token, but no part of the text.
        "text_offset": [0, 0, 1, 2, 3],
        "token_logprobs": [None, -0.25, -0.25, -0.25, -1.5],
        "tokens": ["<bos>", "a", "b", "c", "Hel"],
        "top_logprobs": [None, {"a": -0.25}, {"b": -0.25}, {"c": -0.25}, {"Hel": -1.5, "x": -0.5}],
    }
    alone = server.complete(echo=True, max_tokens=0, logprobs=1).json()
    assert alone["choices"][0]["text"] == "abc" and alone["choices"][0]["finish_reason"] == "length"
    assert alone["choices"][0]["logprobs"]["tokens"] == ["<bos>", "a", "b", "c"]
    assert alone["usage"]["completion_tokens"] == 0
    top = server.complete(logprobs=3).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert top == {"Hel": -1.5, "x": -0.5, "y": -9999.0}  # JSON has no infinity
    position = server.complete(prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"]
    assert position[0] is None and list(position[1].values()) == [{"logprob": -0.25, "rank": 1, "decoded_token": "a"}]


def test_chat_logprobs(server: Served) -> None:
    whole = server.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]
    assert whole["content"][0] == {
        "token": "Hel",
        "logprob": -1.5,
        "bytes": [72, 101, 108],
        "top_logprobs": [{"token": "x", "logprob": -0.5, "bytes": [120]}],
    }
    streamed = events(server.chat(logprobs=True, top_logprobs=1, stream=True).text)[1:-2]
    assert [c["choices"][0]["logprobs"]["content"][0] for c in streamed] == whole["content"]
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert server.chat().json()["choices"][0]["logprobs"] is None


def test_tokens_without_text_make_no_chunk_unless_they_show(server: Served) -> None:
    server.engine.words = ["a", "", "b"]
    assert len(events(server.complete(stream=True).text)) == 3
    assert len(events(server.complete(stream=True, logprobs=0).text)) == 4
    assert len(events(server.chat(stream=True).text)) == 5
    assert len(events(server.chat(stream=True, return_token_ids=True).text)) == 6


def client_of(server: Served, **kwargs: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=20, **kwargs)


def test_the_official_client(server: Served) -> None:
    with client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").id == "fake"
        completion = client.completions.create(model="fake", prompt="abc", logprobs=1, echo=True)
        assert completion.choices[0].text == "abcHello world"
        assert completion.usage is not None and completion.usage.total_tokens == 8
        chat = client.chat.completions.create(
            model="fake",
            messages=[
                {"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ],
            logprobs=True,
            top_logprobs=1,
            extra_body={"top_k": 3, "chat_template_kwargs": {"enable_thinking": False}},
        )
        assert chat.choices[0].message.content == "Hello world"
        assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
        assert chat.usage.prompt_tokens_details.cached_tokens == 3
        assert server.engine.last_params.top_k == 3
        # An answer goes back as it came.
        again: Any = [{"role": "user", "content": "x"}, chat.choices[0].message, {"role": "user", "content": "y"}]
        assert client.chat.completions.create(model="fake", messages=again).choices
        dumped: Any = [{"role": "user", "content": "x"}, chat.choices[0].message.model_dump()]
        assert client.chat.completions.create(model="fake", messages=dumped).choices
        pieces = list(
            client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "x"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == "Hello world"
        assert pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 4
        texts = [p.choices[0].text for p in client.completions.create(model="fake", prompt="abc", stream=True)]
        assert texts == ["Hel", "lo", " wor", "ld"]
        with pytest.raises(openai.NotFoundError) as not_found:
            client.completions.create(model="other", prompt="x")
        assert not_found.value.code == "model_not_found" and not_found.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="fake", prompt="x", temperature=-1)
        assert bad.value.param == "temperature"


def test_other_endpoints(server: Served) -> None:
    get = server.client.get
    assert get("/health").json() == {"status": "ok"}
    assert set(get("/version").json()) == {"version"}
    model = get("/v1/models").json()["data"][0]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 512)
    assert get("/v1/models/other").status_code == 404
    assert get("/nothing").json()["error"]["type"] == "not_found_error"
    wrong_method = get("/v1/completions")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert wrong_method.json()["error"]["message"]
    assert server.post("/reset_prefix_cache", None).status_code == 404  # dev mode only
    assert get("/metrics").status_code == 404  # none given


def test_tokenize(server: Served) -> None:
    def tokenize(**body: Any) -> Any:
        return server.post("/tokenize", body).json()

    ids = server.engine.tokenizer.encode("the end")
    assert tokenize(prompt="the end") == {
        "count": len(ids),
        "max_model_len": 512,
        "tokens": ids,
        "token_strs": None,
    }
    assert tokenize(prompt="the end", add_special_tokens=False)["tokens"] == ids[1:]
    assert tokenize(prompt="a", add_special_tokens=False, return_token_strs=True)["token_strs"] == ["<0x61>"]
    messages = [{"role": "user", "content": "hi"}]
    tokens = tokenize(messages=messages)["tokens"]
    assert server.engine.tokenizer.decode(tokens) == "user: hi<end>\n|A"
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "user: hi<end>\n|A"}
    plain = tokenize(messages=messages, add_generation_prompt=False)["tokens"]
    assert server.engine.tokenizer.decode(plain) == "user: hi<end>\n"
    with_bos = tokenize(messages=messages, add_special_tokens=True)["tokens"]
    assert with_bos == [0, *tokens]
    for path, body, param in (
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": messages, "prompt": "x"}, "prompt"),
        ("/tokenize", {"prompt": "x", "bogus": 1}, "bogus"),
    ):
        response = server.post(path, body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert server.post("/tokenize", {"prompt": "x", "model": "y"}).status_code == 404


# ---- Clients that leave ----


def raw_post(path: str, data: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: Served, path: str, stream: bool) -> None:
    server.engine.words = ["w"] * 400
    server.engine.delay_s = 0.02
    body: dict[str, Any] = {"stream": stream, "max_tokens": 400, "n": 2}
    body |= (
        {"prompt": ["a", "b"]} if path.endswith("v1/completions") else {"messages": [{"role": "user", "content": "x"}]}
    )
    num_prompts = 2 if "prompt" in body else 1
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(raw_post(path, data))
        wait_until(lambda: server.engine.num_running == num_prompts)
        if stream:
            assert b"data: " in sock.recv(4096) + sock.recv(4096)
    left = time.monotonic()
    wait_until(lambda: server.engine.num_running == 0, timeout_s=5)
    assert time.monotonic() - left < 3
    assert len(server.engine.aborted) == num_prompts


def test_a_reader_that_stops_reading_holds_up_nobody(server: Served) -> None:
    server.engine.words = ["word" * 5000] * 400
    data = json.dumps({"prompt": "a", "stream": True, "max_tokens": 400}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(raw_post("/v1/completions", data))
        wait_until(lambda: server.engine.num_running == 1)
        time.sleep(0.3)
        assert server.engine.num_running == 1  # its output does not fit into the buffers
        yielded = server.engine.num_yielded
        assert yielded < 400
        assert server.complete(max_tokens=2).status_code == 200
        assert server.engine.num_running == 1
    wait_until(lambda: server.engine.num_running == 0)


# ---- Engines that fail ----


def test_an_engine_that_dies_ends_streams_with_an_error_event(server: Served) -> None:
    def die(index: int) -> None:
        server.engine.is_dead = index == 2

    server.engine.gate = die
    found = events(server.complete(stream=True).text)
    assert [c["choices"][0]["text"] for c in found[:-1]] == ["Hel", "lo"]
    assert found[-1] == {
        "error": {
            "message": "The engine is not running; try again later.",
            "type": "service_unavailable_error",
            "param": None,
            "code": "engine_dead",
        }
    }
    for response in (server.complete(), server.complete(stream=True), server.chat(), server.client.get("/health")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead" and "secret" not in response.text
    server.engine.is_dead = False
    with client_of(server) as client:
        server.engine.gate = die
        with pytest.raises(openai.APIError, match="engine is not running"):
            list(client.completions.create(model="fake", prompt="a", stream=True))
    server.engine.is_dead = False


def test_an_unexpected_error_says_nothing_about_us(server: Served) -> None:
    def fail(index: int) -> None:
        if index == 1:
            raise RuntimeError("secret")

    server.engine.gate = fail
    for fields in ({}, {"prompt": ["a", "b"]}):
        response = server.complete(**fields)
        assert response.status_code == 500 and response.headers["x-request-id"]
        assert response.json()["error"] == {
            "message": "Internal server error.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        found = events(server.complete(stream=True, **fields).text)
        assert found[-1]["error"]["message"] == "Internal server error."


def test_a_late_refusal_is_the_requests_own(server: Served) -> None:
    """A grammar that cannot be compiled in time shows at the first token, still before the answer begins."""

    def refuse(index: int) -> None:
        raise ValueError("structured_outputs: the grammar takes too long to compile.")

    server.engine.gate = refuse
    for stream in (False, True):
        response = server.chat(response_format={"type": "json_object"}, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "response_format"


def test_a_request_that_the_engine_ended(server: Served) -> None:
    server.engine.finish = ("abort", None)
    response = server.complete()
    assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]
    found = events(server.complete(stream=True).text)
    assert found[-1]["error"]["code"] == "request_aborted"
    server.engine.finish = ("abort", "no token is allowed")
    assert "no token is allowed" in server.chat().json()["error"]["message"]


def test_one_bad_prompt_of_several_stops_all(server: Served) -> None:
    for stream in (False, True):
        response = server.complete(prompt=["abc", "x" * 600], stream=stream)
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    wait_until(lambda: server.engine.num_running == 0)


def test_many_streams_at_once(server: Served) -> None:
    async def one(client: httpx.AsyncClient, i: int) -> str:
        body = {"prompt": "abc", "stream": True, "max_tokens": 1 + i % 4}
        response = await client.post("/v1/completions", json=body)
        return "".join(e["choices"][0]["text"] for e in events(response.text)[:-1])

    async def many() -> list[str]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=20, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(50)))

    texts = asyncio.run(many())
    assert texts == ["".join(server.engine.words[: 1 + i % 4]) for i in range(50)]
