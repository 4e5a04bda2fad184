"""What the scheduler tells the worker about one step (vLLM: `v1/core/sched/output.py`).

    first time        NewRequestData: everything the worker must know of the request
    every later step  one row of CachedRequestData: only what has changed

The worker keeps its own copy of each request from the first message until its id is in `finished_req_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRequestData:
    """A request that is scheduled for the first time."""

    req_id: str
    """Its id."""
    prompt_token_ids: list[int]
    """Its prompt; shared with the scheduler, not to be changed."""
    sampling_params: SamplingParams
    """How to sample; shared with the scheduler, not to be changed."""
    block_ids: tuple[list[int], ...]
    """All its blocks, one list per KV cache group."""
    num_computed_tokens: int
    """Prompt tokens whose keys and values are in those blocks already: prefix cache hits."""

    @classmethod
    def from_request(cls, request: Request, block_ids: tuple[list[int], ...]) -> NewRequestData:
        """Return the message for `request`, whose num_computed_tokens must not include this step yet."""
        return cls(
            req_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            block_ids=block_ids,
            num_computed_tokens=request.num_computed_tokens,
        )


@dataclass(slots=True)
class CachedRequestData:
    """Requests that the worker knows already, as parallel lists."""

    req_ids: list[str]
    """Running ones first, then resumed ones."""
    resumed_req_ids: set[str]
    """Those that were preempted and are back: their blocks are new from the first one on."""
    new_block_ids: list[tuple[list[int], ...] | None]
    """Running: blocks to append to the request's table, or None; resumed: its whole table."""
    num_computed_tokens: list[int]
    """Tokens computed before this step: where it goes on."""
    num_output_tokens: list[int]
    """Output tokens before this step: prompt + these is the length of the sequence. With AsyncScheduler the
    newest of them may be known to the device alone."""
    all_token_ids: dict[str, list[int]] = field(default_factory=dict)
    """Resumed requests only: prompt and outputs, for a worker that kept nothing of them."""

    @property
    def num_reqs(self) -> int:
        """Number of requests."""
        return len(self.req_ids)

    @classmethod
    def make_empty(cls) -> CachedRequestData:
        """Return a message about nobody."""
        return cls(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[], num_output_tokens=[])


@dataclass(slots=True)
class SchedulerOutput:
    """One step: who computes how many tokens, and into which blocks."""

    scheduled_new_reqs: list[NewRequestData]
    """Requests that the worker does not know yet."""
    scheduled_cached_reqs: CachedRequestData
    """All other scheduled requests."""
    num_scheduled_tokens: dict[str, int]
    """Request id -> tokens to compute, at least 1; the order is the order of scheduling."""
    total_num_scheduled_tokens: int
    """Their sum (T)."""
    finished_req_ids: set[str] = field(default_factory=set)
    """Ended since the previous step: the worker forgets them first, as an id may come back at once."""
    preempted_req_ids: set[str] = field(default_factory=set)
    """Requests that lost their blocks since the previous step; each comes back as resumed, or finished."""
    num_common_prefix_blocks: list[int] = field(default_factory=lambda: [0])
    """Always [0]. Simplified (vLLM: cascade attention): no backend of ours treats a common prefix apart."""
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Always empty: no speculative decoding."""
    scheduled_encoder_inputs: dict[str, list[int]] = field(default_factory=dict)
    """Always empty: text only."""
    free_encoder_mm_hashes: list[Any] = field(default_factory=list)
    """Always empty: text only."""
    structured_output_request_ids: list[str] = field(default_factory=list)
    """Requests that this step samples for under a grammar: their masks come in a GrammarOutput."""

    @classmethod
    def make_empty(cls) -> SchedulerOutput:
        """Return a step in which nothing happens."""
        return cls(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={},
            total_num_scheduled_tokens=0,
        )


@dataclass(slots=True)
class GrammarOutput:
    """Which tokens a step may sample for those of its requests that have a grammar.

    Apart from the SchedulerOutput, because it is made while the forward pass runs.
    """

    structured_output_request_ids: list[str]
    """The requests, in the order of the rows."""
    grammar_bitmask: Any
    """[their number, ceil(V / 32)] int32, a numpy array: bit i % 32 of word i // 32 is 1 where token i may come."""
