"""A server of one's own for a while: what examples, tests and benchmarks start when there is none to talk to.

    with LocalServer(["smollm2-135m-instruct", "--max-num-seqs", "8"]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

It is the real thing: `folovllm serve` in a process of its own (vLLM has RemoteOpenAIServer in `tests/utils.py`).
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from folovllm.entrypoints.openai.settings import API_KEY_VARIABLE

STARTUP_TIMEOUT_S = 300.0
"""A model that is not ready by then will not be."""
SHUTDOWN_TIMEOUT_S = 60.0
"""A server that has not ended this long after SIGTERM is killed."""
POLL_S = 0.05
LOG_TAIL_CHARS = 4000
"""What an error shows of the server's log."""


def find_free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class LocalServer:
    """`folovllm serve` on a free port of this machine. Use it in `with`."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
        command: Sequence[str] = (sys.executable, "-m", "folovllm", "serve"),
    ) -> None:
        """Start nothing yet.

        Args:
            args: the model and flags, without --host and --port.
            env: variables of the environment beside this process's, of which FOLOVLLM_API_KEY is left out: who starts
                a server for themselves asks it without a key.
            startup_timeout_s: seconds until it must answer.
            command: what is started in its place; tests have servers with models of their own.
        """
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        """Without /v1."""
        self._command = [*command, *args, "--host", "127.0.0.1", "--port", str(self.port)]
        inherited = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
        self._env = {**inherited, **(env or {})}
        self._startup_timeout_s = startup_timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's process."""
        assert self._process is not None
        return self._process

    def log(self) -> str:
        """Return what the server and its engine have written so far."""
        # The child writes at the end through the same open file: read without moving its position.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def __enter__(self) -> LocalServer:
        """Start it, and wait until it answers.

        Raises:
            RuntimeError: it ended instead, or took too long; the message has its log.
        """
        self._process = subprocess.Popen(
            self._command, env=self._env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self) -> None:
        """Wait until /health says 200; see __enter__."""
        deadline = time.monotonic() + self._startup_timeout_s
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                state = f"exit code {self.process.returncode}" if self.process.returncode is not None else "too slow"
                raise RuntimeError(f"the server did not start ({state}):\n{self.log()[-LOG_TAIL_CHARS:]}")
            time.sleep(POLL_S)

    def is_healthy(self) -> bool:
        """Whether /health says 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)  # asks no proxy
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (http.client.HTTPException, OSError):
            return False
        finally:
            connection.close()

    def stop(self) -> int:
        """Send SIGTERM, wait for the end and return the exit code; a server that does not end is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # Its engine notices by itself that its parent is gone.
                self.process.kill()
                self.process.wait()
        return int(self.process.returncode)

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self.stop()
        self._log.close()
