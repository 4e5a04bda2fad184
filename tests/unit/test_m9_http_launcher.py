"""Flags, sockets, signals, the engine's death: from the command line to the exit code."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from folovllm.entrypoints.cli import serve as serve_command
from folovllm.entrypoints.cli.common import UsageError
from folovllm.entrypoints.cli.main import main, make_parser
from folovllm.entrypoints.openai import launcher
from folovllm.entrypoints.openai.api_server import build_app
from folovllm.entrypoints.openai.launcher import Launcher, address, bind_socket
from folovllm.entrypoints.openai.settings import ServerSettings
from tests.http_utils import FakeEngine, events, wait_until


def parse(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["serve", *argv])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What run_server was called with, instead of being run."""
    calls: list[Any] = []
    monkeypatch.setattr(launcher, "run_server", lambda args, settings: calls.append((args, settings)) or 0)
    return calls


def test_flags_become_arguments(started: list[Any]) -> None:
    argv = ["some/model", "--port", "0", "--api-key", "a", "b", "--max-num-seqs", "7", "--stream-interval", "3"]
    argv += ["--dev-mode", "--shutdown-timeout", "1.5", "--served-model-name", "x", "y"]
    assert serve_command.run(parse(*argv)) == 0
    args, settings = started[0]
    assert (args.model, args.max_num_seqs, args.disable_log_stats) == ("some/model", 7, False)
    assert settings == ServerSettings(
        port=0,
        api_key=["a", "b"],
        stream_interval=3,
        dev_mode=True,
        shutdown_timeout=1.5,
        served_model_name=["x", "y"],
    )
    serve_command.run(parse())
    assert (started[1][0].model, started[1][1]) == ("smollm2-135m-instruct", ServerSettings())
    serve_command.run(parse("--model", "m"))
    assert started[2][0].model == "m"


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "--model", "other"],
        ["--port", "70000"],
        ["--max-n", "0"],
        ["--isolate-prefix-cache"],
        ["--ssl-keyfile", "k"],
        ["--chat-template", "no-such-file"],
    ],
)
def test_wrong_flags_are_usage_errors(started: list[Any], argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        serve_command.run(parse(*argv))
    assert main(["serve", *argv]) == 2
    assert not started and capsys.readouterr().err.startswith("error: ")


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in ServerSettings.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r'pip install "folovllm\[server\]"'):
        serve_command.run(parse())


def test_help_needs_no_server_packages() -> None:
    code = """
import sys
from folovllm.entrypoints.cli.main import main
try:
    main(["serve", "--help"])
except SystemExit:
    pass
heavy = {"fastapi", "uvicorn", "pydantic", "prometheus_client", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- Sockets ----


def test_a_taken_port_is_told_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher.AsyncLLM, "from_engine_args", lambda *a, **k: pytest.fail("started"))
    monkeypatch.delenv("FOLOVLLM_DEBUG", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(port) in error and "in use" in error
    for host in ("no such host", "203.0.113.1", "x" * 300):
        assert main(["serve", "--host", host]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--" not in error and "cannot listen" in error


def test_addresses() -> None:
    with contextlib.closing(bind_socket(ServerSettings(port=0))) as sock:
        assert address(sock, ServerSettings(port=0)) == f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        sock = bind_socket(ServerSettings(host="::1", port=0))
    except OSError:
        return  # a machine without IPv6
    with contextlib.closing(sock):
        assert address(sock, ServerSettings(port=0)).startswith("http://[::1]:")


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    settings = ServerSettings(uds=str(path))
    bind_socket(settings).close()  # left behind
    with contextlib.closing(bind_socket(settings)) as sock:
        sock.listen()
        with pytest.raises(OSError, match="another server"):
            bind_socket(settings)
    path.unlink()
    path.write_text("a file")
    with pytest.raises(OSError, match="file of that name"):
        bind_socket(settings)
    assert path.read_text() == "a file"
    with pytest.raises(OSError, match="cannot listen"):
        bind_socket(ServerSettings(uds=str(tmp_path / "no" / "s")))


# ---- Running ----


class Running:
    """A Launcher over fake engines in this thread, and a script of what happens to it in another."""

    def __init__(self, settings: ServerSettings, make_engine: Callable[[], FakeEngine] = FakeEngine) -> None:
        self.engine = make_engine()
        self.engines = [self.engine]
        self.sock = bind_socket(settings)
        app = build_app(self.engine, settings, None)
        timeout = int(settings.shutdown_timeout) + launcher.CANCEL_GRACE_S
        config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=timeout)

        def start() -> Any:
            self.engines.append(make_engine())
            return self.engines[-1]

        self.server = launcher._Server(config)
        self.launcher = Launcher(self.server, app.state.serving, settings, start)
        if settings.uds is None:
            self.url = address(self.sock, settings)
            self.client = httpx.Client(base_url=self.url, timeout=20)
        else:
            self.client = httpx.Client(transport=httpx.HTTPTransport(uds=settings.uds), base_url="http://x", timeout=20)

    def run(self, script: Callable[[], None]) -> int:
        """Serve until stopped; `script` runs meanwhile. Return the exit code."""
        errors: list[BaseException] = []

        def in_thread() -> None:
            try:
                wait_until(lambda: self.server.started)
                script()
            except BaseException as error:
                errors.append(error)
                self.server.should_exit = self.server.force_exit = True

        thread = threading.Thread(target=in_thread)
        thread.start()
        try:
            code = asyncio.run(asyncio.wait_for(self.launcher.run(self.sock), 30))
        finally:
            thread.join(20)
            self.client.close()
            self.sock.close()
        if errors:
            raise errors[0]
        return code


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launcher, "DEATH_GRACE_S", 0.3)
    monkeypatch.setattr(launcher, "CANCEL_GRACE_S", 1)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def slow_engine() -> FakeEngine:
    engine = FakeEngine(words=["w"] * 20)
    engine.delay_s = 0.05
    return engine


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(number: signal.Signals) -> None:
    running = Running(ServerSettings(port=0), slow_engine)
    texts: list[str] = []

    def script() -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 20}
        with running.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_text()
            texts.append(next(lines))
            os.kill(os.getpid(), number)
            wait_until(lambda: running.server.should_exit)
            time.sleep(0.25)
            with pytest.raises(httpx.ConnectError):
                httpx.get(running.url + "/health", timeout=5)
            texts.extend(lines)

    assert running.run(script) == 0
    assert events("".join(texts))[-1] == "[DONE]" and "".join(texts).count('"w"') == 20
    assert running.engine.num_shutdowns >= 1 and running.engine.num_running == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_requests_that_take_too_long_are_ended(signals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(words=["w"] * 100000)
    engine.delay_s = 0.01
    stopped = threading.Event()

    async def shutdown(timeout_s: float = 0.0) -> None:
        engine.num_shutdowns += 1
        stopped.set()

    def abort(index: int) -> None:
        if stopped.is_set():
            raise engine.dead_error  # what streams see of an engine that has been shut down

    engine.gate = abort
    monkeypatch.setattr(engine, "shutdown", shutdown)
    running = Running(ServerSettings(port=0, shutdown_timeout=0.5 if signals == 1 else 60.0), lambda: engine)
    texts: list[str] = []

    def script() -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 400}
        with running.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_text()
            texts.append(next(lines))
            for i in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(lambda: running.launcher._stop_task is not None)
                time.sleep(0.1 * (i + 1))
            with contextlib.suppress(httpx.TransportError):  # the second signal waits for nobody
                texts.extend(lines)

    began = time.monotonic()
    assert running.run(script) == 0
    assert time.monotonic() - began < 10 and stopped.is_set()
    if signals == 1:
        assert "error" in events("".join(texts))[-1]


def test_the_engines_death_is_told_and_ends_the_server() -> None:
    running = Running(ServerSettings(port=0))
    statuses: list[int] = []

    def script() -> None:
        running.engine.is_dead = True
        statuses.append(running.client.get("/health").status_code)
        statuses.append(running.client.post("/v1/completions", json={"prompt": "a"}).status_code)

    assert running.run(script) == 1
    assert statuses == [503, 503] and len(running.engines) == 1


def test_restart_engine_starts_another_and_gives_up_in_the_end() -> None:
    running = Running(ServerSettings(port=0, restart_engine=True))

    def script() -> None:
        for number in range(1, launcher.MAX_RESTARTS + 1):
            running.engines[-1].is_dead = True
            wait_until(lambda n=number: len(running.engines) == n + 1)  # type: ignore[misc]
            wait_until(lambda: running.client.get("/health").status_code == 200)
            answer = running.client.post("/v1/completions", json={"prompt": "a"}).json()
            assert answer["choices"][0]["text"] == "Hello world"
        running.engines[-1].is_dead = True

    assert running.run(script) == 1
    assert len(running.engines) == launcher.MAX_RESTARTS + 1
    assert all(engine.num_shutdowns >= 1 for engine in running.engines)


@pytest.mark.parametrize("error", [ValueError("no memory"), KeyError("weights")])
def test_an_engine_that_does_not_start_again_ends_the_server(error: Exception) -> None:
    engines = iter([FakeEngine()])

    def make() -> FakeEngine:
        try:
            return next(engines)
        except StopIteration:
            raise error from None

    running = Running(ServerSettings(port=0, restart_engine=True), make)

    def script() -> None:
        running.engine.is_dead = True

    assert running.run(script) == 1


def test_serving_on_a_unix_socket(tmp_path: Path) -> None:
    running = Running(ServerSettings(uds=str(tmp_path / "s")))

    def script() -> None:
        assert running.client.get("/health").status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)

    assert running.run(script) == 0
