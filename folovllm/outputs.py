"""The messages that travel upwards, from the sampler's tensors to what a user sees.

    Sampler -> SamplerOutput -> ModelRunner -> ModelRunnerOutput -> Scheduler -> EngineCoreOutputs
            -> OutputProcessor -> RequestOutput

vLLM keeps these in `outputs.py`, `v1/outputs.py` and `v1/engine/__init__.py`. Torch-free at run time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from folovllm.metrics.stats import EngineCoreEvent, SchedulerStats
from folovllm.request import EngineCoreRequest, FinishReason

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from folovllm.metrics.stats import RequestStateStats
else:
    Tensor = Any  # msgspec reads the annotations of what it decodes (engine/serial.py)

__all__ = [
    "EMPTY_MODEL_RUNNER_OUTPUT",
    "CompletionOutput",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "FinishReason",
    "Logprob",
    "LogprobsLists",
    "LogprobsTensors",
    "ModelRunnerOutput",
    "PendingOutput",
    "RequestOutput",
    "SamplerOutput",
]


class LogprobsLists(NamedTuple):
    """Log probabilities of n positions on the host; column 0 is the sampled (or prompt) token."""

    logprob_token_ids: Any
    """[n, k + 1] ints, numpy array or nested lists."""
    logprobs: Any
    """[n, k + 1] floats."""
    sampled_token_ranks: Any
    """[n] ints, 1 = most likely."""
    extra: Any = None
    """Unused; keeps vLLM's arity."""

    def slice_request(self, req_index: int, num_positions: int) -> LogprobsLists:
        """Return the rows [req_index, req_index + num_positions)."""
        end = req_index + num_positions
        return LogprobsLists(
            self.logprob_token_ids[req_index:end],
            self.logprobs[req_index:end],
            self.sampled_token_ranks[req_index:end],
        )


class LogprobsTensors(NamedTuple):
    """The same as LogprobsLists, as tensors on any device: int64 / int32, float32, int64 / int32."""

    logprob_token_ids: Tensor
    """[n, k + 1]."""
    logprobs: Tensor
    """[n, k + 1]."""
    selected_token_ranks: Tensor
    """[n]."""
    extra: Any = None
    """Unused; keeps vLLM's arity."""

    def tolists(self) -> LogprobsLists:
        """Copy to the host (synchronises) as numpy arrays."""
        return LogprobsLists(
            self.logprob_token_ids.cpu().numpy(),
            self.logprobs.cpu().numpy(),
            self.selected_token_ranks.cpu().numpy(),
        )


@dataclass
class SamplerOutput:
    """What the sampler leaves on the device."""

    sampled_token_ids: torch.Tensor
    """[B, 1], int64."""
    logprobs_tensors: LogprobsTensors | None = None
    """Rows in batch order; None where no request asked."""


@dataclass
class ModelRunnerOutput:
    """What a step gives back to the scheduler. Inner lists may be shared: do not extend them."""

    req_ids: list[str]
    """Requests of the step, in batch order."""
    req_id_to_index: dict[str, int]
    """Request id -> its place in the lists below."""
    sampled_token_ids: list[list[int]]
    """New tokens per request; an empty list means none (unfinished prefill)."""
    logprobs: LogprobsLists | None = None
    """One row per entry of req_ids; None where no request asked."""
    prompt_logprobs_dict: dict[str, LogprobsTensors | None] = field(default_factory=dict)
    """Request id -> log probabilities of all its prompt tokens but the first, in the step that completes them."""
    step_times: dict[str, float] | None = None
    """Milliseconds inside the worker, for the step trace: prepare_ms, forward_ms and sample_ms by the wall clock,
    prepare_cpu_ms, forward_cpu_ms and sample_cpu_ms of its thread; None where nobody asked."""


class PendingOutput(ABC):
    """A step that has been launched; its tokens are still on the device (vLLM: AsyncModelRunnerOutput)."""

    @abstractmethod
    def get_output(self) -> ModelRunnerOutput:
        """Wait for the tokens and return them; later calls return the same object."""


EMPTY_MODEL_RUNNER_OUTPUT = ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one request got in one step. A Struct: made in a quarter of a dataclass's time, 256 times per step.

    Encoded without its field names, and without the defaults at its end.
    """

    request_id: str
    """Internal id."""
    new_token_ids: list[int]
    """May be empty (prompt logprobs only, or an abort)."""
    new_logprobs: LogprobsLists | None = None
    """One row per new token."""
    new_prompt_logprobs_tensors: LogprobsTensors | None = None
    """Sent once."""
    finish_reason: FinishReason | None = None
    """None while the request goes on."""
    stop_reason: int | str | None = None
    """The stop token or string that ended it, where one did; an explanation for a request that could not go on."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    events: list[EngineCoreEvent] | None = None
    """What the scheduler did with the request since its last output; None where log_stats is off, or nothing."""

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.finish_reason is not None


@dataclass
class EngineCoreOutputs:
    """All outputs of one step."""

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    """One per request that has news."""
    scheduler_stats: SchedulerStats | None = None
    """Where log_stats is on."""
    timestamp: float = 0.0
    """Seconds, `time.monotonic()`, when the step ended."""


@dataclass
class Logprob:
    """Log probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 = most likely; counted over the whole vocabulary."""
    decoded_token: str | None = None
    """The token's text; None without a tokenizer."""


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    """0 to n - 1."""
    text: str
    """Generated text (the new part for DELTA)."""
    token_ids: Sequence[int]
    """Generated ids (the new ones for DELTA)."""
    cumulative_logprob: float | None = None
    """Sum over sampled tokens; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token: id -> Logprob."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"; None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or token id that ended it; None for EOS. What went wrong, for "error"."""

    def finished(self) -> bool:
        """Return whether this sample has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What a user gets for one request."""

    request_id: str
    """The id the user gave."""
    prompt: str | None
    """The prompt's text, where it was text."""
    prompt_token_ids: list[int] | None
    """The prompt's tokens."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Per prompt token, None for the first; None unless asked for."""
    outputs: list[CompletionOutput]
    """By index."""
    finished: bool
    """Whether every sample has ended."""
    metrics: RequestStateStats | None = None
    """Times and counts of this request, where log_stats is on."""
    num_cached_tokens: int | None = None
    """Prompt tokens taken from the prefix cache."""

    def add(self, next_output: RequestOutput, aggregate: bool) -> None:
        """Merge a later output of the same request into this one.

        Args:
            next_output: the later output.
            aggregate: True appends per sample index (DELTA), False replaces it (CUMULATIVE). New indices are
                added. Prompt log probabilities stay once they are there: a stream brings them only once.
        """
        self.finished |= next_output.finished
        if not self.prompt_logprobs:
            self.prompt_logprobs = next_output.prompt_logprobs
        if next_output.num_cached_tokens is not None:
            self.num_cached_tokens = next_output.num_cached_tokens
        for new in next_output.outputs:
            for i, old in enumerate(self.outputs):
                if old.index == new.index:
                    self.outputs[i] = _concatenate(old, new) if aggregate else new
                    break
            else:
                self.outputs.append(new)


def _concatenate(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    """Two consecutive deltas as one."""
    return CompletionOutput(
        index=old.index,
        text=old.text + new.text,
        token_ids=[*old.token_ids, *new.token_ids],
        cumulative_logprob=new.cumulative_logprob,
        logprobs=None if old.logprobs is None else old.logprobs + (new.logprobs or []),
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
    )
