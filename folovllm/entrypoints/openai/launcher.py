"""From the command line to a running server, and down again (vLLM: `entrypoints/launcher.py`).

    bind the socket -> start the engine -> serve -> SIGTERM: let requests finish -> stop the engine -> exit 0

The socket comes first: a port that is taken is told at once, not after the model is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator

import uvicorn

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.openai.api_server import build_app
from folovllm.entrypoints.openai.serving import OpenAIServing
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.metrics.prometheus import PrometheusStatLogger
from folovllm.utils.common import init_logger

logger = init_logger(__name__)

DEATH_GRACE_S = 3.0
"""How long a server whose engine has died goes on saying so (503) before it exits: load balancers notice."""
CANCEL_GRACE_S = 5
"""After running requests were ended at shutdown: seconds for their last chunks to reach their clients."""
MAX_RESTARTS = 3
"""Engine deaths within RESTART_WINDOW_S after which --restart-engine gives up."""
RESTART_WINDOW_S = 600.0
EXIT_ENGINE_DEAD = 1


def run_server(engine_args: EngineArgs, settings: ServerSettings) -> int:
    """Serve until a signal or the engine's death; return the exit code: 0, or EXIT_ENGINE_DEAD.

    Raises:
        ValueError: an argument or the model cannot be used.
        OSError: the address cannot be listened on; nothing was started.
    """
    sock = bind_socket(settings)
    with contextlib.closing(sock), _removed_at_end(settings.uds):
        name = (settings.served_model_name or [engine_args.model])[0]
        metrics = PrometheusStatLogger(name)

        def start_engine() -> AsyncLLM:
            return AsyncLLM.from_engine_args(
                engine_args,
                stat_loggers=[metrics],
                in_process=settings.in_process,
                stream_interval=settings.stream_interval,
            )

        engine = start_engine()
        app = build_app(engine, settings, metrics)
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="on",
            access_log=not settings.disable_access_log,
            server_header=False,
            timeout_keep_alive=settings.timeout_keep_alive,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + CANCEL_GRACE_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        launcher = Launcher(_Server(config), app.state.serving, settings, start_engine)
        loop = (config.get_loop_factory() or asyncio.new_event_loop)()
        try:
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(launcher.run(sock))
        finally:
            asyncio.set_event_loop(None)
            loop.close()


class _Server(uvicorn.Server):
    """Leaves signals to the launcher: uvicorn knows nothing of the engine, and raises them again when it is done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


class Launcher:
    """Runs a server with its engine: signals, the engine's death, the end."""

    def __init__(
        self,
        server: uvicorn.Server,
        serving: OpenAIServing,
        settings: ServerSettings,
        start_engine: Callable[[], AsyncLLM],
    ) -> None:
        """`start_engine`: makes the next engine under --restart-engine."""
        self.server = server
        self.serving = serving
        self.settings = settings
        self.start_engine = start_engine
        self.exit_code = 0
        self._stop_task: asyncio.Task[None] | None = None

    async def run(self, sock: socket.socket) -> int:
        """Serve on `sock`; return the exit code once everything has been stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        watcher = loop.create_task(self._watch_engine())
        logger.info("Serving %s on %s", ", ".join(self.serving.model_names), address(sock, self.settings))
        try:
            await self.server.serve(sockets=[sock])
        finally:
            tasks = [task for task in (watcher, self._stop_task) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.serving.engine.shutdown()
        return self.exit_code

    def _on_signal(self) -> None:
        """First signal: finish what runs, within --shutdown-timeout. Second: end it now."""
        if self._stop_task is None:
            logger.info(
                "Shutting down: %d sequences may go on for up to %g s.",
                self.serving.num_sequences,
                self.settings.shutdown_timeout,
            )
            self.server.should_exit = True
            self._stop_task = asyncio.ensure_future(self._end_requests(self.settings.shutdown_timeout))
        else:
            self.server.force_exit = True
            self._stop_task.cancel()
            self._stop_task = asyncio.ensure_future(self._end_requests(0.0))

    async def _end_requests(self, delay_s: float) -> None:
        """End what still runs after a while: its streams get an error as their last event."""
        await asyncio.sleep(delay_s)
        await self.serving.engine.shutdown()

    async def _watch_engine(self) -> None:
        """At the engine's death: start another, or tell clients for a while and exit."""
        deaths: list[float] = []
        while True:
            await self.serving.engine.wait_dead()
            now = time.monotonic()
            deaths = [*(t for t in deaths if now - t < RESTART_WINDOW_S), now]
            if self.settings.restart_engine and len(deaths) <= MAX_RESTARTS and await self._restart():
                continue
            self.exit_code = EXIT_ENGINE_DEAD
            logger.error("The engine has died; the server exits in %g s.", DEATH_GRACE_S)
            await asyncio.sleep(DEATH_GRACE_S)
            self.server.should_exit = True
            return

    async def _restart(self) -> bool:
        """Put a new engine in the dead one's place; meanwhile requests get 503. False if it does not start."""
        logger.error("The engine has died; starting another.")
        await self.serving.engine.shutdown()
        try:
            # In a thread: this loop goes on answering.
            self.serving.engine = await asyncio.to_thread(self.start_engine)
        except Exception as error:
            # Whatever it is: a watcher that ended here would leave a server that says 503 for ever.
            logger.error("The engine did not start again: %s", error, exc_info=not isinstance(error, ValueError))
            return False
        return True


def bind_socket(settings: ServerSettings) -> socket.socket:
    """Return a socket bound to the address of `settings`; it does not listen yet.

    Raises:
        OSError: the address is taken, or not this machine's; the message says which.
    """
    if settings.uds is not None:
        return _bind_uds(settings.uds)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            # A server that was just stopped leaves connections behind, which would keep the port for a minute.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on host {settings.host!r}, port {settings.port}: {reason}") from error
    return sock


def _bind_uds(path: str) -> socket.socket:
    """Bind to a unix domain socket; one that a dead server left behind is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError("there is a file of that name")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OSError("another server listens there")
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on --uds {path!r}: {error.strerror or error}") from error
    return sock


@contextlib.contextmanager
def _removed_at_end(path: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def address(sock: socket.socket, settings: ServerSettings) -> str:
    """Return the URL of a bound socket, as a person types it."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = sock.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
