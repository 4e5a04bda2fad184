"""ModelRunner: one step on the device, prepare -> forward -> sample (vLLM: `v1/worker/gpu_model_runner.py`).

The scheduler sends only what changed; the runner keeps the rest per request (`requests`) and per slot of the
persistent batch (`input_batch`). A step's tokens form one flat batch: request b's rows follow request b - 1's, without
padding, whether it is prefilling, decoding or both.

    requests      A (decode)   B (chunk of 3)        C (decode)
    input_ids     a7         | b4     b5     b6    | c2            [T]
    positions     7          | 4      5      6     | 2             [T]
    slot_mapping  where each token's key and value go in the cache [T]
    query_start_loc  0, 1, 4, 5                                    [B + 1]
    seq_lens      8, 7, 3                                          [B]
    rows for the LM head: 0, 3, 4 (the last of each request)       [B]
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.config import VllmConfig
from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.quantization import get_quantization_config
from folovllm.model_executor.model_loader.build import get_model
from folovllm.outputs import LogprobsTensors, PendingOutput
from folovllm.sample.ops.grammar_mask import GrammarMask
from folovllm.sample.sampler import Sampler
from folovllm.utils.common import cdiv
from folovllm.worker.input_batch import CachedRequestState, InputBatch
from folovllm.worker.step_in_flight import NO_WATCH, NothingToCompute, StepInFlight, StepWatch

if TYPE_CHECKING:
    from folovllm.core.sched.output import CachedRequestData, GrammarOutput, SchedulerOutput
    from folovllm.model_executor.model_loader.source import ModelSource
    from folovllm.model_executor.models.llama import LlamaForCausalLM

PROMPT_LOGPROBS_ROWS = 256
"""Prompt positions whose logits exist at once: [256, V] float32 is 155 MB for V = 152k."""


@dataclass
class StepLayout:
    """The flat batch of a step on the host: T tokens of B requests."""

    input_ids: np.ndarray
    """[T] int32; PLACEHOLDER where only the device knows the token."""
    positions: np.ndarray
    """[T] int64."""
    slot_mapping: np.ndarray
    """[T] int64, a view that the next step overwrites."""
    query_start_loc: np.ndarray
    """[B + 1] int32."""
    seq_lens: np.ndarray
    """[B] int32."""

    @property
    def num_reqs(self) -> int:
        """B."""
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    def metadata(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> AttentionMetadata:
        """Return the metadata of these tensors, which are the layout's on the device."""
        return AttentionMetadata(
            num_actual_tokens=self.num_tokens,
            num_reqs=self.num_reqs,
            max_query_len=int(np.diff(self.query_start_loc).max()),
            max_seq_len=int(self.seq_lens.max()),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            query_start_loc_cpu=self.query_start_loc.tolist(),
            seq_lens_cpu=self.seq_lens.tolist(),
        )


class ModelRunner:
    """Holds the model, the persistent batch and the KV cache of one device."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        dtype: torch.dtype,
        attn_backend: type[AttentionBackend],
    ) -> None:
        """Allocates the host-side batch; the model comes with load_model, the cache with initialize_kv_cache."""
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.device = device
        self.dtype = dtype
        self.attn_backend = attn_backend
        self.block_size = vllm_config.cache_config.block_size
        assert self.model_config.max_model_len is not None
        self.max_model_len = self.model_config.max_model_len
        scheduler_config = vllm_config.scheduler_config
        self.requests: dict[str, CachedRequestState] = {}
        self.input_batch = InputBatch(
            max_num_reqs=scheduler_config.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=scheduler_config.max_num_batched_tokens,
            device=device,
            vocab_size=self.model_config.get_vocab_size(),
            block_sizes=[self.block_size],
        )
        self.sampler = Sampler()
        self.model: LlamaForCausalLM
        self.kv_caches: dict[str, torch.Tensor] = {}
        # Request id -> how many log probabilities per prompt token; entries leave once delivered.
        self.num_prompt_logprobs: dict[str, int] = {}
        self.prompt_logprobs_so_far: dict[str, list[LogprobsTensors]] = {}
        self.last_step: StepInFlight | None = None
        self.collect_step_times = vllm_config.observability_config.step_trace_path is not None
        self.cache_dtype = torch.float8_e4m3fn if vllm_config.cache_config.cache_dtype == "fp8" else dtype
        self._arange = np.arange(max(scheduler_config.max_num_batched_tokens, scheduler_config.max_num_seqs + 1))

    # Start-up.

    def load_model(self, source: ModelSource, use_tqdm: bool) -> int:
        """Build the model, fill and repack its weights; return the bytes they take."""
        quant_config = get_quantization_config(source.hf_config())
        self.model = get_model(
            self.model_config, source, self.attn_backend, quant_config, self.dtype, self.device, use_tqdm
        )
        tensors = {t.data_ptr(): t for t in self.model.state_dict().values() if not t.is_mkldnn}
        packed = [t for t in self.model.state_dict().values() if t.is_mkldnn]
        return sum(t.numel() * t.element_size() for t in [*tensors.values(), *packed])

    def _attention_layers(self) -> dict[str, Attention]:
        return {m.layer_name: m for m in self.model.modules() if isinstance(m, Attention)}

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        """Return layer name -> what its cache looks like."""
        return {
            name: FullAttentionSpec(self.block_size, layer.num_kv_heads, layer.head_size, self.cache_dtype)
            for name, layer in self._attention_layers().items()
        }

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> int:
        """Allocate one cache per layer and bind it; return the bytes taken.

        Raises:
            ValueError: the device has not that much memory.
        """
        num_bytes = 0
        layers = self._attention_layers()
        for group in kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            shape = self.attn_backend.get_kv_cache_shape(
                kv_cache_config.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size
            )
            try:
                caches = self._allocate_caches(shape, spec.dtype, len(group.layer_names))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError, OSError, OverflowError) as error:
                total = kv_cache_config.num_blocks * spec.page_size_bytes * len(layers)
                raise ValueError(
                    f"Not enough memory for a KV cache of {total / 2**30:.2f} GiB: {error}. Lower "
                    "kv_cache_memory_bytes, gpu_memory_utilization or max_model_len."
                ) from error
            for name, cache in zip(group.layer_names, caches, strict=True):
                layers[name].kv_cache = self.kv_caches[name] = cache
                num_bytes += cache.numel() * cache.element_size()
        return num_bytes

    def _allocate_caches(self, shape: tuple[int, ...], dtype: torch.dtype, num_layers: int) -> list[torch.Tensor]:
        """Return a cache of `shape` [2, Nb, Bs, Hkv, D] per layer: zeros, since masked scores must stay finite.

        On a CPU memory is taken when a block is first used (torch.zeros would take all), in huge pages where the system
        has them: small pages cost more to take than to write. A block's keys and values of all layers lie side by side,
        [Nb, layers, 2, Bs, Hkv, D], so that a block takes a few pages and not two per layer.
        """
        if self.device.type != "cpu":
            return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_layers)]
        num_bytes = num_layers * math.prod(shape) * dtype.itemsize
        if os.name == "posix":  # private: shared memory, Python's default, gets no huge pages
            buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            buffer = mmap.mmap(-1, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                buffer.madvise(mmap.MADV_HUGEPAGE)
        _, num_blocks, *block = shape
        blocks = torch.frombuffer(buffer, dtype=dtype).view(num_blocks, num_layers, 2, *block)
        return [blocks[:, layer].transpose(0, 1) for layer in range(num_layers)]

    @torch.inference_mode()
    def profile_run(self) -> None:
        """Run the largest step on a scratch cache: a longest prefill, and logits for max_num_seqs requests."""
        scheduler_config = self.vllm_config.scheduler_config
        num_tokens = min(scheduler_config.max_num_batched_tokens, self.max_model_len)
        num_blocks = cdiv(num_tokens, self.block_size)
        with self._scratch_cache(num_blocks):
            indices = torch.arange(num_tokens, device=self.device)
            layout = StepLayout(
                input_ids=self._arange[:num_tokens],
                positions=self._arange[:num_tokens],
                slot_mapping=self._arange[:num_tokens],
                query_start_loc=np.array([0, num_tokens], dtype=np.int32),
                seq_lens=np.array([num_tokens], dtype=np.int32),
            )
            metadata = layout.metadata(
                query_start_loc=self._to_device(layout.query_start_loc),
                seq_lens=self._to_device(layout.seq_lens),
                block_table=torch.arange(num_blocks, dtype=torch.int32, device=self.device).unsqueeze(0),
                slot_mapping=indices,
            )
            metadata = self.attn_backend.build_metadata(metadata, self.block_size, self.dtype)
            hidden = self.model(indices % self.model_config.get_vocab_size(), indices, metadata)
            logits = self.model.compute_logits(hidden[: scheduler_config.max_num_seqs])
            logits.softmax(dim=-1)

    def compile_kernels(self) -> None:
        """Compile what the first steps would otherwise wait for; nothing here (GPUModelRunner does)."""

    def profile_graph_memory(self) -> int:
        """Return about how many bytes record_graphs will take: none here."""
        return 0

    def record_graphs(self) -> None:
        """Record what can be replayed; nothing here (GPUModelRunner does)."""

    @contextmanager
    def _scratch_cache(self, num_blocks: int) -> Iterator[None]:
        """Bind one small cache to all layers inside the block."""
        spec = next(iter(self.get_kv_cache_spec().values()))
        shape = self.attn_backend.get_kv_cache_shape(num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        scratch = torch.zeros(shape, dtype=spec.dtype, device=self.device)
        layers = self._attention_layers().values()
        for layer in layers:
            layer.kv_cache = scratch
        yield
        for layer in layers:
            layer.kv_cache = torch.empty(0)

    # A step.

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, get_grammar_output: Callable[[], GrammarOutput] | None = None
    ) -> PendingOutput:
        """Launch one step; it may be called again before the tokens of the step before have been fetched.

        `get_grammar_output` returns the masks of the step's structured output, where it has any.
        """
        watch = StepWatch() if self.collect_step_times else NO_WATCH
        self._update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return NothingToCompute()
        num_scheduled = self._scheduled_per_slot(scheduler_output)
        input_ids, positions, metadata = self._prepare_inputs(num_scheduled)
        watch.lap("prepare")
        hidden = self.model(input_ids, positions, metadata)
        prompt_logprobs = self._gather_prompt_logprobs(hidden, num_scheduled, metadata)
        logits = self.model.compute_logits(self._hidden_of_last(hidden, metadata))
        watch.lap("forward")
        self._refresh_sampling_metadata(get_grammar_output)
        step = self._sample(logits, num_scheduled, metadata, prompt_logprobs)
        watch.lap("sample")
        step.step_times = watch.times
        return step

    def _update_states(self, scheduler_output: SchedulerOutput) -> None:
        """Apply the scheduler's deltas to `requests` and to the slots of the persistent batch."""
        batch = self.input_batch
        for req_id in scheduler_output.finished_req_ids:
            self.requests.pop(req_id, None)
            self.num_prompt_logprobs.pop(req_id, None)
            self.prompt_logprobs_so_far.pop(req_id, None)
            batch.remove_request(req_id)
        # Requests that sit this step out (preempted, or no budget left) leave their slot but keep their state.
        for req_id in [r for r in batch.req_id_to_index if r not in scheduler_output.num_scheduled_tokens]:
            batch.remove_request(req_id)
        to_add: list[CachedRequestState] = []
        for new in scheduler_output.scheduled_new_reqs:
            state = CachedRequestState(
                req_id=new.req_id,
                prompt_token_ids=new.prompt_token_ids,
                sampling_params=new.sampling_params,
                block_ids=new.block_ids,
                generator=None,
                num_computed_tokens=new.num_computed_tokens,
                output_token_ids=[],
            )
            self.requests[new.req_id] = state
            wanted = new.sampling_params.prompt_logprobs
            if wanted is not None:
                self.num_prompt_logprobs[new.req_id] = self.model_config.get_vocab_size() if wanted == -1 else wanted
                self.prompt_logprobs_so_far[new.req_id] = []
            to_add.append(state)
        to_add.extend(self._update_cached(scheduler_output.scheduled_cached_reqs))
        for state in to_add:
            batch.add_request(state)
        batch.condense()

    def _update_cached(self, cached: CachedRequestData) -> list[CachedRequestState]:
        """Update requests that ran before; return those that need a slot again."""
        batch = self.input_batch
        to_add = []
        for i, req_id in enumerate(cached.req_ids):
            state = self.requests[req_id]
            state.num_computed_tokens = cached.num_computed_tokens[i]
            new_block_ids = cached.new_block_ids[i]
            index = batch.req_id_to_index.get(req_id)
            if req_id in cached.resumed_req_ids:
                assert new_block_ids is not None
                state.block_ids = new_block_ids
                # Log probabilities of a prompt that was cut short start over with it.
                if req_id in self.prompt_logprobs_so_far:
                    self.prompt_logprobs_so_far[req_id] = []
            elif new_block_ids is not None:
                for held, new in zip(state.block_ids, new_block_ids, strict=True):
                    held.extend(new)
                if index is not None:
                    batch.block_table.append_row(new_block_ids[0], index)
            if index is None:
                to_add.append(state)
            else:
                batch.num_computed_tokens_cpu[index] = state.num_computed_tokens
        return to_add

    def _scheduled_per_slot(self, scheduler_output: SchedulerOutput) -> np.ndarray:
        """Return tokens of this step per slot, [B] int64."""
        scheduled = scheduler_output.num_scheduled_tokens
        return np.array([scheduled[req_id] for req_id in self.input_batch.req_ids], dtype=np.int64)

    def _lay_out(self, num_scheduled: np.ndarray) -> StepLayout:
        """Return the flat batch drawn at the top of this file; vectorised, no loop over requests or tokens."""
        batch = self.input_batch
        num_reqs = len(num_scheduled)
        query_start_loc = np.zeros(num_reqs + 1, dtype=np.int32)
        np.cumsum(num_scheduled, out=query_start_loc[1:])
        num_tokens = int(query_start_loc[-1])
        num_computed = batch.num_computed_tokens_cpu[:num_reqs]
        if num_tokens == num_reqs:  # every request has one token: nothing to repeat
            req_indices, positions = self._arange[:num_reqs], num_computed.astype(np.int64)
        else:
            req_indices = np.repeat(self._arange[:num_reqs], num_scheduled)  # [T]
            positions = self._arange[:num_tokens] + (num_computed - query_start_loc[:-1])[req_indices]  # [T]
        input_ids = batch.token_ids_cpu[req_indices, positions]
        batch.block_table.compute_slot_mapping(req_indices, positions)
        return StepLayout(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=batch.block_table.slot_mapping_np[:num_tokens],
            query_start_loc=query_start_loc,
            seq_lens=(num_computed + num_scheduled).astype(np.int32),
        )

    def _prepare_inputs(self, num_scheduled: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Return the step's token ids [T], positions [T] and attention metadata, on the device."""
        layout = self._lay_out(num_scheduled)
        table = self.input_batch.block_table
        table.commit(layout.num_reqs)
        metadata = layout.metadata(
            query_start_loc=self._to_device(layout.query_start_loc),
            seq_lens=self._to_device(layout.seq_lens),
            block_table=table.get_device_tensor(layout.num_reqs),
            slot_mapping=self._to_device(layout.slot_mapping),
        )
        if self._wants_last_rows(metadata):
            metadata.output_rows = metadata.query_start_loc[1:].long() - 1
        metadata = self.attn_backend.build_metadata(metadata, self.block_size, self.dtype)
        tokens = self._feed_sampled_tokens(self._to_device(layout.input_ids), metadata)
        return tokens, self._to_device(layout.positions), metadata

    def _wants_last_rows(self, metadata: AttentionMetadata) -> bool:
        """Return whether each request's last token is all that is read, unless all are that: no prompt's logits."""
        return metadata.num_actual_tokens > metadata.num_reqs and not self.num_prompt_logprobs

    @staticmethod
    def _hidden_of_last(hidden: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Return the hidden states of each request's last token [B, E], of the model's output for this step."""
        if len(hidden) == metadata.num_reqs:
            return hidden
        return hidden[metadata.query_start_loc[1:].long() - 1]

    def _feed_sampled_tokens(self, input_ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Put the tokens of a step in flight, which the host does not know, into the last row of their requests."""
        last = self.last_step
        if last is None or last.landed:
            return input_ids
        slots, rows = last.rows_for(self.input_batch.req_ids)
        if len(slots) == metadata.num_actual_tokens and rows == list(range(len(last.sampled))):
            return last.sampled  # nothing but decodes, and the same batch as before
        if slots:
            last_rows = torch.tensor([metadata.query_start_loc_cpu[slot + 1] - 1 for slot in slots])
            sampled = last.sampled[torch.tensor(rows).to(self.device, non_blocking=True)]
            input_ids[last_rows.to(self.device, non_blocking=True)] = sampled.to(input_ids.dtype)
        return input_ids

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _gather_prompt_logprobs(
        self, hidden: torch.Tensor, num_scheduled: np.ndarray, metadata: AttentionMetadata
    ) -> dict[str, LogprobsTensors | None]:
        """Return log probabilities of the prompts that this step completes, collected over their chunks.

        The row at position p predicts token p + 1, so a prompt of n tokens has n - 1 of them.
        """
        done: dict[str, LogprobsTensors | None] = {}
        for req_id, num_logprobs in list(self.num_prompt_logprobs.items()):
            index = self.input_batch.req_id_to_index.get(req_id)
            if index is None:
                continue
            state = self.requests[req_id]
            prompt = state.prompt_token_ids
            start = state.num_computed_tokens
            stop = min(start + int(num_scheduled[index]), len(prompt) - 1)
            first_row = metadata.query_start_loc_cpu[index]
            chunks = self.prompt_logprobs_so_far[req_id]
            for p in range(start, stop, PROMPT_LOGPROBS_ROWS):
                end = min(p + PROMPT_LOGPROBS_ROWS, stop)
                logits = self.model.compute_logits(hidden[first_row + p - start : first_row + end - start])
                targets = torch.tensor(prompt[p + 1 : end + 1], device=self.device)
                logprobs = self.sampler.compute_logprobs(logits)
                gathered = self.sampler.gather_logprobs(logprobs, num_logprobs, targets)
                chunks.append(LogprobsTensors(*(t.cpu() for t in gathered[:3])))
            if start + int(num_scheduled[index]) >= len(prompt):
                done[req_id] = _concatenate(chunks, num_logprobs)
                del self.num_prompt_logprobs[req_id], self.prompt_logprobs_so_far[req_id]
        return done

    def _sample(
        self,
        logits: torch.Tensor,
        num_scheduled: np.ndarray,
        metadata: AttentionMetadata,
        prompt_logprobs: dict[str, LogprobsTensors | None],
    ) -> StepInFlight:
        """Draw a token per slot; only those of requests whose tokens are all computed count."""
        tokens, logprobs = self._draw(logits, metadata)
        return self._launched(tokens, num_scheduled, logprobs, prompt_logprobs)

    def _refresh_sampling_metadata(self, get_grammar_output: Callable[[], GrammarOutput] | None) -> None:
        """Make the batch's sampling metadata that of this step: after the launch of the layers, which need none of it.

        A device then computes meanwhile. With a single long prompt this is 1% of the time to its first token.
        """
        self.input_batch.refresh_metadata()
        self.input_batch.sampling_metadata.grammar_mask = self._grammar_mask(get_grammar_output)

    def _grammar_mask(self, get_grammar_output: Callable[[], GrammarOutput] | None) -> GrammarMask | None:
        """Return the masks of the step's structured output, with the rows that they are for, on the device."""
        if get_grammar_output is None:
            return None
        output = get_grammar_output()
        row_of = self.input_batch.req_id_to_index
        rows = torch.tensor([row_of[req_id] for req_id in output.structured_output_request_ids], dtype=torch.int64)
        bitmask = torch.from_numpy(output.grammar_bitmask)
        if self.device.type == "cuda":  # pinned, so that the copies wait for nothing
            rows, bitmask = (t.pin_memory().to(self.device, non_blocking=True) for t in (rows, bitmask))
        return GrammarMask(rows, bitmask)

    def _draw(self, logits: torch.Tensor, metadata: AttentionMetadata) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Return a token per slot [B] int64, and the log probabilities that are wanted, on the device."""
        sampling_metadata = self.input_batch.sampling_metadata
        if not sampling_metadata.no_penalties or sampling_metadata.bad_words_token_ids:
            # These depend on what was generated so far, the newest token included: wait for it here, after the
            # forward pass has been launched.
            self._land_last_step()
        # The token drawn now comes after seq_len others; its noise depends on that position alone.
        sampling_metadata.positions = metadata.seq_lens.long()
        output = self.sampler(logits, sampling_metadata)
        return output.sampled_token_ids.view(-1), output.logprobs_tensors

    def _launched(
        self,
        tokens: torch.Tensor,
        num_scheduled: np.ndarray,
        logprobs: LogprobsTensors | None,
        prompt_logprobs: dict[str, LogprobsTensors | None],
    ) -> StepInFlight:
        """Return the step as launched; `tokens` [B] may still be in the making."""
        batch = self.input_batch
        num_reqs = len(num_scheduled)
        seq_lens = batch.num_computed_tokens_cpu[:num_reqs] + num_scheduled
        complete = np.flatnonzero(seq_lens >= batch.num_tokens[:num_reqs])
        self.last_step = StepInFlight(tokens, complete, batch, self.requests, logprobs, prompt_logprobs)
        return self.last_step

    def _land_last_step(self) -> None:
        if self.last_step is not None:
            self.last_step.get_output()


def _concatenate(chunks: list[LogprobsTensors], num_logprobs: int) -> LogprobsTensors:
    """Join the chunks of one prompt; a prompt of one token has none."""
    if not chunks:
        return LogprobsTensors(
            torch.empty((0, num_logprobs + 1), dtype=torch.int64),
            torch.empty((0, num_logprobs + 1), dtype=torch.float32),
            torch.empty(0, dtype=torch.int64),
        )
    return LogprobsTensors(
        torch.cat([c.logprob_token_ids for c in chunks]),
        torch.cat([c.logprobs for c in chunks]),
        torch.cat([c.selected_token_ranks for c in chunks]),
    )
