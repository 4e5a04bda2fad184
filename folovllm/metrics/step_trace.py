"""The step trace: one JSON line per engine step, from which the block pool can be redrawn (docs/step_trace.md).

core/sched/traced_scheduler.py gathers the lines; here are their form and their file. vLLM has no counterpart.
Torch-free.
"""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import msgspec

from folovllm.utils.common import init_logger
from folovllm.version import __version__

SCHEMA = "folovllm.step_trace"
"""`schema` of the first line."""
VERSION = 1
"""`version` of the first line: raised when a field changes its meaning or goes away, not when one is added."""
FLUSH_BYTES = 1 << 16
"""Lines wait in memory until they are this many bytes,"""
FLUSH_SECONDS = 1.0
"""or until this long after the last write."""

logger = init_logger(__name__)

_encode = msgspec.json.Encoder().encode


class TracedRequest(msgspec.Struct, gc=False, omit_defaults=True):
    """One scheduled request of a step; a field with its default is left out of the line."""

    id: str
    """Internal id."""
    start: int
    """First token computed in the step, counted from the beginning of the prompt."""
    end: int
    """One past the last one."""
    kind: str
    """"prefill", "decode" or "both": see token_kind."""
    state: str = "running"
    """"new": scheduled for the first time; "resumed": for the first time after a preemption; else "running"."""
    blocks: list[int] = []
    """Running: blocks appended to its table; new and resumed: its whole table, prefix cache hits first."""
    sampled: int = 0
    """Tokens that the step sampled for it."""


class TracedStep(msgspec.Struct, gc=False):
    """One line. The lists `events` and `requests` are in the order in which things happened."""

    step: int
    """0, 1, 2, ... in the order of schedule()."""
    time: float
    """Unix seconds when schedule() began."""
    ms: dict[str, float]
    """Part of the step -> wall milliseconds."""
    cpu_ms: dict[str, float]
    """Part of the step -> CPU milliseconds of the engine's thread."""
    num_tokens: int
    """Tokens scheduled: what of the budget (max_num_batched_tokens) was used."""
    requests: list[TracedRequest]
    """Scheduled requests."""
    aborted: list[str]
    """Requests that were ended from outside since the step before was scheduled."""
    preempted: list[str]
    """Requests that lost their blocks since the step before was scheduled."""
    finished: dict[str, str]
    """Request id -> finish reason, of those that this step ended."""
    num_running: int
    """Length of the queue `running` after the step."""
    num_waiting: int
    """Length of the queue `waiting` after the step."""
    num_free_blocks: int
    """Length of the free queue after the step."""
    events: list[tuple[str, list[int]]]
    """What happened to blocks since the line before: (kind, ids)."""


def token_kind(start: int, end: int, num_prompt_tokens: int) -> str:
    """Say what the tokens [start, end) of a request are, by their place alone.

    "prefill": all belong to the prompt; "decode": none does; "both": some do, which happens only when a preempted
    request recomputes its prompt and its outputs together. The step that computes the last token of a prompt is a
    prefill, although it samples the first output.
    """
    if end <= num_prompt_tokens:
        return "prefill"
    return "decode" if start >= num_prompt_tokens else "both"


class StepTraceWriter:
    """Appends lines to a file: buffered, but always whole lines. Not thread-safe."""

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        """Replace the file `path` by one that has only the header.

        Args:
            path: where to write.
            config: what the header says about the engine; JSON types only.

        Raises:
            ValueError: the file cannot be written.
        """
        try:
            # Unbuffered: what is written are whole lines, or nothing.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"step_trace_path={path!r} cannot be written: {error}.") from error
        self.path = path
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._last_flush = time.monotonic()
        atexit.register(self.close)
        header = {
            "schema": SCHEMA,
            "version": VERSION,
            "folovllm": __version__,
            "time": time.time(),
            "config": config,
        }
        self._append(header)
        self.flush()

    def write(self, step: TracedStep) -> None:
        """Add the line of a step."""
        self._append(step)
        if self._num_bytes >= FLUSH_BYTES or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def _append(self, line: Any) -> None:
        encoded = _encode(line) + b"\n"
        self._lines.append(encoded)
        self._num_bytes += len(encoded)

    def flush(self) -> None:
        """Bring all lines into the file. Where that fails (disk full), say so once and trace no further.

        Requests matter more than their trace: the error is logged, not raised.
        """
        self._last_flush = time.monotonic()
        data = memoryview(b"".join(self._lines))
        self._lines.clear()
        self._num_bytes = 0
        if self._file.closed:
            return
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            logger.error("The step trace ends here, %s cannot be written: %s", self.path, error)
            self._drop_half_line(bytes(data[:written]))
            self.close()

    def _drop_half_line(self, written: bytes) -> None:
        """Cut off what a failed write left behind the last complete line."""
        half = len(written) - (written.rfind(b"\n") + 1)
        if half:
            self._file.truncate(os.fstat(self._file.fileno()).st_size - half)

    def close(self) -> None:
        """Write what is left and close the file; further lines go nowhere. May be called twice."""
        if not self._file.closed and self._lines:
            self.flush()
        self._file.close()
        atexit.unregister(self.close)
