"""How the engine's fronts reach its core (vLLM: `v1/engine/core_client.py`).

LLMEngine -> InprocClient          function calls
AsyncLLM  -> AsyncMPClient         the core in a process of its own, messages over two ZeroMQ sockets
          -> AsyncThreadClient     the core in a thread of this process, for debugging and tests
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.serial import (
    START_HEADER,
    DecodeError,
    EngineDead,
    FromCore,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    ToCore,
    decode_from_core,
    encode,
)
from folovllm.outputs import EngineCoreOutputs
from folovllm.request import EngineCoreRequest
from folovllm.utils.common import init_logger

if TYPE_CHECKING:
    from folovllm.engine.core import EngineCore

CORE_MODULE = "folovllm.engine.core_proc"
"""What the core's process runs."""
SHUTDOWN_SECONDS = 5.0
"""How long the core may take to end by itself before it is killed; a step on the CPU may take seconds."""
MAX_SOCKET_PATH = 100
"""Longest path that Unix gives a socket, with some room."""
START_POLL_MS = 50
"""How often a starting process is looked at, while it loads the model."""

logger = init_logger(__name__)


class InprocClient:
    """The core in this process: each call is a function call."""

    def __init__(self, engine_core: EngineCore) -> None:
        """Take over a started core."""
        self.engine_core = engine_core

    def check_fits(self, request: EngineCoreRequest) -> None:
        """Raise ValueError if the request could never run."""
        self.engine_core.check_fits(request)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request."""
        self.engine_core.add_request(request)

    def get_output(self) -> EngineCoreOutputs:
        """Run a step and return its outputs."""
        return self.engine_core.step()

    def abort_requests(self, request_ids: list[str]) -> None:
        """End requests; unknown ids are ignored."""
        if request_ids:
            self.engine_core.abort_requests(request_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False if requests still hold some."""
        return self.engine_core.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the devices."""
        self.engine_core.shutdown()


class AsyncCoreClient(ABC):
    """A core that runs by itself and is told what to do by messages. Its methods belong to one thread."""

    ready: Ready
    """What the core said of itself when it had started."""
    pid: int | None = None
    """The core's process; None where that is this one."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[FromCore], None] = lambda message: None
        self._on_exit: Callable[[str], None] = lambda reason: None

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[FromCore], None],
        on_exit: Callable[[str], None],
    ) -> None:
        """Call these on `loop` from now on, with each message, and once with the reason when the core has ended.

        What came before is handed over at once. A later call replaces an earlier one, whose loop must be closed.
        """
        self._loop, self._on_message, self._on_exit = loop, on_message, on_exit
        self._attached(loop)

    @abstractmethod
    def _attached(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to deliver on `loop`, beginning with what is there."""

    def _call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the attached loop, if there is one; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback)

    @abstractmethod
    def send(self, message: ToCore) -> None:
        """Send a message, without waiting.

        Raises:
            ValueError: it holds something that cannot travel.
        """

    @abstractmethod
    async def shutdown(self) -> None:
        """Let the core free its devices and end; kill it if it does not. May be called again."""

    @abstractmethod
    def close(self) -> None:
        """End the core at once and release everything. May be called again."""


class AsyncMPClient(AsyncCoreClient):
    """The core in a process of its own.

    The sockets lie in a folder that only this user can enter, so several engines on a host do not meet, and there
    is no port to choose. The front reads its socket on the event loop, without a thread in between.
    """

    def __init__(self, engine_args: EngineArgs, module: str = CORE_MODULE) -> None:
        """Start the process; wait_ready waits until it has loaded the model.

        Args:
            engine_args: what it is to run.
            module: what `python -m` runs; tests have one whose core needs no model.
        """
        import zmq

        super().__init__()
        self._again = zmq.Again
        self._nowait = zmq.NOBLOCK
        folder = _make_socket_folder()
        context: zmq.Context[Any] = zmq.Context()
        self._output = context.socket(zmq.PULL)
        self._input = context.socket(zmq.PUSH)
        for socket in (self._input, self._output):
            socket.set_hwm(0)
        start = Start(engine_args, os.getcwd(), f"ipc://{folder}/input", f"ipc://{folder}/output")
        self._output.bind(start.output_address)
        self._input_address = start.input_address
        self._process = _start_process(module, folder)
        self.pid = self._process.pid
        self._close = weakref.finalize(self, _end_process, self._process, context, folder)
        self._ended = threading.Event()
        threading.Thread(target=self._wait_for_end, name="engine-watch", daemon=True).start()
        self._write_start(start)

    def _write_start(self, start: Start) -> None:
        data = encode(start)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: wait_ready says so
            self._process.stdin.write(START_HEADER.pack(len(data)) + data)
            self._process.stdin.flush()  # and left open: its end tells the process that we are gone

    def _wait_for_end(self) -> None:
        """Thread: wait for the end of the process and tell the event loop."""
        self._process.wait()
        self._ended.set()
        self._call_soon(self._report_end)

    def wait_ready(self) -> None:
        """Wait, however long it takes, until the core has started or failed.

        Raises:
            ValueError: the model or an argument is wrong; the message is the core's own.
            RuntimeError: it failed otherwise, or its process ended.
        """
        while not self._output.poll(START_POLL_MS):
            if self._ended.is_set() and not self._output.poll(0):
                raise RuntimeError(f"{self._describe_end()} It had not finished starting; see its output above.")
        message = decode_from_core(self._output.recv())
        if isinstance(message, StartFailed):
            if message.is_user_error:
                raise ValueError(message.message)
            raise RuntimeError(f"The engine process could not start:\n{message.message}")
        assert isinstance(message, Ready), f"unexpected {type(message).__name__}"
        self.ready = message
        # This end connects, and only now: it has somewhere to queue messages from the first one on.
        self._input.connect(self._input_address)

    def _attached(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_reader(self._output.fileno(), self._read_messages)
        self._read_messages()
        if self._ended.is_set():
            self._call_soon(self._report_end)

    def _read_messages(self) -> None:
        """Deliver all that has come. To the last: ZeroMQ signals only what comes to an empty queue."""
        while not self._output.closed:
            try:
                self._on_message(decode_from_core(self._output.recv(self._nowait)))
            except self._again:
                return
            except DecodeError as error:
                self._on_exit(f"The engine process sent what is no message: {error}")

    def _report_end(self) -> None:
        self._read_messages()  # the reason may be among them
        self._on_exit(self._describe_end())

    def _describe_end(self) -> str:
        code = self._process.returncode
        how = f"with exit status {code}"
        if code < 0:
            names = {member.value: member.name for member in signal.Signals}  # most real-time signals have none
            how = f"by signal {names.get(-code, -code)}"
        return f"The engine process {self.pid} ended {how}."

    def send(self, message: ToCore) -> None:
        """See AsyncCoreClient; a message to a process that has ended is lost."""
        self._input.send(encode(message), self._nowait)

    async def shutdown(self) -> None:
        """See AsyncCoreClient."""
        if self._close.alive and not self._ended.is_set():
            self.send(Shutdown())
            await asyncio.to_thread(self._ended.wait, SHUTDOWN_SECONDS)
            if not self._ended.is_set():
                logger.warning("The engine process %d is busy; killing it.", self.pid)
        self.close()

    def close(self) -> None:
        """See AsyncCoreClient."""
        self._on_exit = lambda reason: None
        if self._close.alive and self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._output.fileno())
        self._close()


def _make_socket_folder() -> str:
    """Return a new folder of mode 0700 whose path leaves room for a socket's name."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > MAX_SOCKET_PATH - len("/folovllm-01234567/output"):
        parent = "/tmp"
    return tempfile.mkdtemp(prefix="folovllm-", dir=parent)


def _start_process(module: str, folder: str) -> subprocess.Popen[bytes]:
    """Start `python -m module`, which finds its modules where this process does.

    `-m` puts the working directory in front of them, where a file of the user might have the name of a module. So
    it starts in the empty `folder`, and goes to the right directory when its modules are there. The argument is for the
    case that this process ends before it has said anything: the sockets' folder is then the child's to remove.
    """
    search_path = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    env = {**os.environ, "PYTHONPATH": search_path}
    optimize = ["-O"] * sys.flags.optimize
    command = [sys.executable, *optimize, "-m", module, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, cwd=folder)


def _end_process(process: subprocess.Popen[bytes], context: Any, folder: str) -> None:
    """Kill the process if it still runs; free the sockets and their folder. Also run when the interpreter exits."""
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # where not even Start could be written
        process.stdin.close()
    context.destroy(linger=0)
    shutil.rmtree(folder, ignore_errors=True)


class AsyncThreadClient(AsyncCoreClient):
    """The core in a thread of this process: breakpoints work, and nothing is encoded."""

    def __init__(self, core: EngineCore, startup_report: str = "") -> None:
        """Take over a started core."""
        super().__init__()
        self.ready = Ready(core.kv_cache_config.num_blocks, core.async_scheduling, startup_report)
        self._inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self._outbox: deque[FromCore] = deque()
        self._core = core
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _end_thread, self._thread, self._inbox)

    def _run(self) -> None:
        """Thread: the same loop as in a process."""
        from folovllm.engine.core_proc import CoreLoop

        try:
            CoreLoop(self._core, self._receive, self._push).run()
            self._core.shutdown()
        except Exception:
            logger.exception("The engine cannot go on.")
            self._push(EngineDead(traceback.format_exc()))

    def _receive(self, wait_s: float | None) -> list[ToCore]:
        messages: list[ToCore] = []
        try:
            messages.append(self._inbox.get(block=wait_s != 0.0, timeout=wait_s))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def _push(self, message: FromCore) -> None:
        self._outbox.append(message)
        self._call_soon(self._deliver)

    def _attached(self, loop: asyncio.AbstractEventLoop) -> None:
        self._deliver()

    def _deliver(self) -> None:
        while self._outbox:
            self._on_message(self._outbox.popleft())

    def send(self, message: ToCore) -> None:
        """See AsyncCoreClient."""
        self._inbox.put(message)

    async def shutdown(self) -> None:
        """See AsyncCoreClient; a thread cannot be killed, so this waits for its step."""
        self.send(Shutdown())
        await asyncio.to_thread(self._thread.join)
        self._close.detach()

    def close(self) -> None:
        """See AsyncCoreClient."""
        self._close()


def _end_thread(thread: threading.Thread, inbox: queue.SimpleQueue[ToCore]) -> None:
    inbox.put(Shutdown())
    thread.join(SHUTDOWN_SECONDS)
