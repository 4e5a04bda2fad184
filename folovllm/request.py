"""Request: what the scheduler knows of one sequence, and the messages that bring it in (vLLM: `v1/request.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from folovllm.metrics.stats import EngineCoreEvent, EngineCoreEventType
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folovllm.core.sched.grammar import Grammar


class FinishReason(IntEnum):
    """Why a request ended, as clients see it; `str()` gives OpenAI's word."""

    STOP = 0
    """End-of-sequence token, stop token or stop string."""
    LENGTH = 1
    """max_tokens or max_model_len reached."""
    ABORT = 2
    """Ended from outside, or could not go on."""
    ERROR = 3
    """Could not be done as asked; the output's stop_reason says why."""

    def __str__(self) -> str:
        return self.name.lower()


class RequestStatus(IntEnum):
    """Where a request stands. Everything after PREEMPTED is finished."""

    WAITING = 0
    WAITING_FOR_GRAMMAR = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_IGNORED = 7
    FINISHED_ERROR = 8

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)

    @staticmethod
    def is_finished(status: RequestStatus) -> bool:
        """Return whether `status` is final."""
        return status > RequestStatus.PREEMPTED

    @staticmethod
    def get_finished_reason(status: RequestStatus) -> FinishReason | None:
        """Return what the client is told about `status`; None while unfinished."""
        return _FINISH_REASONS.get(status)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH_CAPPED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_IGNORED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}


@dataclass
class EngineCoreRequest:
    """A checked request on its way from the Processor to the EngineCore (vLLM: `v1/engine/__init__.py`)."""

    request_id: str
    """Unique inside the engine."""
    prompt_token_ids: list[int]
    """At least one id, all inside the vocabulary."""
    sampling_params: SamplingParams
    """With every derived field filled in and a seed chosen."""
    arrival_time: float
    """Seconds, `time.time()`."""
    external_req_id: str | None = None
    """The id the client used; None means request_id (they differ for the samples of n > 1)."""
    priority: int = 0
    """Smaller runs first under the priority policy."""
    cache_salt: str | None = None
    """Requests share cached blocks only with requests of the same salt."""


class ConstantList(Sequence[int]):
    """A read-only view of a list, or of its end: Request hands these out, and alone appends (vLLM: `v1/utils.py`).

    Reading from a view with a `start` costs a copy of that end.
    """

    __slots__ = ("_list", "_start")

    def __init__(self, values: list[int], start: int = 0) -> None:
        """View values[start:]; what is appended later is seen too."""
        self._list = values
        self._start = start

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._list[index] if self._start == 0 else self.copy()[index]

    def __len__(self) -> int:
        return len(self._list) - self._start

    def __iter__(self) -> Iterator[int]:
        return islice(self._list, self._start, None)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ConstantList):
            return self.copy() == other.copy()
        return self.copy() == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ConstantList({self.copy()!r})"

    def copy(self) -> list[int]:
        """Return the content as a new list."""
        return self._list[self._start :]


class Request:
    """One sequence in the scheduler: its tokens, its progress, its block hashes.

    `num_computed_tokens` chases `num_tokens`; that difference is all the scheduler needs to know. Equality and hash are
    identity's. Only the scheduler changes a Request.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        pooling_params: None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        block_hasher: Callable[[Request], list[Any]] | None = None,
        hash_block_size: int = 1,
    ) -> None:
        """`block_hasher` gives the hashes of full blocks not hashed yet; None leaves `block_hashes` empty.

        `hash_block_size` is the tokens per block of the hasher, which is then asked only when an appended token fills
        one; 1, which asks after every token, is right for any hasher.
        `pooling_params` must be None: FoloVLLM generates text only.
        """
        if pooling_params is not None:
            raise ValueError("pooling_params is not supported: FoloVLLM generates text only; leave it None.")
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.pooling_params = None
        self.arrival_time = time.time() if arrival_time is None else arrival_time
        self.priority = priority
        self.cache_salt = cache_salt
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        # None: bounded by max_model_len alone, which check_stop tests too.
        self.max_tokens: int | None = sampling_params.max_tokens
        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        # The length of all_token_ids, as a number: it is read several times per step.
        self.num_tokens = self.num_prompt_tokens
        self._all_token_ids: list[int] = list(prompt_token_ids)
        self.all_token_ids = ConstantList(self._all_token_ids)
        # The same list from the first output on: one append per token, and a queued request holds a list less.
        self.output_token_ids = ConstantList(self._all_token_ids, self.num_prompt_tokens)
        self.num_computed_tokens = 0
        # Tokens that steps in flight will sample for it: with AsyncScheduler the sequence is that much longer.
        self.num_output_placeholders = 0
        # Tokens taken from the prefix cache at first admission; -1 until then.
        self.num_cached_tokens = -1
        self.num_preemptions = 0
        # Where it stands in what its text must look like; None where that is free, or not compiled yet.
        self.grammar: Grammar | None = None
        # Not taken by an output yet; only a scheduler with log_stats records any.
        self.events: list[EngineCoreEvent] | None = None
        self.block_hashes: list[Any] = []
        self._block_hasher = block_hasher
        self._hash_block_size = hash_block_size
        if block_hasher is not None:
            self.block_hashes = block_hasher(self)

    @classmethod
    def from_engine_core_request(
        cls,
        request: EngineCoreRequest,
        block_hasher: Callable[[Request], list[Any]] | None,
        hash_block_size: int = 1,
    ) -> Request:
        """Return the scheduler's Request for a message from the Processor; the others are the constructor's."""
        return cls(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            arrival_time=request.arrival_time,
            priority=request.priority,
            cache_salt=request.cache_salt,
            block_hasher=block_hasher,
            hash_block_size=hash_block_size,
        )

    def append_output_token_ids(self, token_ids: int | list[int]) -> None:
        """Append sampled token(s), then the hash of every block they complete."""
        if isinstance(token_ids, int):
            self._all_token_ids.append(token_ids)
            self.num_tokens += 1
            if self.num_tokens % self._hash_block_size:
                return  # a token inside a block, as most are: there is nothing to hash
        else:
            self._all_token_ids.extend(token_ids)
            self.num_tokens += len(token_ids)
        if self._block_hasher is not None:
            self.block_hashes.extend(self._block_hasher(self))

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return self.num_tokens - self.num_prompt_tokens

    def record_event(self, event_type: EngineCoreEventType, timestamp: float | None = None) -> None:
        """Add an event of now, or of `timestamp` (monotonic seconds)."""
        event = EngineCoreEvent.new_event(event_type, timestamp)
        if self.events is None:
            self.events = [event]
        else:
            self.events.append(event)

    def take_events(self) -> list[EngineCoreEvent] | None:
        """Return the events since the last call, None where there are none."""
        events, self.events = self.events, None
        return events

    def is_finished(self) -> bool:
        """Return whether the status is final."""
        return RequestStatus.is_finished(self.status)

    def get_finished_reason(self) -> FinishReason | None:
        """Return why the request ended; None while unfinished."""
        return RequestStatus.get_finished_reason(self.status)

    def __lt__(self, other: Request) -> bool:
        """Order of the priority policy: (priority, arrival_time, request_id), smaller first."""
        return (self.priority, self.arrival_time, self.request_id) < (
            other.priority,
            other.arrival_time,
            other.request_id,
        )

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.status}, {self.num_computed_tokens}/{self.num_tokens} tokens)"
