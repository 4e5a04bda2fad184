"""The engine core's own process, and the loop that it runs (vLLM: EngineCoreProc in `v1/engine/core.py`).

AsyncMPClient starts `python -m folovllm.engine.core_proc` and writes one Start message to its stdin. The process
answers Ready or StartFailed, then takes messages and steps the core:

    read messages -> step the core -> push what it brought -> ...       and while there is no work: wait for a message

One thread does all of it. Reading and pushing take some 10 microseconds of a step; a second thread would have to
take turns with this one anyway, since both need the interpreter's lock.

Its life hangs on its parent's: stdin stays open, and when it ends, the parent is gone, however it died. That is why
SIGINT and SIGTERM are ignored here. Ctrl-C and systemd signal every process of a group, while the parent still wants
to finish its requests; it sends Shutdown when it is done with them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import zmq

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.serial import (
    START_HEADER,
    AbortRequests,
    AddRequests,
    EngineDead,
    FromCore,
    PrefixCacheReset,
    Ready,
    RequestsFailed,
    ResetPrefixCache,
    Shutdown,
    Start,
    StartFailed,
    StepOutputs,
    ToCore,
    decode_start,
    decode_to_core,
    encode,
)
from folovllm.utils.common import init_logger

PARENT_CHECK_SECONDS = 1.0
"""How often the parent's process id is looked at, should something else keep stdin open."""
REMOVALS = 10
"""How often the removal of the sockets' folder is tried: each socket can get in its way once."""
FLUSH_MS = 2000
"""How long the last messages may take to reach the front."""

logger = init_logger(__name__)


def start_core(engine_args: EngineArgs) -> tuple[EngineCore, str]:
    """Load the model; return the core and the start-up report.

    Raises:
        ValueError: anything that is wrong with the arguments or the model.
    """
    from folovllm.executor.gpu_executor import UniProcExecutor

    started = time.perf_counter()
    source = engine_args.resolve_model_source()
    vllm_config = engine_args.create_engine_config(source)
    seconds = {"resolve model": time.perf_counter() - started}
    executor = UniProcExecutor(vllm_config, source, engine_args.use_tqdm_on_load)
    load_tokenizer = None if engine_args.skip_tokenizer_init else source.tokenizer
    core = EngineCore(vllm_config, executor, not engine_args.disable_log_stats, load_tokenizer)
    return core, core.startup_report(seconds)


class CoreLoop:
    """Steps a core while it has work, and does what messages say in between. Belongs to one thread."""

    def __init__(
        self,
        core: EngineCore,
        receive: Callable[[float | None], list[ToCore]],
        send: Callable[[FromCore], None],
    ) -> None:
        """Make the loop.

        Args:
            core: started.
            receive: returns the messages that have come; where there are none it waits for one as many seconds as
                it is told (None: for ever).
            send: takes a message to the front, without blocking.
        """
        self.core = core
        self._receive = receive
        self._send = send

    def run(self) -> None:
        """Serve until Shutdown comes; raises whatever a step raises."""
        while True:
            has_work = self.core.scheduler.has_requests()
            for message in self._receive(0.0 if has_work else None):
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            if self.core.scheduler.has_requests():
                outputs = self.core.step()
                if outputs.outputs or outputs.scheduler_stats is not None:
                    self._send(StepOutputs(outputs))

    def _handle(self, message: ToCore) -> None:
        if isinstance(message, AddRequests):
            self._add_requests(message)
        elif isinstance(message, AbortRequests):
            self.core.abort_requests(message.request_ids)
        elif isinstance(message, ResetPrefixCache):
            self._send(PrefixCacheReset(message.call_id, self.core.reset_prefix_cache()))
        else:
            raise AssertionError(f"unexpected {type(message).__name__}")

    def _add_requests(self, message: AddRequests) -> None:
        """Queue requests, all or none; what goes wrong with them ends them alone."""
        added: list[str] = []
        try:
            for request in message.requests:
                self.core.add_request(request)
                added.append(request.request_id)
        except Exception as error:
            self.core.abort_requests(added)
            is_user_error = isinstance(error, ValueError)
            text = str(error) if is_user_error else traceback.format_exc()
            self._send(RequestsFailed([request.request_id for request in message.requests], text, is_user_error))


class _Link:
    """The core's ends of the two ZeroMQ sockets."""

    def __init__(self, start: Start) -> None:
        self._context = zmq.Context()
        self._input = self._context.socket(zmq.PULL)
        self._output = self._context.socket(zmq.PUSH)
        for socket in (self._input, self._output):
            socket.set_hwm(0)  # no limit: sending never blocks, and nothing is dropped
        self._input.bind(start.input_address)
        self._output.connect(start.output_address)

    def receive(self, wait_s: float | None) -> list[ToCore]:
        """See CoreLoop."""
        if wait_s != 0.0:
            self._input.poll(None if wait_s is None else int(wait_s * 1000))
        messages: list[ToCore] = []
        while True:
            try:
                messages.append(decode_to_core(self._input.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: FromCore) -> None:
        """Push a message; never blocks."""
        self._output.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Wait until the front has what was sent, FLUSH_MS at most."""
        self._context.destroy(linger=FLUSH_MS)


def main(start_core: Callable[[EngineArgs], tuple[EngineCore, str]] = start_core) -> None:
    """Run the process: start the core and serve; exits 0 after Shutdown, 1 otherwise.

    `start_core` is replaced by tests whose core has no model.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        start = _read_start()
    except EOFError:
        for folder in map(Path, sys.argv[1:]):  # the front ended before it said anything
            remove_socket_folder(folder)
        raise SystemExit("folovllm.engine.core_proc is started by AsyncLLM; it is no command of its own.") from None
    os.chdir(start.working_dir)
    folder = Path(start.input_address.removeprefix("ipc://")).parent
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), name="parent-watch", daemon=True).start()
    link = _Link(start)
    try:
        core, report = start_core(start.engine_args)
    except Exception as error:
        is_user_error = isinstance(error, ValueError)
        link.send(StartFailed(str(error) if is_user_error else traceback.format_exc(), is_user_error))
        _exit(link, 1)
    link.send(Ready(core.kv_cache_config.num_blocks, core.async_scheduling, report))
    try:
        CoreLoop(core, link.receive, link.send).run()
    except Exception:
        logger.exception("The engine cannot go on.")
        link.send(EngineDead(traceback.format_exc()))
        _exit(link, 1)
    core.shutdown()
    _exit(link, 0)


def _exit(link: _Link, code: int) -> NoReturn:
    """End the process now, whatever other threads do; a failed CUDA step may never let the interpreter finish."""
    link.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _read_start() -> Start:
    """Read the Start message from stdin, and nothing after it."""
    (length,) = START_HEADER.unpack(_read_exactly(START_HEADER.size))
    return decode_start(_read_exactly(length))


def _read_exactly(num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        chunk = os.read(0, num_bytes - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def _end_with_parent(parent_pid: int, folder: Path) -> None:
    """Wait for the end of stdin or a change of parent; then remove the sockets' folder and end the process."""
    while True:
        readable, _, _ = select.select([0], [], [], PARENT_CHECK_SECONDS)
        if (readable and not os.read(0, 1)) or os.getppid() != parent_pid:
            remove_socket_folder(folder)
            os._exit(1)


def remove_socket_folder(folder: Path) -> None:
    """Remove the folder of the sockets `input` and `output`, and nothing that is not theirs.

    Again where one has appeared meanwhile: the main thread may be about to bind its own when the parent ends.
    """
    for _ in range(REMOVALS):
        with contextlib.suppress(OSError):
            for name in ("input", "output"):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        if not folder.exists():
            return


if __name__ == "__main__":
    main()
