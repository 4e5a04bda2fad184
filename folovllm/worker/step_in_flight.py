"""StepInFlight: a step's sampled tokens between the device and the host (vLLM: AsyncGPUModelRunnerOutput).

    launch k    sampled ids stay on the device; the host appends a placeholder (-1) to each request
    launch k+1  its input ids are taken from step k's tensor, without waiting            (tokens_for)
    land k      the host waits for the copy, and every placeholder becomes its token     (get_output)

Without async scheduling a step lands before the next one is launched. Nothing else differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from folovllm.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsTensors, ModelRunnerOutput, PendingOutput
from folovllm.worker.input_batch import CachedRequestState, InputBatch

PLACEHOLDER = -1
"""Stands for a token that only the device knows; penalties skip it."""


class StepInFlight(PendingOutput):
    """One launched step. Made after sampling, while the batch is still that of the step."""

    def __init__(
        self,
        sampled: torch.Tensor,
        complete: npt.NDArray[np.intp],
        batch: InputBatch,
        requests: dict[str, CachedRequestState],
        logprobs: LogprobsTensors | None,
        prompt_logprobs: dict[str, LogprobsTensors | None],
    ) -> None:
        """Append the placeholders and start the copy to the host.

        Args:
            sampled: [B] int64 on the device, a token per slot.
            complete: slots whose token counts: all known tokens of the request are computed.
            batch: the persistent batch; tokens are filled in wherever their request's slot is by then.
            requests: the runner's states by id; likewise.
            logprobs: one row per slot, on the device.
            prompt_logprobs: of prompts that this step completed, on the host.
        """
        self.sampled = sampled
        self._batch = batch
        self._requests = requests
        self._req_ids = list(batch.req_ids)
        self._states = [requests[req_id] for req_id in self._req_ids]
        self.complete = complete
        self.batch_version = batch.version
        """Which state of the batch the step ran with: in the same state, slots are its rows."""
        batch.record_sampled_tokens(complete, np.full(len(complete), PLACEHOLDER, dtype=np.int64))
        # Where the placeholder of each complete slot sits in its request's output.
        self._places = [len(self._states[index].output_token_ids) - 1 for index in complete.tolist()]
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._output: ModelRunnerOutput | None = None
        self.step_times: dict[str, float] | None = None
        """Milliseconds by part, for the step trace; the runner sets it."""
        self._event: torch.cuda.Event | None = None
        self._host = sampled
        if sampled.is_cuda:
            self._host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True)
            self._host.copy_(sampled, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def landed(self) -> bool:
        """Whether the host knows the tokens."""
        return self._output is not None

    def rows_for(self, req_ids: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return (slots, rows): the requests of `req_ids` (by slot) that got a token here, and its row in `sampled`."""
        # By identity: an id may have been given to another request meanwhile.
        row_of = {id(self._states[row]): row for row in self.complete.tolist()}
        slots, rows = [], []
        for slot, req_id in enumerate(req_ids):
            row = row_of.get(id(self._requests[req_id]))
            if row is not None:
                slots.append(slot)
                rows.append(row)
        return slots, rows

    def get_output(self) -> ModelRunnerOutput:
        """See PendingOutput; fills the placeholders."""
        if self._output is not None:
            return self._output
        if self._event is not None:
            self._event.synchronize()
        tokens = self._host.numpy()[self.complete].tolist()
        token_lists: list[list[int]] = [[] for _ in self._req_ids]
        index_of, token_ids = self._batch.req_id_to_index, self._batch.token_ids_cpu
        for row, place, token in zip(self.complete.tolist(), self._places, tokens, strict=True):
            state = self._states[row]
            token_lists[row] = [token]
            state.output_token_ids[place] = token
            position = len(state.prompt_token_ids) + place
            slot = index_of.get(state.req_id)
            if slot is not None and self._requests.get(state.req_id) is state:
                token_ids[slot, position] = token
        self._output = ModelRunnerOutput(
            req_ids=self._req_ids,
            req_id_to_index={req_id: row for row, req_id in enumerate(self._req_ids)},
            sampled_token_ids=token_lists,
            logprobs=None if self._logprobs is None else self._logprobs.tolists(),
            prompt_logprobs_dict=self._prompt_logprobs,
            step_times=self.step_times,
        )
        return self._output


class StepWatch:
    """Wall and CPU milliseconds of the parts of a step, in `times`. On CUDA these are launch times: nothing waits."""

    def __init__(self) -> None:
        """Start."""
        self.times: dict[str, float] | None = {}
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def lap(self, part: str) -> None:
        """Everything since the last lap was `part`."""
        assert self.times is not None
        wall, cpu = time.perf_counter(), time.thread_time()
        self.times[f"{part}_ms"] = (wall - self._wall) * 1e3
        self.times[f"{part}_cpu_ms"] = (cpu - self._cpu) * 1e3
        self._wall, self._cpu = wall, cpu


class _NoWatch(StepWatch):
    """Measures nothing."""

    def __init__(self) -> None:
        self.times = None

    def lap(self, part: str) -> None:
        pass


NO_WATCH = _NoWatch()


class NothingToCompute(PendingOutput):
    """A step without tokens, which only carried news of requests that have ended."""

    def get_output(self) -> ModelRunnerOutput:
        """See PendingOutput."""
        return EMPTY_MODEL_RUNNER_OUTPUT
