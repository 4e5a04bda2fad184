"""CUDA graphs: a decode step recorded once per batch size and replayed (vLLM: `compilation/cuda_graph.py`).

Launching a kernel costs the host some 5 to 10 us, and a step of a small model has hundreds that run 2 us each. A graph
is the whole sequence, launched at once. What it records are addresses and grid sizes, so everything that changes from
step to step must lie in tensors that stay where they are (StepInputs), and nothing may depend on a value that the host
would have to read:

    batch of 21 requests  ->  graph of size 24: 3 rows of padding (no context, no cache slot, any token)

Graphs of different sizes never run at the same time, so they share one memory pool, and all write their logits into
one buffer. Sampling is recorded apart, per size and kind of sampling: a batch with log probabilities or penalties
replays the model's graph and then samples eagerly.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from folovllm.worker.gpu_model_runner import GPUModelRunner

SAMPLING_KINDS = ("greedy", "temperature", "restricted")
"""No temperature at all; some, over the whole vocabulary; with top-k or top-p."""


class DecodeGraphs:
    """The recorded decode steps of a model runner."""

    def __init__(self, runner: GPUModelRunner, sizes: Sequence[int]) -> None:
        """`sizes`: batch sizes to record, ascending."""
        self.runner = runner
        self.sizes = list(sizes)
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._samplers: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(runner.device)

    def padded_size(self, num_reqs: int) -> int | None:
        """Return the smallest recorded size that holds `num_reqs` requests, or None: the batch runs without a graph."""
        index = bisect.bisect_left(self.sizes, num_reqs)
        return self.sizes[index] if index < len(self.sizes) else None

    def record(self) -> None:
        """Record all sizes, the largest first: the smaller ones then fit into its memory."""
        with _no_garbage_collection():
            for size in reversed(self.sizes):
                self._steps[size] = self._record(lambda size=size: self.runner.launch_decode(size))  # type: ignore[misc]
                for kind in SAMPLING_KINDS:
                    self._samplers[size, kind] = self._record(
                        lambda size=size, kind=kind: self.runner.launch_sampling(size, kind)  # type: ignore[misc]
                    )

    def replay(self, size: int) -> None:
        """Run a decode step of a recorded size."""
        self._steps[size].replay()

    def replay_sampling(self, size: int, kind: str) -> None:
        """Sample from the logits of the step that was replayed."""
        self._samplers[size, kind].replay()

    def _record(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            launch()  # compiles kernels and sets libraries up, neither of which may happen while recording
            # Other threads (a tokenizer, a server) may use CUDA meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection that frees CUDA memory while a graph is recorded would break the recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
