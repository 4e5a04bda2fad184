"""The engine core's process: how it starts, fails, dies and ends, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.engine import core_client
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.core_client import AsyncMPClient
from folovllm.engine.core_proc import CoreLoop, remove_socket_folder
from folovllm.engine.protocol import EngineDeadError
from folovllm.engine.serial import AbortRequests, AddRequests, FromCore, Shutdown, StepOutputs, ToCore
from folovllm.outputs import RequestOutput
from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import RequestOutputKind
from tests.fake_engine import (
    BROKEN_MODEL,
    KILLED_MODEL,
    STEP_SECONDS,
    WRONG_MODEL,
    fake_async_llm,
    start_fake_core,
)
from tests.tiny_models import save_tiny_model

TIMEOUT_S = 30.0
LONG = SamplingParams(max_tokens=4000, output_kind=RequestOutputKind.DELTA)


@pytest.fixture(autouse=True)
def own_temp_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sockets go into a folder that must be empty afterwards. Not tmp_path: that may be too long for a socket."""
    tmp_path_factory.getbasetemp()  # pytest's own is chosen before this test's
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert not list(Path(folder).glob("folovllm-*"))


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for `condition`; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


async def collect(engine: AsyncLLM, prompt: Any, params: SamplingParams, request_id: str) -> list[RequestOutput]:
    """Return every output of a request."""
    return [output async for output in engine.generate(prompt, params, request_id)]


def run(coroutine: Any) -> Any:
    """Run a coroutine that must end in time."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, TIMEOUT_S)

    return asyncio.run(limited())


def pid_of(engine: AsyncLLM) -> int:
    """Return the core's process id."""
    assert engine.core_client.pid is not None
    return engine.core_client.pid


# ---- The loop ----


def test_the_loop_waits_when_there_is_no_work_and_looks_in_between_when_there_is() -> None:
    core, _ = start_fake_core(EngineArgs(model="fake"))
    params = SamplingParams(max_tokens=3, seed=0)
    script: list[list[ToCore]] = [
        [AddRequests([EngineCoreRequest("a", [5, 6], params, 0.0)])],
        [],
        [AddRequests([EngineCoreRequest("b", [5, 6], SamplingParams(max_tokens=99, seed=0), 0.0)])],
        [],
        [AbortRequests(["b", "unknown"])],
        [Shutdown()],
    ]
    waits: list[float | None] = []
    sent: list[FromCore] = []

    def receive(wait_s: float | None) -> list[ToCore]:
        waits.append(wait_s)
        return script.pop(0)

    CoreLoop(core, receive, sent.append).run()
    assert waits == [None, 0.0, 0.0, 0.0, 0.0, None]
    ids = [
        output.request_id for message in sent if isinstance(message, StepOutputs) for output in message.outputs.outputs
    ]
    assert ids == ["a", "a", "a", "b", "b"]
    core.shutdown()


# ---- Start ----


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (WRONG_MODEL, ValueError, "^model='wrong-model' is wrong.$"),
        (BROKEN_MODEL, RuntimeError, "(?s)could not start.*Traceback.*KeyError: 'model.weights'"),
        (KILLED_MODEL, RuntimeError, "ended with exit status 7. It had not finished starting"),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(model: str, error: type[Exception], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message):
        fake_async_llm(EngineArgs(model=model))
    assert time.monotonic() - started < 20.0


def test_a_model_that_is_not_there_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        AsyncLLM.from_engine_args(EngineArgs(model=str(tmp_path / "nowhere")))


def test_the_socket_folder_is_private_and_its_path_short(
    own_temp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(core_client._make_socket_folder())
    assert folder.parent == own_temp_folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    deep = own_temp_folder / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = Path(core_client._make_socket_folder())
    assert len(str(folder / "output")) < core_client.MAX_SOCKET_PATH
    folder.rmdir()


def test_modules_in_the_working_directory_are_not_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('wrong module')")
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    engine = fake_async_llm()
    assert Path(f"/proc/{pid_of(engine)}/cwd").resolve() == tmp_path.resolve()
    run(engine.shutdown())


# ---- Death ----


def test_every_stream_fails_within_two_seconds_when_the_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_SECONDS, "0.005")
    engine = fake_async_llm()

    async def check() -> None:
        tasks = [asyncio.create_task(collect(engine, f"{i}", LONG, str(i))) for i in range(20)]
        death = asyncio.create_task(engine.wait_dead())
        await asyncio.sleep(0.1)
        os.kill(pid_of(engine), signal.SIGKILL)
        killed = time.monotonic()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await death
        assert time.monotonic() - killed < 2.0
        assert {type(result) for result in results} == {EngineDeadError}
        assert "SIGKILL" in str(results[0])
        assert engine.errored
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        with pytest.raises(EngineDeadError):
            await collect(engine, "more", LONG, "more")
        await engine.shutdown()
        again = fake_async_llm()  # as a server that restarts its engine does
        assert (await collect(again, "x", SamplingParams(max_tokens=3), "0"))[-1].finished
        await again.shutdown()

    run(check())


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, "by signal 37")])
def test_a_death_while_nobody_listens_is_seen_by_the_next_call(number: int, name: str) -> None:
    engine = fake_async_llm()
    os.kill(pid_of(engine), number)
    wait_until(lambda: not is_alive(pid_of(engine)))

    async def check() -> None:
        await asyncio.wait_for(engine.wait_dead(), 2.0)
        with pytest.raises(EngineDeadError, match=name):
            await engine.check_health()
        await engine.shutdown()

    run(check())


def test_bytes_that_are_no_message_kill_the_engine_not_the_front() -> None:
    engine = fake_async_llm()

    async def check() -> None:
        await engine.check_health()
        client = engine.core_client
        assert isinstance(client, AsyncMPClient)
        client._input.send(b"\x93nonsense")
        await asyncio.wait_for(engine.wait_dead(), 5.0)
        with pytest.raises(EngineDeadError, match="no message"):
            await engine.check_health()
        await engine.shutdown()

    run(check())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_leave_the_core_to_its_front(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STEP_SECONDS, "0.005")
    engine = fake_async_llm()

    async def check() -> None:
        task = asyncio.create_task(collect(engine, "x", SamplingParams(max_tokens=100), "0"))
        await asyncio.sleep(0.02)
        os.kill(pid_of(engine), number)
        assert (await task)[-1].outputs[0].finish_reason == "length"
        await engine.shutdown()

    run(check())
    assert not is_alive(pid_of(engine))


PARENT = """
    import asyncio, sys, time
    from folovllm import SamplingParams
    from tests.fake_engine import fake_async_llm

    engine = fake_async_llm()

    async def main() -> None:
        stream = engine.generate("x", SamplingParams(max_tokens=4000), "0")
        await anext(stream)
        print(engine.core_client.pid, flush=True)
        {end}

    asyncio.run(main())
"""


def start_parent(end: str) -> tuple[subprocess.Popen[str], int]:
    """Start a program with a busy engine; return it and the pid of the engine's process."""
    source = textwrap.dedent(PARENT).format(end=end)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), STEP_SECONDS: "0.02"}
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(3)", "raise KeyError"])
def test_the_process_never_outlives_its_parent(end: str, own_temp_folder: Path) -> None:
    parent, pid = start_parent(end)
    try:
        if end.startswith("time"):
            assert is_alive(pid)
            parent.kill()
        parent.wait(20)
        wait_until(lambda: not is_alive(pid), 5.0)
        wait_until(lambda: not list(own_temp_folder.glob("folovllm-*")), 5.0)
    finally:
        parent.kill()
        parent.communicate()


def test_a_front_that_ends_before_it_says_anything_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    folder = core_client._make_socket_folder()
    (Path(folder) / "output").touch()  # bound before the process is started
    process = core_client._start_process(core_client.CORE_MODULE, folder)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert not Path(folder).exists()


def test_a_socket_that_is_bound_while_the_folder_is_removed_goes_with_it(
    own_temp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_temp_folder / "folovllm-x"
    folder.mkdir()
    (folder / "output").touch()
    rmdir, late = Path.rmdir, ["input"]

    def bind_then_rmdir(self: Path) -> None:
        while late:
            (self / late.pop()).touch()
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", bind_then_rmdir)
    remove_socket_folder(folder)
    assert not late and not folder.exists()


def test_what_is_not_a_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    remove_socket_folder(tmp_path)
    remove_socket_folder(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "SHUTDOWN_SECONDS", 0.3)
    monkeypatch.setenv(STEP_SECONDS, "30")
    engine = fake_async_llm()

    async def check() -> None:
        task = asyncio.create_task(collect(engine, "x", LONG, "0"))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - started < 5.0
        assert (await task)[-1].outputs[0].finish_reason == "abort"

    run(check())
    assert not is_alive(pid_of(engine))


def test_two_engines_side_by_side() -> None:
    engines = [fake_async_llm(), fake_async_llm()]
    params = SamplingParams(max_tokens=50)

    async def check() -> None:
        outputs = await asyncio.gather(*(collect(engine, "same prompt", params, "same id") for engine in engines))
        assert outputs[0][-1].outputs[0].token_ids == outputs[1][-1].outputs[0].token_ids
        os.kill(pid_of(engines[0]), signal.SIGKILL)
        await asyncio.wait_for(engines[0].wait_dead(), 2.0)
        assert (await collect(engines[1], "same prompt", params, "2"))[-1].outputs[0].finish_reason == "length"
        await asyncio.gather(*(engine.shutdown() for engine in engines))

    run(check())
    assert not any(is_alive(pid_of(engine)) for engine in engines)


# ---- A real model ----


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, "llama")
    return str(folder)


REAL_ARGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 128,
    "num_gpu_blocks_override": 64,
    "use_tqdm_on_load": False,
}
REAL_PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(seed=7, max_tokens=12, n=3, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3, logit_bias={9: 5.0}, ignore_eos=True),
    SamplingParams(max_tokens=12, stop_token_ids=[50]),  # its seed is drawn by the engine
]


@pytest.mark.parametrize("in_process", [False, True])
def test_a_real_model_says_the_same_as_offline(tiny_model: str, in_process: bool) -> None:
    prompts = [{"prompt_token_ids": [3 + i, 4, 5, 60 + i]} for i in range(len(REAL_PARAMS))]
    llm = LLM(tiny_model, **REAL_ARGS)
    # One after the other, here and there: the last bits of a logprob depend on the batch.
    expected = [llm.generate(p, params, use_tqdm=False)[0] for p, params in zip(prompts, REAL_PARAMS, strict=True)]
    engine = AsyncLLM.from_engine_args(EngineArgs(model=tiny_model, **REAL_ARGS), in_process=in_process)
    assert (engine.core_client.pid is None) == in_process

    async def check() -> list[RequestOutput]:
        outputs = []
        for i, (prompt, params) in enumerate(zip(prompts, REAL_PARAMS, strict=True)):
            final = params.clone()
            final.output_kind = RequestOutputKind.FINAL_ONLY
            outputs.append((await collect(engine, prompt, final, str(i)))[-1])
        await engine.shutdown()
        return outputs

    assert run(check()) == expected


@pytest.mark.parametrize("in_process", [False, True])
def test_a_real_start_that_fails_says_what_offline_says(tiny_model: str, in_process: bool) -> None:
    args = EngineArgs(model=tiny_model, **{**REAL_ARGS, "num_gpu_blocks_override": 3})
    with pytest.raises(ValueError) as offline:
        LLM(tiny_model, **{**REAL_ARGS, "num_gpu_blocks_override": 3})
    with pytest.raises(ValueError) as served:
        AsyncLLM.from_engine_args(args, in_process=in_process)
    assert str(served.value) == str(offline.value)
