"""`folovllm serve` as a process: what is killed, what is stopped, and what is left then."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from folovllm.entrypoints.openai.local_server import LocalServer
from tests.serve_utils import (
    TIMEOUT_S,
    TINY_ARGS,
    children_of,
    completion,
    engine_pid,
    is_alive,
    is_idle,
    many_connections,
    read_metric,
    read_stream,
    save_tiny_chat_model,
    start_tiny_server,
    wait_for,
)

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes through /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


def open_streams(server: LocalServer, count: int, max_tokens: int) -> tuple[list[threading.Thread], list[Any]]:
    """Start reading `count` streams in threads, and wait until they run; results are text or an exception."""
    results: list[Any] = [None] * count

    def read(number: int) -> None:
        async def main() -> str:
            async with many_connections() as client:
                fields = {"prompt": f"{number}", "max_tokens": max_tokens, "ignore_eos": True}
                return await read_stream(client, server.url, fields)

        try:
            results[number] = asyncio.run(main())
        except Exception as error:
            results[number] = error
        ended[number] = time.monotonic()

    ended: list[float] = [0.0] * count
    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    wait_for(lambda: read_metric(server.url, "num_requests_running") == count, "running streams")
    return threads, [results, ended]


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_killing_the_engine(model: Path) -> None:
    with start_tiny_server(model, "--max-num-seqs", "8") as server:
        threads, (results, ended) = open_streams(server, 4, 4000)
        engine = engine_pid(server)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        join(threads)
        assert max(ended) - killed < 2
        assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 503
        assert all(isinstance(result, RuntimeError) for result in results), results
        assert server.process.wait(TIMEOUT_S) not in (0, None)
        assert not is_alive(engine)


def test_restarting_the_engine(model: Path) -> None:
    with start_tiny_server(model, "--max-num-seqs", "8", "--restart-engine") as server:
        before = completion(server, prompt="x", max_tokens=8, temperature=0)["choices"][0]["text"]
        threads, (results, _) = open_streams(server, 2, 4000)
        engine = engine_pid(server)
        os.kill(engine, signal.SIGKILL)
        join(threads)
        assert all(isinstance(result, Exception) for result in results)
        statuses = set()

        def healthy() -> bool:
            statuses.add(httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code)
            return 200 in statuses and is_alive(server.process.pid) and server.is_healthy()

        wait_for(healthy, "a new engine")
        assert statuses <= {200, 503}
        wait_for(lambda: engine_pid(server) != engine, "a new process")
        assert is_idle(server.url)  # /metrics does not go on showing what the dead engine held
        assert completion(server, prompt="x", max_tokens=8, temperature=0)["choices"][0]["text"] == before
        wait_for(lambda: is_idle(server.url), "an idle server")
        assert server.stop() == 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_under_load(model: Path, signal_number: int) -> None:
    """Running streams are finished; then everything ends, with exit code 0."""
    with start_tiny_server(model, "--max-num-seqs", "8") as server:
        threads, (results, _) = open_streams(server, 4, 1000)
        pids = [server.process.pid, *children_of(server.process.pid)]
        assert len(pids) >= 2
        server.process.send_signal(signal_number)
        join(threads)
        assert all(isinstance(result, str) for result in results), results
        assert server.process.wait(TIMEOUT_S) == 0
        wait_for(lambda: not any(is_alive(pid) for pid in pids), "no process left")


def test_stopping_does_not_wait_for_ever(model: Path) -> None:
    with start_tiny_server(model, "--max-num-seqs", "8", "--shutdown-timeout", "0.2") as server:
        threads, (results, _) = open_streams(server, 8, 4000)
        server.process.send_signal(signal.SIGTERM)
        start_time = time.monotonic()
        assert server.process.wait(TIMEOUT_S) == 0
        assert time.monotonic() - start_time < 10
        join(threads)
        assert any(isinstance(result, Exception) for result in results)


def test_killing_the_server(model: Path) -> None:
    """Nobody can say goodbye; the engine goes all the same."""
    with start_tiny_server(model) as server:
        engine = engine_pid(server)
        server.process.kill()
        wait_for(lambda: not is_alive(engine), "the engine's end", 10)


def test_a_signal_while_the_model_loads(model: Path, tmp_path: Path) -> None:
    """It ends the server at once; the engine, which has hardly begun, follows and removes the sockets' folder."""
    command = [sys.executable, "-m", "folovllm", "serve", str(model), "--port", "0", *TINY_ARGS]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: bool(list(tmp_path.iterdir())) and bool(children_of(process.pid)), "an engine process")
        time.sleep(0.2)
        engines = children_of(process.pid)
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == -signal.SIGTERM
    wait_for(lambda: not any(is_alive(engine) for engine in engines), "the engine's end")
    assert not list(tmp_path.iterdir())


def test_priority_decides_who_is_next(model: Path) -> None:
    order: list[int] = []
    with start_tiny_server(model, "--max-num-seqs", "1", "--scheduling-policy", "priority") as server:

        def ask(priority: int, max_tokens: int) -> None:
            completion(server, prompt="x", max_tokens=max_tokens, ignore_eos=True, priority=priority)
            order.append(priority)

        threads = []
        # The first runs; of those that wait, the one that came last is to be next.
        for priority, max_tokens, waiting in ((0, 600, 0), (5, 100, 1), (-5, 100, 2)):
            threads.append(threading.Thread(target=ask, args=(priority, max_tokens)))
            threads[-1].start()
            wait_for(lambda: read_metric(server.url, "num_requests_running") == 1, "a running request")
            wait_for(lambda n=waiting: read_metric(server.url, "num_requests_waiting") == n, "those that wait")  # type: ignore[misc]
        join(threads)
    assert order == [0, -5, 5]


def test_two_servers_at_once(model: Path) -> None:
    """They share nothing but the machine; and the port of one is refused to a third, before a model is loaded."""
    fields = {"prompt": "x", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    with start_tiny_server(model) as server:
        with start_tiny_server(model, "--max-num-seqs", "4") as other:
            answers = {completion(each, **fields)["choices"][0]["text"] for each in (server, other)}
            assert len(answers) == 1
            assert engine_pid(server) != engine_pid(other)
        assert completion(server, **fields)["choices"][0]["text"] in answers
        command = [sys.executable, "-m", "folovllm", "serve", str(model), *TINY_ARGS, "--port", str(server.port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert result.returncode == 1 and str(server.port) in result.stderr and "Traceback" not in result.stderr
        assert "weights" not in result.stderr


def test_the_engine_in_the_servers_process(model: Path) -> None:
    fields = {"prompt": "x", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    with start_tiny_server(model) as server:
        expected = completion(server, **fields)["choices"][0]["text"]
    with start_tiny_server(model, "--in-process") as server:
        assert children_of(server.process.pid) == []
        assert completion(server, **fields)["choices"][0]["text"] == expected
        assert server.stop() == 0


def test_a_server_of_ones_own_asks_for_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it take the user's: examples would get 401s from it."""
    monkeypatch.setenv("FOLOVLLM_API_KEY", "the-users")
    code = "import os; raise SystemExit('FOLOVLLM_API_KEY' in os.environ and 'it has the key' or 'it has none')"
    with (
        pytest.raises(RuntimeError, match="it has none"),
        LocalServer([], command=[sys.executable, "-c", code]),
    ):
        pass


def test_a_model_that_is_not_there() -> None:
    with (
        pytest.raises(RuntimeError, match=r"exit code 1.*\n.*error: .*nowhere"),
        LocalServer(["/nowhere/at/all", "--device", "cpu"]),
    ):
        pass
