"""CUDA graphs: a step recorded once per size and replayed (vLLM: `compilation/cuda_graph.py`).

Launching a kernel costs the host some 5 to 10 us, and a step of a small model has hundreds that run 2 us each. A graph
is the whole sequence, launched at once. What it records are addresses and grid sizes, so everything that changes from
step to step must lie in tensors that stay where they are (StepInputs), and nothing may depend on a value that the host
would have to read:

    batch of 21 requests  ->  graph of size 24: 3 rows of padding (no context, no cache slot, any token)

Graphs of different sizes never run at the same time, so they share one memory pool, and all write their logits into
one buffer. Sampling is recorded apart, per size and kind of sampling: a batch with log probabilities or penalties
replays the model's graph and then samples eagerly.

A step with prompt chunks runs faster than the host can launch its kernels, too, unless it has thousands of tokens. So
it is recorded per number of tokens. What differs from step to step is which queries belong to whom: that is in the
attention kernel's list of query tiles, which is filled up with empty ones. Requests that decode are in it with a tile
of one token each, so one recording serves any mixture: a server's steps, where prompts arrive while others decode.

    chunks of 500 and 300 tokens, and 9 decodes  ->  graph of 1024 tokens: 215 rows of padding,
                                                     16 + 10 + 9 query tiles and empty ones
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

PROMPT_SIZES = (256, 512, 768, 1024, 1536, 2048)
"""Tokens of the recorded steps with prompt chunks: a GPU takes 5 ms for 2048 tokens of a model of 0.6B, a host 10."""
MAX_PROMPT_REQS = 256
"""Requests of a recorded step with prompt chunks, those that decode among them."""
MAX_MIXED_CONTEXT = 4096
"""Tokens up to which a decode may be among prompt chunks that are replayed: its context is walked by one program per KV
head, which takes long for a longer one. The decode kernel would cut it."""
SAMPLING_KINDS = ("greedy", "temperature", "restricted")
"""No temperature at all; some, over the whole vocabulary; with top-k or top-p."""


class StepGraphs:
    """The recorded steps of a model runner."""

    def __init__(self, runner: GPUModelRunner, sizes: Sequence[int], prompt_sizes: Sequence[int]) -> None:
        """`sizes`: decode batches to record, in requests; `prompt_sizes`: prompt steps, in tokens. Both ascending."""
        self.runner = runner
        self.sizes = list(sizes)
        self.prompt_sizes = list(prompt_sizes)
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._prompt_steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._samplers: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(runner.device)

    def padded_size(self, num_reqs: int) -> int | None:
        """Return the smallest recorded size that holds `num_reqs` requests, or None: the batch runs without a graph."""
        return _smallest(self.sizes, num_reqs)

    def padded_prompt_size(self, num_tokens: int) -> int | None:
        """Return the smallest recorded step with chunks that holds `num_tokens` tokens, or None."""
        return _smallest(self.prompt_sizes, num_tokens)

    def record(self) -> None:
        """Record all sizes, the largest first: the smaller ones then fit into its memory."""

        def launch_prompt(size: int) -> None:
            self._hidden[size] = self.runner.launch_prompt(size)

        with _no_garbage_collection():
            for size in reversed(self.prompt_sizes):
                self._prompt_steps[size] = self._record(lambda size=size: launch_prompt(size))  # type: ignore[misc]
            for size in reversed(self.sizes):
                self._steps[size] = self._record(lambda size=size: self.runner.launch_decode(size))  # type: ignore[misc]
                for kind in SAMPLING_KINDS:
                    self._samplers[size, kind] = self._record(
                        lambda size=size, kind=kind: self.runner.launch_sampling(size, kind)  # type: ignore[misc]
                    )

    def replay(self, size: int) -> None:
        """Run a decode step of a recorded size."""
        self._steps[size].replay()

    def replay_prompt(self, size: int) -> torch.Tensor:
        """Run a prompt step of a recorded size; return states [MAX_PROMPT_REQS, E], good until the next replay."""
        self._prompt_steps[size].replay()
        return self._hidden[size]

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


def _smallest(sizes: list[int], wanted: int) -> int | None:
    index = bisect.bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None


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
