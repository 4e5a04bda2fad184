"""Who may ask, how much, and what may be known: keys, sizes, queues, origins, ids, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from folovllm.entrypoints.openai import settings as settings_module
from folovllm.entrypoints.openai.chat_template import Renderer
from folovllm.entrypoints.openai.errors import BadRequestError
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.metrics.prometheus import PrometheusStatLogger
from tests.http_utils import FakeEngine, Served, events, serve, wait_until

KEYS = ["first-key", "second"]


def all_routes(server: Served) -> list[tuple[str, str]]:
    """Return (method, path) of every route of the server."""
    document = server.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEYS[0]}"}).json()
    routes = [(m.upper(), p.replace("{model}", "fake")) for p, methods in document["paths"].items() for m in methods]
    assert ("GET", "/metrics") in routes and ("POST", "/reset_prefix_cache") in routes and len(routes) == 10
    return [*routes, ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/health/"), ("OPTIONS", "/v1/models")]


def test_every_route_but_health_asks_for_a_key() -> None:
    with serve(api_key=KEYS, dev_mode=True, metrics=PrometheusStatLogger("fake")) as server:
        for method, path in all_routes(server):
            if path == "/health":
                assert server.client.request(method, path).status_code == 200
                continue
            for header in (
                None,
                "",
                "Bearer",
                "Bearer wrong",
                "Basic first-key",
                "first-key",
                "Bearer first-ke",
            ):
                headers = {} if header is None else {"Authorization": header}
                response = server.client.request(method, path, headers=headers)
                assert response.status_code == 401, (method, path, header)
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            for key in KEYS:
                response = server.client.request(method, path, headers={"Authorization": f"Bearer {key}"})
                assert response.status_code != 401, (method, path)
        assert not server.engine.seen


def test_without_keys_none_is_asked_for() -> None:
    with serve() as server:
        assert server.client.get("/v1/models").status_code == 200


def test_keys_are_checked_and_the_environment_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    for bad in ("", " a", "a\n", "ü"):
        with pytest.raises(ValueError, match="api_key"):
            ServerSettings(api_key=[bad])
    parser = ServerSettings.add_cli_args(argparse.ArgumentParser())
    monkeypatch.setenv(settings_module.API_KEY_VARIABLE, "from-env")
    args = parser.parse_args(["--api-key", "a", "b", "--api-key", "c"])
    assert ServerSettings.from_cli_args(args).api_key == ["a", "b", "c", "from-env"]
    assert "from-env" not in repr(ServerSettings.from_cli_args(args))
    monkeypatch.delenv(settings_module.API_KEY_VARIABLE)
    assert ServerSettings.from_cli_args(parser.parse_args([])) == ServerSettings()


def test_cache_is_salted_per_key() -> None:
    def salt(server: Served, key: str, **fields: Any) -> str:
        response = server.complete(**fields)
        response = server.client.post(
            "/v1/completions", json={"prompt": "a", **fields}, headers={"Authorization": f"Bearer {key}"}
        )
        assert response.status_code == 200
        prompt = server.engine.seen[-1][0]
        assert prompt["prompt"] == "a"
        found: str = prompt["cache_salt"]
        return found

    with serve(api_key=KEYS, isolate_prefix_cache=True) as server:
        salts = [
            salt(server, KEYS[0]),
            salt(server, KEYS[1]),
            salt(server, KEYS[0], cache_salt="x"),
            salt(server, KEYS[1], cache_salt="x"),
        ]
        assert len(set(salts)) == 4
        assert salts[0] == salt(server, KEYS[0]) and salts[2] == salt(server, KEYS[0], cache_salt="x")
        assert all(len(s) == 64 and not any(key in s for key in KEYS) for s in salts)
    with serve(api_key=KEYS, isolate_prefix_cache=True) as server:
        assert salt(server, KEYS[0]) != salts[0]  # nobody can work it out from the key
    with pytest.raises(ValueError, match="isolate_prefix_cache"):
        ServerSettings(isolate_prefix_cache=True)


# ---- Sizes ----


def test_bodies_beyond_the_limit_are_refused_before_they_are_read() -> None:
    with serve(max_body_bytes=1000) as server:
        assert server.complete(prompt="a" * 400).status_code == 200
        response = server.complete(prompt="a" * 1000)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        # By its header alone: no byte of the body was sent.
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")

        def endless() -> Any:
            for _ in range(10**6):
                yield b" " * 100

        try:
            response = server.client.post(
                "/v1/completions", content=endless(), headers={"Content-Type": "application/json"}
            )
            assert response.status_code == 413
        except httpx.TransportError:
            pass  # the connection was closed while the client still wrote
        assert server.complete().status_code == 200
        assert len(server.engine.seen) == 2


def test_chats_are_counted_before_their_template_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    render, may_render, num_started = Renderer.render_chat, threading.Event(), [0]
    refuses: list[bool] = []

    async def slow(self: Renderer, *args: Any, **kwargs: Any) -> Any:
        num_started[0] += 1
        while not may_render.is_set():
            await asyncio.sleep(0.01)
        if refuses:
            raise BadRequestError("the template refuses it.")
        return await render(self, *args, **kwargs)

    monkeypatch.setattr(Renderer, "render_chat", slow)
    codes: list[int] = []
    with serve(FakeEngine(max_num_seqs=1), max_queued_requests=1) as server:

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=20) as client:
                body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                codes.append(client.post("/v1/chat/completions", json=body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: num_started[0] == 2)
        assert server.chat().status_code == 429
        may_render.set()
        for thread in threads:
            thread.join(20)
        assert codes == [200, 200]
        refuses.append(True)
        assert [server.chat().status_code for _ in range(3)] == [400] * 3  # gives its place back
        refuses.clear()
        assert server.chat().status_code == 200


def test_the_queue_is_bounded() -> None:
    engine = FakeEngine(words=["w"] * 100, max_num_seqs=2)
    engine.delay_s = 0.05
    with serve(engine, max_queued_requests=1) as server:
        assert server.complete(n=4).json()["error"]["param"] == "n"  # could never fit
        assert server.complete(prompt=["a", "b", "c", "d"]).status_code == 400
        with httpx.Client(base_url=server.url, timeout=20) as client:
            body = {"prompt": "a", "stream": True, "max_tokens": 100, "n": 2}
            with client.stream("POST", "/v1/completions", json=body) as first:
                assert first.status_code == 200
                refused = server.complete(n=2)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert server.client.get("/health").status_code == 200
                engine.delay_s = 0.0
                assert server.complete(max_tokens=1).status_code == 200  # one more fits
        wait_until(lambda: engine.num_running == 0)
        assert server.complete(n=3).status_code == 200
        # Refused requests take no room: neither at once, nor in the engine.
        for _ in range(5):
            assert server.complete(prompt="a" * 600).status_code == 400
            assert server.complete(prompt=["a", "b" * 600]).status_code == 400
        assert server.complete(n=3).status_code == 200


def test_max_output_tokens_bounds_and_is_the_default() -> None:
    with serve(max_output_tokens=3) as server:
        assert server.complete(max_tokens=4).json()["error"]["param"] == "max_tokens"
        assert server.chat(max_completion_tokens=4).json()["error"]["param"] == "max_completion_tokens"
        assert server.complete().json()["usage"]["completion_tokens"] == 3
        assert server.chat().json()["usage"]["completion_tokens"] == 3


def test_schemas_and_tools_are_bounded() -> None:
    with serve(max_schema_bytes=100) as server:
        schema = {"type": "object", "title": "x" * 100}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert server.chat(response_format=wanted).json()["error"]["param"] == "response_format"
        assert server.chat(structured_outputs={"json": schema}).json()["error"]["param"] == "structured_outputs"
        tool = {"type": "function", "function": {"name": "f", "description": "x" * 100}}
        assert server.chat(tools=[tool]).json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    "values",
    [
        {"port": 65536},
        {"max_n": 0},
        {"max_body_bytes": 0},
        {"stream_interval": 0},
        {"max_queued_requests": -1},
        {"shutdown_timeout": -1.0},
        {"ssl_certfile": "x"},
        {"ssl_keyfile": "no-such-file", "ssl_certfile": "no-such-file"},
        {"served_model_name": [""]},
        {"chat_template": None, "max_output_tokens": 0},
    ],
)
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(values)):
        ServerSettings(**values)


# ---- What others may know ----


def test_browsers_may_call_only_from_allowed_origins() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serve() as server:
        response = server.client.options("/v1/completions", headers=preflight)
        assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
        plain = server.client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in plain.headers
    with serve(allowed_origins=["https://a.example"], api_key=KEYS) as server:
        response = server.client.options("/v1/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = server.client.options("/v1/completions", headers={**preflight, "Origin": "https://b.example"})
        assert other.headers.get("access-control-allow-origin") is None
        headers = {"Origin": "https://a.example"}
        refused = server.client.get("/v1/models", headers=headers)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"


def test_request_ids_go_in_and_out() -> None:
    with serve() as server:
        get = server.client.get
        assert get("/health", headers={"X-Request-Id": "abc.DEF-1:2_3"}).headers["x-request-id"] == "abc.DEF-1:2_3"
        first, second = (get("/health").headers["x-request-id"] for _ in range(2))
        assert first != second and len(first) == 32
        for path in ("/nothing", "/v1/models/none"):
            assert get(path, headers={"X-Request-Id": "e"}).headers["x-request-id"] == "e"
        assert server.complete(stream=True).headers["x-request-id"]
        assert get("/health", headers={"X-Request-Id": "{a/b+c=;}"}).headers["x-request-id"] == "{a/b+c=;}"
        for bad in ("", "a b", "a" * 129, "ü".encode(), "a\tb"):
            response = get("/health", headers={"X-Request-Id": bad})
            assert response.status_code == 400 and response.json()["error"]["param"] == "X-Request-Id"
            assert len(response.headers["x-request-id"]) == 32
        # Two requests may have the same: it is the client's name, not the engine's.
        answers = [
            server.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "same"}).json() for _ in range(2)
        ]
        assert answers[0]["id"] != answers[1]["id"]


def test_prompts_are_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("folovllm").propagate = True
    try:
        with caplog.at_level(logging.DEBUG), serve() as server:
            server.complete(prompt="a secret", stop="secret", user="ann")
            server.chat(messages=[{"role": "user", "content": "a secret"}])
            server.complete(prompt="a secret", temperature=-1)
            assert "secret" not in caplog.text
        with caplog.at_level(logging.INFO), serve(log_requests=True) as server:
            response = server.post(
                "/v1/completions",
                {"prompt": "a secret" * 1000, "max_tokens": 1, "user": "ann"},
                headers={"X-Request-Id": "r1"},
            )
            assert response.status_code == 400  # too long: logged all the same
            assert "a secret" in caplog.text and "r1" in caplog.text and "ann" in caplog.text
            assert "more characters" in caplog.text
    finally:
        logging.getLogger("folovllm").propagate = False


def test_a_log_line_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("folovllm").propagate = True
    try:
        with caplog.at_level(logging.INFO), serve(log_requests=True) as server:
            server.complete(prompt="x\nINFO forged", user="y\nforged")
            assert len(caplog.messages) >= 1 and all(
                "\n" not in message for message in caplog.messages if "forged" in message
            )
    finally:
        logging.getLogger("folovllm").propagate = False


def test_dev_mode_adds_reset_prefix_cache() -> None:
    with serve(dev_mode=True) as server:
        assert server.post("/reset_prefix_cache", None).json() == {"success": True}
        server.engine.num_running = 1
        assert server.post("/reset_prefix_cache", None).json() == {"success": False}
        server.engine.num_running = 0
        server.engine.is_dead = True
        server.engine.reset_prefix_cache = server.engine.check_health  # raises as a dead one does
        assert server.post("/reset_prefix_cache", None).status_code == 503


def test_metrics_are_prometheus_text() -> None:
    with serve(metrics=PrometheusStatLogger("fake")) as server:
        response = server.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert "folovllm:num_requests_running" in response.text


def test_served_names() -> None:
    with serve(served_model_name=["a", "org/b"]) as server:
        assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["a", "org/b"]
        assert server.client.get("/v1/models/org/b").json()["id"] == "org/b"
        assert server.complete(model="org/b").json()["model"] == "a"
        assert server.complete(model=None).status_code == 200
        for response in (server.complete(model="fake"), server.chat(model="fake"), server.complete(model="")):
            error = response.json()["error"]
            assert response.status_code == 404
            assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_openapi_describes_requests_and_errors() -> None:
    with serve(api_key=KEYS) as server:
        document = server.client.get("/openapi.json", headers={"Authorization": "Bearer second"}).json()
    text = json.dumps(document)
    assert "422" not in text and "HTTPValidationError" not in text
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200", "400", "500"} <= set(operation["responses"])
            assert (operation.get("security") is None) == (path == "/health")
    schema = document["components"]["schemas"]["CompletionRequest"]
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    generate = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(generate) == {"200", "400", "401", "404", "413", "429", "500", "503"}
    assert "text/event-stream" in generate["200"]["content"]


def test_a_slow_upload_holds_up_nobody() -> None:
    with serve() as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50"
            sock.sendall(head.encode() + b"\r\n\r\n{")
            time.sleep(0.05)
            assert events(server.complete(stream=True).text)[-1] == "[DONE]"
        assert threading.active_count() < 50
