"""GPUModelRunner: a step on CUDA, launched without ever waiting for the device (vLLM: `v1/worker/gpu_model_runner.py`).

    host     schedule k+1 | pack, copy, launch k+1 | wait for the tokens of k | update k | schedule k+2 ...
    device   =============== step k ===============|=============== step k+1 ===============|

A step of nothing but decodes replays a CUDA graph (cuda_graph.py), and so does one with prompt chunks of up to 2048
tokens; a longer one launches its kernels one by one. Sampled tokens stay in `inputs.sampled`, where the next step
finds them; the copy to the host runs behind the device's back (StepInFlight).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.backends.paged_triton import TritonPagedBackend, TritonPagedImpl
from folovllm.attention.triton_decode import wants_longest_first
from folovllm.attention.triton_prefill import build_tiles
from folovllm.config import VllmConfig
from folovllm.kv_cache_interface import KVCacheConfig
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.triton_gptq_tiles import ROW_BUCKETS
from folovllm.model_executor.models.fused_decoder import supports_pdl
from folovllm.outputs import LogprobsTensors, PendingOutput
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.fused_sampler import can_sample_on_device, sample_tokens
from folovllm.sample.ops.grammar_mask import GrammarMask, apply_grammar_mask
from folovllm.utils.common import cdiv
from folovllm.utils.triton_launch import compile_only
from folovllm.worker.block_table import PADDING_SLOT
from folovllm.worker.cuda_graph import MAX_MIXED_CONTEXT, MAX_PROMPT_REQS, PROMPT_SIZES, SAMPLING_KINDS, StepGraphs
from folovllm.worker.model_runner import ModelRunner, StepLayout
from folovllm.worker.step_in_flight import NO_WATCH, NothingToCompute, StepWatch
from folovllm.worker.step_inputs import StepInputs

if TYPE_CHECKING:
    from folovllm.core.sched.output import GrammarOutput, SchedulerOutput
    from folovllm.model_executor.model_loader.source import ModelSource

GRAPH_OVERHEAD_BYTES = 2 << 20
"""What one more recorded size takes, its share of the driver's memory included; measured on an H100."""
HOST_BOUND_FLOPS = 5 * 10**12
"""What an H100 computes in the 10 ms that the host takes to launch a model's kernels one by one."""
COMPILE_THREADS = 12
"""Kernels compiled at a time at the start."""
SIZES_OF_THEIR_OWN_KERNELS = (1, 2, 16, 24, 64, 128, 256)
"""Decode sizes that together use every tile of the products."""
PDL_MAX_DECODES = 16
"""In larger batches starting the next kernel early slows attention down (docs/dev/milestone_4.md)."""


class GPUModelRunner(ModelRunner):
    """ModelRunner with inputs packed into one copy, fused kernels and CUDA graphs."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, dtype: torch.dtype, attn_backend: type[AttentionBackend]
    ) -> None:
        """See ModelRunner; the device tensors come with load_model."""
        super().__init__(vllm_config, device, dtype, attn_backend)
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.graphs: StepGraphs | None = None
        self.inputs: StepInputs
        self._logits: torch.Tensor
        self._temperature: torch.Tensor
        self._top_k: torch.Tensor
        self._top_p: torch.Tensor
        self._seeds: torch.Tensor
        self._sampling_version = -1
        self._order = np.empty(0, dtype=np.int64)
        self._order_state = (-1, 0)

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps are recorded: unless told not to, with a backend that can be."""
        return not self.model_config.enforce_eager and issubclass(self.attn_backend, TritonPagedBackend)

    def load_model(self, source: ModelSource, use_tqdm: bool) -> int:
        """See ModelRunner; also reserves the tensors that every step uses, so that they count as taken memory."""
        num_bytes = super().load_model(source, use_tqdm)
        n, device = self.max_num_reqs, self.device
        max_num_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.inputs = StepInputs(max_num_tokens, n, cdiv(self.max_model_len, self.block_size), device)
        vocab_size = self.model_config.get_vocab_size()
        self._logits = torch.zeros((n, vocab_size), dtype=self.dtype, device=device)
        self._temperature = torch.zeros(n, dtype=torch.float32, device=device)
        self._top_k = torch.full((n,), vocab_size, dtype=torch.int32, device=device)
        self._top_p = torch.ones(n, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(n, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(n + 1, dtype=torch.int32, device=device)
        self._num_kv_heads = next(iter(self._attention_layers().values())).num_kv_heads
        self._tile_tokens = 0
        if issubclass(self.attn_backend, TritonPagedBackend):
            impl = next(iter(self._attention_layers().values())).impl
            assert isinstance(impl, TritonPagedImpl)
            self._tile_tokens = impl.prefill_tile_tokens(self.dtype, device)
            self._output_rows = torch.zeros(MAX_PROMPT_REQS, dtype=torch.int32, device=device)
            self._tiles = torch.zeros((self._max_tiles(max(PROMPT_SIZES)), 4), dtype=torch.int32, device=device)
        return num_bytes

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Compile the kernels of the decode sizes, of sampling, of a mixed step and of prompts, several at a time.

        Each step is gone through once without its kernels, over a scratch cache: see compile_only. Those that take
        longest to compile go first, and what keeps this thread busy (libraries load) last.
        """
        if not issubclass(self.attn_backend, TritonPagedBackend):
            return
        is_packed = any(p.quant_method.packed_weight(p) is not None for p in self._products())
        with compile_only(self.device, COMPILE_THREADS):
            with self._scratch_cache(1):
                for kind in reversed(SAMPLING_KINDS):
                    self.launch_sampling(1, kind)
                for size in self.sizes_to_compile(self.graph_sizes(), is_packed):
                    self.launch_decode(size)
                for size in self.prompt_sizes()[-1:]:
                    self.launch_prompt(size)
                self._launch_mixed_step()
                self._launch_grammar_mask()
                packed = self.inputs.pack(np.zeros(1, dtype=np.int32))
                self.inputs.write_block_table(packed, packed)
            self.profile_run()

    def _launch_grammar_mask(self) -> None:
        """Launch the masking of a row, with a mask that allows every token."""
        num_words = cdiv(self._logits.shape[1], 32)
        rows = torch.zeros(1, dtype=torch.int64, device=self.device)
        bitmask = torch.full((1, num_words), -1, dtype=torch.int32, device=self.device)
        apply_grammar_mask(self._logits[:1], GrammarMask(rows, bitmask))

    def _launch_mixed_step(self) -> None:
        """Launch a step of a chunk and a decode, both of null requests."""
        layout = StepLayout(
            input_ids=np.zeros(3, dtype=np.int32),
            positions=np.array([0, 1, 0], dtype=np.int64),
            slot_mapping=np.full(3, PADDING_SLOT, dtype=np.int64),
            query_start_loc=np.array([0, 2, 3], dtype=np.int32),
            seq_lens=np.array([2, 1], dtype=np.int32),
        )
        device = self.device
        metadata = layout.metadata(
            query_start_loc=torch.from_numpy(layout.query_start_loc).to(device),
            seq_lens=torch.from_numpy(layout.seq_lens).to(device),
            block_table=self.inputs.block_table.new_zeros((2, self.inputs.block_table.shape[1])),
            slot_mapping=torch.from_numpy(layout.slot_mapping).to(device),
        )
        metadata = self.attn_backend.build_metadata(metadata, self.block_size, self.dtype)
        ids = torch.zeros(3, dtype=torch.int64, device=device)
        self.model(ids, torch.from_numpy(layout.positions).to(device), metadata)

    def graph_sizes(self) -> list[int]:
        """Return the decode batch sizes to record."""
        return self.vllm_config.compilation_config.graph_sizes(self.max_num_reqs) if self.uses_graphs else []

    def sizes_to_compile(self, sizes: list[int], is_packed: bool) -> list[int]:
        """Return those of the recorded decode `sizes` that together use every kernel; `is_packed`: GPTQ's, too."""
        attention = {self._attention_kernel(size): size for size in reversed(sizes)}  # the smallest with each
        own = {*SIZES_OF_THEIR_OWN_KERNELS, *attention.values(), *sizes[-1:], *(ROW_BUCKETS if is_packed else ())}
        return [size for size in sizes if size in own]

    def _attention_kernel(self, size: int) -> tuple[int, ...]:
        """Return what decode steps of `size` and of another size have in common if attention is the same kernel."""
        impl = next(iter(self._attention_layers().values())).impl
        assert isinstance(impl, TritonPagedImpl)
        deterministic, pdl = self.model_config.deterministic, self._decode_starts_early(size)
        config = impl.decode_config(size, self.max_model_len, deterministic, pdl, self.dtype, self.device)
        return *config.kernel, self._wants_longest_first(size)

    def _decode_starts_early(self, size: int) -> bool:
        return size <= PDL_MAX_DECODES and supports_pdl(self.device)

    def prompt_sizes(self) -> list[int]:
        """Return the sizes of prompt steps to record, in tokens.

        Only those that the device finishes before the host could have launched them: there the rows that fill a step up
        to its recorded size cost nothing. They use our own attention also where a library attends to longer ones.
        """
        weights = sum(product.input_size * product.output_size for product in self._products())
        limit = min(self.vllm_config.scheduler_config.max_num_batched_tokens, HOST_BOUND_FLOPS // (2 * weights))
        return [size for size in PROMPT_SIZES if size <= limit]

    def _products(self) -> list[LinearBase]:
        return [module for module in self.model.model.layers.modules() if isinstance(module, LinearBase)]

    def _max_tiles(self, num_tokens: int) -> int:
        """Return the most query tiles of a recorded prompt step: the last tile of each chunk may be short."""
        return cdiv(num_tokens, self._tile_tokens) + MAX_PROMPT_REQS

    @torch.inference_mode()
    def profile_graph_memory(self) -> int:
        """Return about how many bytes the graphs will take: the largest is recorded on trial, over a scratch cache."""
        sizes = self.graph_sizes()
        if not sizes:
            return 0
        torch.cuda.synchronize(self.device)
        free_before = torch.cuda.mem_get_info(self.device)[0]
        with self._scratch_cache(1):
            trial = StepGraphs(self, sizes[-1:], self.prompt_sizes()[-1:])
            trial.record()
            torch.cuda.synchronize(self.device)
            taken = free_before - torch.cuda.mem_get_info(self.device)[0]
            del trial
        others = max(0, len(sizes) - 1) + max(0, len(self.prompt_sizes()) - 1)
        return max(0, taken) + others * GRAPH_OVERHEAD_BYTES

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record all sizes; the KV cache must be bound."""
        sizes = self.graph_sizes()
        if sizes:
            self.graphs = StepGraphs(self, sizes, self.prompt_sizes())
            self.graphs.record()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> int:
        """See ModelRunner."""
        num_bytes = super().initialize_kv_cache(kv_cache_config)
        self.inputs.block_table.zero_()  # padding rows of a recorded step point to the null block
        return num_bytes

    # What the graphs record. Only (size, kind) and persistent tensors may matter here.

    def launch_decode(self, size: int) -> None:
        """Launch a decode step of `size` rows, from the packed inputs to `_logits`."""
        inputs = self.inputs
        inputs.unpack(size, size)
        assert issubclass(self.attn_backend, TritonPagedBackend)
        metadata = self.attn_backend.build_decode_metadata(
            size,
            self.max_model_len,
            query_start_loc=self._query_starts[: size + 1],
            seq_lens=inputs.seq_lens[:size],
            block_table=inputs.block_table[:size],
            slot_mapping=inputs.slot_mapping[:size],
            pdl=self._decode_starts_early(size),
            order=inputs.order(size) if self._wants_longest_first(size) else None,
        )
        hidden = self.model(inputs.input_ids[:size], inputs.positions[:size], metadata)
        self.model.lm_head.compute_into(self._logits[:size], hidden)

    def launch_prompt(self, size: int) -> torch.Tensor:
        """Launch the layers for `size` tokens of prompt chunks, of which `_tiles` says whose they are.

        Returns the hidden states of `_output_rows`, [MAX_PROMPT_REQS, E].
        """
        inputs = self.inputs
        assert issubclass(self.attn_backend, TritonPagedBackend)
        metadata = self.attn_backend.build_prompt_metadata(
            size,
            self._tiles[: self._max_tiles(size)],
            self._tile_tokens,
            query_start_loc=self._query_starts[:2],
            seq_lens=inputs.seq_lens[:1],
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping[:size],
        )
        metadata.output_rows = self._output_rows
        hidden: torch.Tensor = self.model(inputs.input_ids[:size], inputs.positions[:size], metadata)
        return hidden

    def launch_sampling(self, num_reqs: int, kind: str) -> None:
        """Launch the sampling of `num_reqs` rows of `_logits` into `inputs.sampled`."""
        restricted = kind == "restricted"
        sample_tokens(
            self._logits[:num_reqs],
            None if kind == "greedy" else self._temperature[:num_reqs],
            self._top_k[:num_reqs] if restricted else None,
            self._top_p[:num_reqs] if restricted else None,
            self._seeds[:num_reqs],
            self.inputs.draw_positions[:num_reqs],
            out=self.inputs.sampled[:num_reqs],
        )

    # A step.

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, get_grammar_output: Callable[[], GrammarOutput] | None = None
    ) -> PendingOutput:
        """See ModelRunner."""
        watch = StepWatch() if self.collect_step_times else NO_WATCH
        self._update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return NothingToCompute()
        num_scheduled = self._scheduled_per_slot(scheduler_output)
        layout = self._lay_out(num_scheduled)
        graph_size, prompt_size = self._recorded_sizes(layout)
        metadata = self._send(layout, graph_size, prompt_size)
        watch.lap("prepare")
        prompt_logprobs: dict[str, LogprobsTensors | None] = {}
        if graph_size:
            assert self.graphs is not None
            self.graphs.replay(graph_size)
        else:
            num_tokens = prompt_size or layout.num_tokens
            self.inputs.unpack(num_tokens, layout.num_reqs)
            if prompt_size:
                assert self.graphs is not None
                hidden = self.graphs.replay_prompt(prompt_size)[: layout.num_reqs]
            else:
                hidden = self.model(self.inputs.input_ids[:num_tokens], self.inputs.positions[:num_tokens], metadata)
            prompt_logprobs = self._gather_prompt_logprobs(hidden, num_scheduled, metadata)
            self.model.lm_head.compute_into(self._logits[: layout.num_reqs], self._hidden_of_last(hidden, metadata))
        watch.lap("forward")
        self._refresh_sampling_metadata(get_grammar_output)
        tokens, logprobs = self._draw_tokens(metadata, graph_size)
        step = self._launched(tokens, num_scheduled, logprobs, prompt_logprobs)
        watch.lap("sample")
        step.step_times = watch.times
        return step

    def _recorded_sizes(self, layout: StepLayout) -> tuple[int, int]:
        """Return the sizes of the recorded decode and of the recorded prompt step that can run this one, 0 for none."""
        if self.graphs is None or self.num_prompt_logprobs:
            return 0, 0
        if layout.num_tokens == layout.num_reqs:
            return self.graphs.padded_size(layout.num_reqs) or 0, 0
        if layout.num_reqs > MAX_PROMPT_REQS:
            return 0, 0
        decodes = np.diff(layout.query_start_loc) == 1
        # The prefill kernel attends for them, too; its bits are not the decode kernel's.
        if decodes.any() and (self.model_config.deterministic or layout.seq_lens[decodes].max() > MAX_MIXED_CONTEXT):
            return 0, 0
        return 0, self.graphs.padded_prompt_size(layout.num_tokens) or 0

    def _send(self, layout: StepLayout, graph_size: int, prompt_size: int) -> AttentionMetadata:
        """Start the copy of the step's inputs; return its metadata (of the eager launch, where there is one)."""
        inputs = self.inputs
        num_tokens = graph_size or prompt_size or layout.num_tokens
        num_reqs = graph_size or layout.num_reqs
        inputs.begin()
        inputs.pack(layout.input_ids, num_tokens)
        inputs.pack(self._source_rows(layout), num_tokens, padding=-1)
        inputs.pack(layout.positions, num_tokens)
        inputs.pack(layout.slot_mapping, num_tokens, padding=PADDING_SLOT)
        inputs.pack(layout.seq_lens, num_reqs)
        if graph_size and self._wants_longest_first(graph_size):  # right behind the lengths: see StepInputs.order
            inputs.pack(self._longest_first(layout.seq_lens, graph_size))
        query_start_loc = inputs.pack(layout.query_start_loc)
        rows, values = self.input_batch.block_table.take_changed_rows()
        if len(rows):
            changed = inputs.pack(rows), inputs.pack(values)
        if prompt_size:
            requests = range(layout.num_reqs)
            tiles = build_tiles(layout.query_start_loc, layout.seq_lens, requests, self._tile_tokens)
            packed_tiles = inputs.pack(tiles, 4 * self._max_tiles(prompt_size))
        if not graph_size:
            last_rows = layout.query_start_loc[1:] - 1
            packed_rows = inputs.pack(last_rows, MAX_PROMPT_REQS if prompt_size else None, padding=int(last_rows[-1]))
        inputs.send()
        if len(rows):
            inputs.write_block_table(*changed)
        if prompt_size:
            self._tiles[: self._max_tiles(prompt_size)].copy_(packed_tiles.view(-1, 4))
            self._output_rows.copy_(packed_rows)
        metadata = layout.metadata(
            query_start_loc=query_start_loc,
            seq_lens=inputs.seq_lens[: layout.num_reqs],
            block_table=inputs.block_table[: layout.num_reqs],
            slot_mapping=inputs.slot_mapping[: layout.num_tokens],
        )
        if graph_size or prompt_size:
            return metadata
        if self._wants_last_rows(metadata):
            metadata.output_rows = packed_rows
        return self.attn_backend.build_metadata(metadata, self.block_size, self.dtype)

    def _wants_longest_first(self, num_reqs: int) -> bool:
        return wants_longest_first(num_reqs, self._num_kv_heads)

    def _longest_first(self, seq_lens: np.ndarray, size: int) -> np.ndarray:
        """Return the rows of a recorded decode step [size], by sequence length; padding comes last.

        Steps of decodes add a token to each, so the order holds as long as the batch does.
        """
        state = (self.input_batch.version, size)
        if self._order_state != state:
            self._order_state = state
            rows = np.argsort(seq_lens, kind="stable")[::-1]
            self._order = np.concatenate([rows, np.arange(len(rows), size)])
        return self._order

    def _source_rows(self, layout: StepLayout) -> np.ndarray:
        """Return [T] int32: the row of `inputs.sampled` that holds a token which the host does not know, else -1."""
        source = np.full(layout.num_tokens, -1, dtype=np.int32)
        last = self.last_step
        if last is None or last.landed:
            return source
        last_rows = layout.query_start_loc[1:] - 1
        if last.batch_version == self.input_batch.version:
            source[last_rows[last.complete]] = last.complete
        else:
            slots, rows = last.rows_for(self.input_batch.req_ids)
            source[last_rows[slots]] = rows
        return source

    def _draw_tokens(self, metadata: AttentionMetadata, graph_size: int) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Return the step's tokens [B] and the log probabilities that are wanted, on the device."""
        num_reqs = metadata.num_reqs
        sampled = self.inputs.sampled[:num_reqs]
        sampling_metadata = self.input_batch.sampling_metadata
        if not can_sample_on_device(sampling_metadata):
            tokens, logprobs = self._draw(self._logits[:num_reqs], metadata)
            return sampled.copy_(tokens), logprobs
        if sampling_metadata.grammar_mask is not None:
            apply_grammar_mask(self._logits[:num_reqs], sampling_metadata.grammar_mask)
        kind = self._load_sampling_params(sampling_metadata, num_reqs)
        if graph_size:
            assert self.graphs is not None
            self.graphs.replay_sampling(graph_size, kind)
        else:
            self.launch_sampling(num_reqs, kind)
        return sampled, None

    def _load_sampling_params(self, metadata: SamplingMetadata, num_reqs: int) -> str:
        """Copy the parameters to where the graphs read them, if the batch has changed; return the sampling kind."""
        if metadata.all_greedy:
            return "greedy"  # which reads no parameter
        if self._sampling_version != self.input_batch.version:
            self._sampling_version = self.input_batch.version
            if metadata.temperature is not None:
                self._temperature[:num_reqs].copy_(metadata.temperature)
            self._top_k[:num_reqs] = metadata.top_k if metadata.top_k is not None else self._logits.shape[1]
            self._top_p[:num_reqs] = metadata.top_p if metadata.top_p is not None else 1.0
            if metadata.seeds is not None:
                self._seeds[:num_reqs].copy_(metadata.seeds)
        return "temperature" if metadata.top_k is None and metadata.top_p is None else "restricted"
