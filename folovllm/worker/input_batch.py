"""InputBatch: the persistent batch, one slot per running request (vLLM: `v1/worker/gpu_input_batch.py`).

The scheduler sends only what changed, so the worker remembers the rest. What a step computes with for all
requests at once lies in arrays with one row per slot; what only some requests have lies in dicts and sets by
request id, which survive any move between slots.

    add_request: lowest free slot      remove_request: leaves a hole      condense: the last fill the holes

Two invariants make moves simple and batches comparable: the slots [0, num_reqs) are in use once `condense`
has run, and every row of an unused slot is zero in every array.

Legend: B requests in the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from folovllm.sample.logits_processor import BatchRow, LogitsProcessors, build_logitsprocs
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sampling_params import MAX_SEED, SamplingParams, SamplingType
from folovllm.utils.common import cdiv, pack_token_ids
from folovllm.worker.block_table import BlockTable


@dataclass
class CachedRequestState:
    """What the worker keeps of a request from its admission to its end, in the batch or not."""

    req_id: str
    """Unique inside the engine."""
    prompt_token_ids: list[int]
    """The prompt; may be empty."""
    sampling_params: SamplingParams
    """Not changed here."""
    block_ids: tuple[list[int], ...]
    """Its KV-cache blocks: one list, as there is one cache group."""
    generator: torch.Generator | None
    """Only its initial seed counts, and only where sampling_params.seed is None: draws have no state."""
    num_computed_tokens: int
    """Tokens whose keys and values are in the cache."""
    output_token_ids: list[int]
    """Generated tokens; the batch appends to this very list."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus output tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def seed(self) -> int:
        """The seed of its draws: the parameters', the generator's, else one that follows from req_id.

        The engine chooses a seed for every request that names none; the last case is for hand-made requests.
        """
        if self.sampling_params.seed is not None:
            return self.sampling_params.seed
        if self.generator is not None:
            return self.generator.initial_seed() & MAX_SEED
        return int.from_bytes(hashlib.sha256(self.req_id.encode()).digest()[:8], "little") & MAX_SEED


class InputBatch:
    """The running requests in slots 0 to num_reqs - 1 and their sampling metadata.

    After changes call `condense` (if requests were removed), then `refresh_metadata`.
    """

    def __init__(
        self,
        max_num_reqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        device: torch.device | str,
        vocab_size: int,
        block_sizes: Sequence[int],
        logitsprocs: LogitsProcessors | None = None,
    ) -> None:
        """Reserve the slots.

        Args:
            max_num_reqs: number of slots.
            max_model_len: most tokens of a request, prompt and output.
            max_num_batched_tokens: most tokens of a step.
            device: where sampling metadata and block table are needed.
            vocab_size: V.
            block_sizes: one number, the tokens per KV-cache block.
            logitsprocs: None means the built-in logits processors.
        """
        assert len(block_sizes) == 1, "one KV-cache group"
        self.max_num_reqs = max_num_reqs
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.logitsprocs = build_logitsprocs(vocab_size, self.device) if logitsprocs is None else logitsprocs

        # By slot. np.zeros leaves pages untouched until used; the tensor shares the memory.
        self.token_ids_cpu: npt.NDArray[np.int32] = np.zeros((max_num_reqs, max_model_len), dtype=np.int32)
        self.token_ids_cpu_tensor = torch.from_numpy(self.token_ids_cpu)
        self.num_tokens: npt.NDArray[np.int32] = np.zeros(max_num_reqs, dtype=np.int32)
        self.num_prompt_tokens: npt.NDArray[np.int32] = np.zeros(max_num_reqs, dtype=np.int32)
        self.num_computed_tokens_cpu: npt.NDArray[np.int32] = np.zeros(max_num_reqs, dtype=np.int32)
        self.temperature_cpu: npt.NDArray[np.float32] = np.zeros(max_num_reqs, dtype=np.float32)
        self.top_p_cpu: npt.NDArray[np.float32] = np.zeros(max_num_reqs, dtype=np.float32)
        self.top_k_cpu: npt.NDArray[np.int32] = np.zeros(max_num_reqs, dtype=np.int32)
        self.frequency_penalties_cpu: npt.NDArray[np.float32] = np.zeros(max_num_reqs, dtype=np.float32)
        self.presence_penalties_cpu: npt.NDArray[np.float32] = np.zeros(max_num_reqs, dtype=np.float32)
        self.repetition_penalties_cpu: npt.NDArray[np.float32] = np.zeros(max_num_reqs, dtype=np.float32)
        self.seeds_cpu: npt.NDArray[np.int64] = np.zeros(max_num_reqs, dtype=np.int64)
        self._req_ids: list[str | None] = []
        self.req_output_token_ids: list[list[int] | None] = []
        self.block_table = BlockTable(
            max_num_reqs,
            cdiv(max_model_len, block_sizes[0]),
            max_num_batched_tokens,
            self.device,
            block_sizes[0],
        )

        # By request id.
        self.req_id_to_index: dict[str, int] = {}
        self.greedy_reqs: set[str] = set()
        self.random_reqs: set[str] = set()
        self.top_p_reqs: set[str] = set()
        self.top_k_reqs: set[str] = set()
        self.penalties_reqs: set[str] = set()
        self.generators: dict[str, torch.Generator] = {}
        self.num_logprobs: dict[str, int] = {}
        self.allowed_token_ids: dict[str, list[int]] = {}
        self.bad_words_token_ids: dict[str, list[list[int]]] = {}
        self.logitsprocs_reqs: dict[str, CachedRequestState] = {}

        self.version = 0
        """Rises whenever requests join, leave or change slots."""
        self._refreshed_version = 0
        self.sampling_metadata = self._make_sampling_metadata()

    def add_request(self, request: CachedRequestState) -> int:
        """Put `request` into the lowest free slot and return its index."""
        index = self._req_ids.index(None) if None in self._req_ids else len(self._req_ids)
        assert index < self.max_num_reqs, "no free slot"
        assert request.req_id not in self.req_id_to_index, "already in the batch"
        assert request.num_tokens <= self.max_model_len, "longer than max_model_len"
        if index == len(self._req_ids):
            self._req_ids.append(None)
            self.req_output_token_ids.append(None)
        self._req_ids[index] = request.req_id
        self.req_output_token_ids[index] = request.output_token_ids
        self.req_id_to_index[request.req_id] = index

        num_prompt_tokens = len(request.prompt_token_ids)
        packed = pack_token_ids(request.prompt_token_ids, "i")
        assert packed is not None, "token ids of 32 bits"
        self.token_ids_cpu[index, :num_prompt_tokens] = np.frombuffer(packed, dtype="<i4")
        self.token_ids_cpu[index, num_prompt_tokens : request.num_tokens] = request.output_token_ids
        self.num_tokens[index] = request.num_tokens
        self.num_prompt_tokens[index] = num_prompt_tokens
        self.num_computed_tokens_cpu[index] = request.num_computed_tokens
        (block_ids,) = request.block_ids
        self.block_table.add_row(block_ids, index)
        self._add_sampling_params(request, index)
        self.version += 1
        return index

    def _add_sampling_params(self, request: CachedRequestState, index: int) -> None:
        """Write a request's parameters into its row, and its id into the collections it belongs to."""
        params, req_id = request.sampling_params, request.req_id
        greedy = params.sampling_type == SamplingType.GREEDY
        (self.greedy_reqs if greedy else self.random_reqs).add(req_id)
        self.temperature_cpu[index] = 0.0 if greedy else params.temperature
        self.seeds_cpu[index] = request.seed
        # What cannot change an argmax is left out for greedy requests.
        top_k = params.top_k if 0 < params.top_k < self.vocab_size and not greedy else self.vocab_size
        top_p = 1.0 if greedy else params.top_p
        self.top_k_cpu[index], self.top_p_cpu[index] = top_k, top_p
        if top_k < self.vocab_size:
            self.top_k_reqs.add(req_id)
        if top_p < 1.0:
            self.top_p_reqs.add(req_id)
        self.frequency_penalties_cpu[index] = params.frequency_penalty
        self.presence_penalties_cpu[index] = params.presence_penalty
        self.repetition_penalties_cpu[index] = params.repetition_penalty
        if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0:
            self.penalties_reqs.add(req_id)
        if request.generator is not None:
            self.generators[req_id] = request.generator
        if params.logprobs is not None:
            self.num_logprobs[req_id] = self.vocab_size if params.logprobs == -1 else params.logprobs
        if params.allowed_token_ids:
            self.allowed_token_ids[req_id] = params.allowed_token_ids
        if params.bad_words_token_ids:
            self.bad_words_token_ids[req_id] = params.bad_words_token_ids
        if self.logitsprocs.wants(params):
            self.logitsprocs_reqs[req_id] = request

    def remove_request(self, req_id: str) -> int | None:
        """Take a request out, leaving a hole; return the slot it had, or None if it is not in the batch.

        Call `condense` once all removals and additions of the step are done.
        """
        index = self.req_id_to_index.pop(req_id, None)
        if index is None:
            return None
        self._req_ids[index] = None
        self.req_output_token_ids[index] = None
        self.token_ids_cpu[index, : self.num_tokens[index]] = 0
        for array in self._slot_arrays():
            array[index] = 0
        self.block_table.clear_row(index)
        for members in (self.greedy_reqs, self.random_reqs, self.top_p_reqs, self.top_k_reqs):
            members.discard(req_id)
        self.penalties_reqs.discard(req_id)
        self.generators.pop(req_id, None)
        self.num_logprobs.pop(req_id, None)
        self.allowed_token_ids.pop(req_id, None)
        self.bad_words_token_ids.pop(req_id, None)
        self.logitsprocs_reqs.pop(req_id, None)
        self.version += 1
        return index

    def condense(self) -> None:
        """Move the last requests into the lowest holes, until slots 0 to num_reqs - 1 are in use."""
        while len(self._req_ids) > self.num_reqs:
            if self._req_ids[-1] is not None:
                self.swap_states(self._req_ids.index(None), len(self._req_ids) - 1)
            self._req_ids.pop()
            self.req_output_token_ids.pop()

    def swap_states(self, i1: int, i2: int) -> None:
        """Exchange the requests (or a request and a hole) of two slots."""
        pair, swapped = [i1, i2], [i2, i1]
        used = int(self.num_tokens[pair].max())
        self.token_ids_cpu[pair, :used] = self.token_ids_cpu[swapped, :used]
        for array in self._slot_arrays():
            array[pair] = array[swapped]
        self.block_table.swap_row(i1, i2)
        ids, outputs = self._req_ids, self.req_output_token_ids
        ids[i1], ids[i2] = ids[i2], ids[i1]
        outputs[i1], outputs[i2] = outputs[i2], outputs[i1]
        for index in pair:
            req_id = self._req_ids[index]
            if req_id is not None:
                self.req_id_to_index[req_id] = index
        self.version += 1

    def _slot_arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Every array with one number per slot."""
        return (
            self.num_tokens,
            self.num_prompt_tokens,
            self.num_computed_tokens_cpu,
            self.temperature_cpu,
            self.top_p_cpu,
            self.top_k_cpu,
            self.frequency_penalties_cpu,
            self.presence_penalties_cpu,
            self.repetition_penalties_cpu,
            self.seeds_cpu,
        )

    def record_sampled_tokens(self, indices: npt.NDArray[np.integer], token_ids: npt.NDArray[np.integer]) -> None:
        """Append one token each to the requests in the slots `indices` (all different)."""
        self.token_ids_cpu[indices, self.num_tokens[indices]] = token_ids
        self.num_tokens[indices] += 1
        for index, token_id in zip(indices.tolist(), token_ids.tolist(), strict=True):
            output = self.req_output_token_ids[index]
            assert output is not None
            output.append(token_id)

    def refresh_metadata(self) -> None:
        """Rebuild `sampling_metadata` if the batch changed since last time; then its `positions` are None."""
        if self._refreshed_version != self.version:
            self.sampling_metadata = self._make_sampling_metadata()
            self._refreshed_version = self.version

    def _make_sampling_metadata(self) -> SamplingMetadata:
        """Return the metadata of the current requests, in slot order; they must lie without holes."""
        num_reqs = self.num_reqs
        index_of = self.req_id_to_index
        outputs = [output for output in self.req_output_token_ids[:num_reqs] if output is not None]
        assert len(outputs) == num_reqs, "condense() has not been called"
        self.logitsprocs.update_state(
            sorted(
                (
                    BatchRow(
                        index_of[req_id],
                        state.sampling_params,
                        state.prompt_token_ids,
                        state.output_token_ids,
                    )
                    for req_id, state in self.logitsprocs_reqs.items()
                ),
                key=lambda row: row.index,
            )
        )
        by_slot = (
            self.temperature_cpu,
            self.frequency_penalties_cpu,
            self.presence_penalties_cpu,
            self.repetition_penalties_cpu,
        )
        # One copy for all four: on CUDA each costs the host some 20 us.
        temperature, frequency, presence, repetition = self._to_device(np.stack([a[:num_reqs] for a in by_slot]))
        return SamplingMetadata(
            temperature=temperature,
            all_greedy=self.all_greedy,
            all_random=self.all_random,
            top_p=self._to_device(self.top_p_cpu[:num_reqs].copy()) if self.top_p_reqs else None,
            top_k=self._to_device(self.top_k_cpu[:num_reqs].copy()) if self.top_k_reqs else None,
            generators={index_of[req_id]: generator for req_id, generator in self.generators.items()},
            max_num_logprobs=self.max_num_logprobs,
            no_penalties=self.no_penalties,
            prompt_token_ids=None if self.no_penalties else self._make_prompt_token_ids(),
            frequency_penalties=frequency,
            presence_penalties=presence,
            repetition_penalties=repetition,
            output_token_ids=outputs,
            allowed_token_ids_mask=self._make_allowed_token_ids_mask(),
            bad_words_token_ids={index_of[req_id]: words for req_id, words in self.bad_words_token_ids.items()},
            logitsprocs=self.logitsprocs,
            seeds=self._to_device(self.seeds_cpu[:num_reqs].copy()),
        )

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """Return an array of this step's own on the device; on the CPU it shares its memory."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _make_prompt_token_ids(self) -> torch.Tensor:
        """Return all prompts, [B, longest] int64, padded with V."""
        lengths = self.num_prompt_tokens[: self.num_reqs]
        longest = int(lengths.max(initial=0))
        prompts = self.token_ids_cpu[: self.num_reqs, :longest].astype(np.int64)
        prompts[np.arange(longest) >= lengths[:, None]] = self.vocab_size
        return torch.from_numpy(prompts).to(self.device)

    def _make_allowed_token_ids_mask(self) -> torch.Tensor | None:
        """Return [B, V] bool, True is forbidden; None where no request restricts its tokens."""
        if not self.allowed_token_ids:
            return None
        mask = torch.zeros(self.num_reqs, self.vocab_size, dtype=torch.bool)
        for req_id, token_ids in self.allowed_token_ids.items():
            row = mask[self.req_id_to_index[req_id]]
            row.fill_(True)
            row[token_ids] = False
        return mask.to(self.device)

    @property
    def num_reqs(self) -> int:
        """B."""
        return len(self.req_id_to_index)

    @property
    def req_ids(self) -> list[str]:
        """Request ids in slot order; there must be no holes."""
        assert None not in self._req_ids, "condense() has not been called"
        return self._req_ids  # type: ignore[return-value]

    @property
    def all_greedy(self) -> bool:
        """No request is drawn at random."""
        return not self.random_reqs

    @property
    def all_random(self) -> bool:
        """No request is greedy."""
        return not self.greedy_reqs

    @property
    def no_penalties(self) -> bool:
        """No request has a repetition, frequency or presence penalty."""
        return not self.penalties_reqs

    @property
    def max_num_logprobs(self) -> int | None:
        """Most log probabilities that a request wants (V: all of them); None if no request wants any."""
        return max(self.num_logprobs.values(), default=None)
