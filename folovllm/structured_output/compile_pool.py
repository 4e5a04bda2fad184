"""CompilePool: grammars are compiled beside the engine's thread, each once, with a cache (vLLM: a ThreadPoolExecutor).

Threads suffice: xgrammar lets go of Python's lock while it compiles. But a thread cannot be stopped. One that takes
too long is given up: whoever waited is told, another thread takes its place, and what it brings in the end, if
anything, goes into the cache. The threads are daemons, so that none can hold up the end of the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from folovllm.core.sched.grammar import GrammarError
from folovllm.structured_output.backend_xgrammar import CompiledGrammar, Spec, spec_to_text

NUM_THREADS = 2
"""Grammars compiled at a time."""
MAX_LOST_THREADS = 8
"""Most threads that are given up at a time; until one of them comes back, nothing new is compiled."""
COMPILE_TIMEOUT_S = 10.0
"""A request waits so long for its grammar, the queue for a free thread included."""
CACHE_BYTES = 256 << 20
"""About how much memory compiled grammars may take that nobody uses any more."""


class _Job:
    """One specification in the making."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.created = time.monotonic()
        self.num_waiting = 0
        self.started = False
        self.lost = False
        self.result: CompiledGrammar | ValueError | None = None


class CompilePool:
    """Specification in, compiled grammar out, some time later. Used by one thread, the engine's."""

    def __init__(
        self,
        compile_spec: Callable[[Spec], CompiledGrammar],
        timeout_s: float = COMPILE_TIMEOUT_S,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`compile_spec` is called in the pool's threads; a ValueError it raises is the answer."""
        self._compile_spec = compile_spec
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Spec, CompiledGrammar] = OrderedDict()
        self._cached_bytes = 0
        self._jobs: dict[Spec, _Job] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Guards what both sides touch: the jobs' fields and the counts of threads.
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._done: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._num_threads = 0
        self._num_lost = 0
        self.num_hits = 0
        """How often a grammar was there, or in the making, when it was asked for."""
        self.num_misses = 0
        """How often it had to be compiled."""

    def start(self, spec: Spec) -> None:
        """Begin to compile, unless that is done or under way; `poll` it to the end, or `forget` it."""
        self._collect()
        if spec in self._cache:
            self.num_hits += 1
            return
        job = self._jobs.get(spec)
        if job is None:
            self.num_misses += 1
            job = self._jobs[spec] = _Job(spec)
            self._queue.put(job)
            self._start_threads()
        else:
            self.num_hits += 1
        job.num_waiting += 1

    def poll(self, spec: Spec, started: float) -> CompiledGrammar | None:
        """Return the compiled grammar, None if it is not ready.

        Args:
            spec: what was started.
            started: when, `time.monotonic()`.

        Raises:
            GrammarError: it cannot be compiled, or not in time.
        """
        self._collect()
        cached = self._cache.get(spec)
        if cached is not None:
            self._cache.move_to_end(spec)
            return cached
        job = self._jobs.get(spec)
        if job is None:  # it was dropped from the cache before everybody had fetched it
            self.start(spec)
            return None
        if isinstance(job.result, ValueError):
            self._leave(job)
            raise GrammarError(str(job.result).removeprefix("structured_outputs: "))
        if time.monotonic() - started > self._timeout_s:
            self._give_up(job)
            self._leave(job)
            raise GrammarError(f"compiling took longer than {self._timeout_s:g} s ({spec_to_text(spec)}); simplify it.")
        return None

    def forget(self, spec: Spec) -> None:
        """One who started it does not need it any more."""
        self._collect()
        job = self._jobs.get(spec)
        if job is not None:
            self._leave(job)

    def wait(self, timeout_s: float) -> None:
        """Wait until a job has ended since the last poll, but no longer than `timeout_s` seconds."""
        self._news.wait(timeout_s)

    def shutdown(self) -> None:
        """End the threads that are idle; the others end with what they do."""
        with self._lock:
            for job in self._jobs.values():
                job.lost = True
            num_threads = self._num_threads
        self._jobs.clear()
        for _ in range(num_threads):
            self._queue.put(None)

    def _leave(self, job: _Job) -> None:
        job.num_waiting -= 1
        if job.num_waiting <= 0:
            # Nobody is left who would see it take too long: its thread must not keep others waiting.
            self._give_up(job)
            if job.lost or job.result is not None:
                self._jobs.pop(job.spec, None)

    def _collect(self) -> None:
        """Move what the threads have brought to the cache; failures stay for those who wait."""
        self._news.clear()
        while not self._done.empty():
            job = self._done.get()
            if job.lost:
                self._start_threads()  # it has come back: there may be room for another
            if isinstance(job.result, CompiledGrammar):
                self._put(job.spec, job.result)
            if self._jobs.get(job.spec) is job and (job.num_waiting <= 0 or isinstance(job.result, CompiledGrammar)):
                self._jobs.pop(job.spec, None)

    def _put(self, spec: Spec, compiled: CompiledGrammar) -> None:
        """Add to the cache; drop what has not been used for longest where that makes it too large."""
        if spec in self._cache:
            return
        self._cache[spec] = compiled
        self._cached_bytes += compiled.num_bytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.num_bytes

    # ---- Threads ----

    def _give_up(self, job: _Job) -> None:
        """Count the thread that compiles this as lost, and let another take its place."""
        with self._lock:
            if not job.started:
                job.lost = job.num_waiting <= 0  # the thread that gets it then passes it over
            elif not job.lost and job.result is None:
                job.lost = True
                self._num_threads -= 1
                self._num_lost += 1
        self._start_threads()

    def _start_threads(self) -> None:
        with self._lock:
            wanted = min(NUM_THREADS - self._num_threads, MAX_LOST_THREADS - self._num_lost - self._num_threads)
            self._num_threads += max(0, wanted)
        for _ in range(wanted):
            threading.Thread(target=self._work, name="compile-grammar", daemon=True).start()

    def _work(self) -> None:
        """What a thread does: one job after the other, until it is told to end or is given up."""
        while (job := self._queue.get()) is not None:
            with self._lock:
                if job.lost:
                    continue
                job.started = True
            result: CompiledGrammar | ValueError
            try:
                result = self._compile_spec(job.spec)
            except ValueError as error:
                result = error
            except Exception as error:
                result = ValueError(f"{type(error).__name__}: {error}")
            with self._lock:
                job.result = result
                lost = job.lost
                self._num_lost -= lost
            self._done.put(job)
            self._news.set()
            if lost:
                return  # another has its place
        with self._lock:
            self._num_threads -= 1
