"""`folovllm serve` as a process, with a tiny model: what it sends, and who reads it, slowly or not to the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli.main import main
from folovllm.entrypoints.openai.local_server import LocalServer
from tests.serve_utils import (
    TIMEOUT_S,
    completion,
    engine_pid,
    is_idle,
    many_connections,
    num_open_files,
    read_metric,
    read_stream,
    resident_bytes,
    save_tiny_chat_model,
    start_tiny_server,
    wait_for,
)

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes through /proc")
STREAMING = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    with start_tiny_server(model, "--max-num-seqs", "64", "--max-num-batched-tokens", "4096", "--dev-mode") as server:
        yield server
        # Whatever the tests did, nothing is left of it.
        wait_for(lambda: is_idle(server.url), "an idle server")


def forced(server: LocalServer, text: str) -> dict[str, Any]:
    """Fields that make the random model write `text` again and again, for a text of one letter."""
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert len(tokens) == 1
    return {"allowed_token_ids": tokens, "temperature": 0}


def transcript(server: LocalServer, path: str, **fields: Any) -> str:
    """A stream as it came, with ids and times made equal."""
    response = httpx.post(f"{server.url}{path}", json={"model": "tiny", "stream": True, **fields}, timeout=TIMEOUT_S)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    text = re.sub(r'"id": ?"(cmpl|chatcmpl)-[^"]+"', r'"id":"\1-ID"', response.text)
    return re.sub(r'"created": ?\d+', '"created":0', text)


def events(text: str) -> list[Any]:
    """The JSON of every event, after a look at the framing."""
    assert text.endswith("data: [DONE]\n\n")
    parts = text.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_golden_completion_stream(server: LocalServer) -> None:
    fields = {"prompt": "x", "max_tokens": 2, "ignore_eos": True, **forced(server, "A"), **STREAMING}
    head = {"id": "cmpl-ID", "object": "text_completion", "created": 0, "model": "tiny"}
    *tokens, last, usage = events(transcript(server, "/v1/completions", **fields))
    # An engine this fast may be a step ahead of the server: both tokens are one event then.
    pieces = ["A", "A"] if tokens else ["AA"]
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": None} for text in pieces]
    assert tokens == [{**head, "choices": [choice], "usage": None} for choice in choices[:-1]]
    end = {**choices[-1], "finish_reason": "length", "stop_reason": None}
    assert last == {**head, "choices": [end], "usage": None}
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert usage == {**head, "choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": 0}}}


def test_golden_chat_stream(server: LocalServer) -> None:
    messages = [{"role": "user", "content": "x"}]
    fields = {"messages": messages, "max_tokens": 2, "ignore_eos": True, **forced(server, "A")}
    head = {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
    found = events(transcript(server, "/v1/chat/completions", **fields))
    assert all({name: event[name] for name in head} == head for event in found)
    (choices,) = zip(*(event["choices"] for event in found), strict=True)
    assert choices[0]["delta"]["role"] == "assistant" and not choices[0]["delta"].get("content")
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "AA"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_streaming_changes_nothing(server: LocalServer) -> None:
    for seed in range(4):
        fields = {"prompt": f"prompt {seed}", "max_tokens": 40, "temperature": 1.0, "seed": seed, "n": 2}
        whole = completion(server, **fields)["choices"]
        texts = ["", ""]
        for event in events(transcript(server, "/v1/completions", **fields)):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in whole]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_blocks(server: LocalServer, stream: bool) -> None:
    wait_for(lambda: is_idle(server.url), "an idle server")
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": stream})
    request = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for half in (False, True):
        aborted = read_metric(server.url, "request_success_total")
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: read_metric(server.url, "num_requests_running") == 1, "a running request")
            wait_for(lambda: read_metric(server.url, "kv_cache_usage_perc") > 0, "blocks in use")
            if half:  # no more reading, but the other direction is still open: as a killed client's kernel does
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        # 4,000 tokens take far longer than this.
        assert wait_for(lambda: is_idle(server.url), "free blocks", 5) < 5
        assert read_metric(server.url, "request_success_total") == aborted + 1


def test_a_disconnect_takes_one_step(server: LocalServer) -> None:
    """After the abort is through, the engine has made at most a step's tokens more."""
    wait_for(lambda: is_idle(server.url), "an idle server")
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=TIMEOUT_S) as response:
        next(response.iter_bytes())
    wait_for(lambda: is_idle(server.url), "free blocks", 5)
    tokens = read_metric(server.url, "generation_tokens_total")
    time.sleep(0.2)
    assert read_metric(server.url, "generation_tokens_total") == tokens


def offline_texts(model: Path, requests: list[dict[str, Any]]) -> list[str]:
    llm = LLM(str(model), device="cpu", dtype="float32", num_gpu_blocks_override=400)
    params = [
        SamplingParams(temperature=r["temperature"], seed=r["seed"], max_tokens=r["max_tokens"], ignore_eos=True)
        for r in requests
    ]
    outputs = llm.generate([r["prompt"] for r in requests], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_many_streams_with_disconnects(server: LocalServer, model: Path) -> None:
    """200 at once, a third goes away: the others are what they are offline, and nothing is left behind."""
    generator = random.Random(0)
    requests = [
        {
            "prompt": "".join(generator.choices("abcdefgh ", k=generator.randint(1, 60))),
            "max_tokens": generator.randint(1, 60),
            "temperature": generator.choice([0.0, 1.0]),
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(200)
    ]
    leave_after = [generator.randint(1, 20) if generator.random() < 1 / 3 else None for _ in requests]

    async def round_of_requests() -> list[str]:
        async with many_connections() as client:
            return await asyncio.gather(
                *(read_stream(client, server.url, *pair) for pair in zip(requests, leave_after, strict=True))
            )

    texts = asyncio.run(asyncio.wait_for(round_of_requests(), TIMEOUT_S))
    wait_for(lambda: is_idle(server.url), "free blocks")
    engine = engine_pid(server)
    pids = (server.process.pid, engine)
    files, memory = [num_open_files(pid) for pid in pids], [resident_bytes(pid) for pid in pids]
    for _ in range(3):
        assert asyncio.run(asyncio.wait_for(round_of_requests(), TIMEOUT_S))
    wait_for(lambda: is_idle(server.url), "free blocks")
    wait_for(lambda: [num_open_files(pid) for pid in pids] <= [count + 2 for count in files], "closed sockets")
    grown = [resident_bytes(pid) / before for pid, before in zip(pids, memory, strict=True)]
    assert max(grown) < 1.1, grown
    expected = offline_texts(model, requests)
    survivors = [i for i, after in enumerate(leave_after) if after is None]
    assert len(survivors) > 100
    assert [texts[i] for i in survivors] == [expected[i] for i in survivors]
    assert all(expected[i].startswith(texts[i].rstrip("\ufffd")) for i in range(200))


def test_slow_readers_stall_nobody(server: LocalServer) -> None:
    """Clients that ask for megabytes and do not read: others are answered, and the engine finishes."""
    fields = {"prompt": "x", "max_tokens": 1000, "n": 8, "logprobs": 20, "ignore_eos": True, "stream": True}
    body = json.dumps({"model": "tiny", **fields})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(f"{head}\r\n\r\n{body}".encode())
        wait_for(lambda: read_metric(server.url, "num_requests_running") == 16, "running requests")
        start = time.monotonic()
        assert len(completion(server, prompt="y", max_tokens=20, ignore_eos=True)["choices"]) == 1
        assert time.monotonic() - start < 10
        wait_for(lambda: is_idle(server.url), "finished requests")
        # Only now the last of them reads. Nothing is missing, and what could not be sent was merged into fewer events.
        sock.settimeout(TIMEOUT_S)
        received = b""
        while b"[DONE]" not in received[-200:]:
            received += sock.recv(1 << 16)
    found = [json.loads(part[6:]) for part in re.findall(rb"data: \{.*\}", received)]
    texts = [0] * 8
    for choice in (choice for event in found for choice in event["choices"]):
        texts[choice["index"]] += len(choice["logprobs"]["tokens"])
    assert texts == [1000] * 8
    assert len(found) < 8 * 1000


def test_reset_prefix_cache(server: LocalServer) -> None:
    prompt = "the same long beginning " * 4
    fields = {"prompt": prompt, "max_tokens": 1, "ignore_eos": True}
    wait_for(lambda: is_idle(server.url), "an idle server")
    assert httpx.post(f"{server.url}/reset_prefix_cache", timeout=TIMEOUT_S).status_code == 200
    cached = [completion(server, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached[0] == 0 and cached[1] >= 64
    assert httpx.post(f"{server.url}/reset_prefix_cache", timeout=TIMEOUT_S).status_code == 200
    assert completion(server, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_the_load_generator(server: LocalServer, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`folovllm bench serve` against a real server: nothing fails, and its counts are the server's."""
    pytest.importorskip("aiohttp")
    argv = ["bench", "serve", "--base-url", server.url, "--endpoint", endpoint, "--num-prompts", "12"]
    argv += ["--max-concurrency", "4", "--vocab-size", "250", "--input-len", "20", "--output-len", "9", "--ignore-eos"]
    before = read_metric(server.url, "generation_tokens_total")
    assert main(argv) == 0
    assert re.search(r"Output tokens: +108\n", capsys.readouterr().out)
    assert read_metric(server.url, "generation_tokens_total") == before + 108
