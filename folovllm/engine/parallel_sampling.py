"""n > 1: one client request becomes n requests of one sample each (vLLM: `v1/engine/parallel_sampling.py`).

The core knows only the n children, whose prompts share their blocks through the prefix cache; the client
knows only the parent.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from folovllm.outputs import CompletionOutput, Logprob
from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import MAX_SEED, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from folovllm.metrics.stats import IterationStats


class ParentRequest:
    """Makes the children of a request and gathers their outputs."""

    def __init__(self, request: EngineCoreRequest) -> None:
        """`request`: checked, with n > 1. It is never queued itself."""
        self.request = request
        self.request_id = request.request_id
        self.external_req_id = request.external_req_id or request.request_id
        self.sampling_params = request.sampling_params
        self.child_requests: set[str] = set()
        """Internal ids of the children that have not finished."""
        self.max_num_generation_tokens = 0
        """Length of the longest sample that has ended."""
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        """What the first child found out about the prompt they share; in a DELTA stream [] once sent."""
        self.num_cached_tokens = 0
        """Prompt tokens that the first child found in the prefix cache."""
        self._finals: dict[int, CompletionOutput] = {}

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.sampling_params.n

    def get_child_info(self, index: int) -> tuple[str, SamplingParams]:
        """Return internal id and parameters of child `index` (0 to n - 1), and note it as unfinished.

        Child i's seed is the parent's plus i, so a seeded request is repeatable as a whole. Only the first
        child computes prompt log probabilities: they are the same for all.
        """
        child_id = f"{index}_{self.request_id}"
        self.child_requests.add(child_id)
        params = self.sampling_params.clone()
        params.n = 1
        if params.seed is not None:
            params.seed = (params.seed + index) % (MAX_SEED + 1)
        if index > 0:
            params.prompt_logprobs = None
        return child_id, params

    def get_child_requests(self) -> list[EngineCoreRequest]:
        """Return the n children, in order of index."""
        children = []
        for index in range(self.n):
            child_id, params = self.get_child_info(index)
            children.append(
                dataclasses.replace(
                    self.request,
                    request_id=child_id,
                    external_req_id=self.external_req_id,
                    sampling_params=params,
                )
            )
        return children

    def get_outputs(
        self, child_request_id: str, completion_output: CompletionOutput
    ) -> tuple[list[CompletionOutput], bool]:
        """Take one child's output; return what the client gets now, and whether all children have finished.

        FINAL_ONLY: nothing until all have finished, then all by index. Else: this output, but a finished
        child only once.
        """
        first_time = True
        if completion_output.finished():
            first_time = child_request_id in self.child_requests
            self.child_requests.discard(child_request_id)
        all_finished = not self.child_requests
        if self.sampling_params.output_kind != RequestOutputKind.FINAL_ONLY:
            return [completion_output] if first_time else [], all_finished
        self._finals[completion_output.index] = completion_output
        if not all_finished:
            return [], False
        return [self._finals[index] for index in sorted(self._finals)], True

    def observe_num_generation_tokens(self, num_generation_tokens: int) -> int:
        """Take in the length of a finished sample; return that of the longest."""
        self.max_num_generation_tokens = max(self.max_num_generation_tokens, num_generation_tokens)
        return self.max_num_generation_tokens

    @staticmethod
    def observe_finished_request(
        parent_req: ParentRequest | None, iteration_stats: IterationStats, num_generation_tokens: int
    ) -> None:
        """Count a client request in `iteration_stats` once it, or the last of its children, has finished."""
        if parent_req is not None:
            num_generation_tokens = parent_req.observe_num_generation_tokens(num_generation_tokens)
            if parent_req.child_requests:
                return
        iteration_stats.max_num_generation_tokens_iter.append(num_generation_tokens)
        iteration_stats.n_params_iter.append(1 if parent_req is None else parent_req.n)
