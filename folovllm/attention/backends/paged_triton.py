"""PagedAttention on CUDA: a step's decodes and prompt chunks, each through the kernel that suits it.

Keys and values of all requests lie in one pool of pages; a request's block table says which are its own. Any page may
be anyone's, so the pool never fragments, and two requests with a common prefix may name the same page:

    block table           the pool (one layer, keys)
    request 0:  7 3 9     page 3 [tokens 16..31 of 0]   page 4 [tokens 0..15 of 1]   page 7 [tokens 0..15 of 0] ...
    request 1:  4 1       each page [Bs, Hkv, D], its Bs tokens one after another

A step holds two kinds of work, and they are limited by different things:

    decode    one new token: every page of the context is read for a few multiplications. Bound by memory; what counts
              is reads in flight. Unless the batch is large its contexts are cut into splits, so that all
              multiprocessors read to the end, and the program that finishes last combines the parts:
                                                                        (triton_decode.py, drawing of the splits)
                  request 0   | 7 | 3 | 9 |  ->  split 0: 7 3, split 1: 9  ->  two partial outputs  ->  their mean
    chunk     many new tokens of a prompt: each key read serves all of them. Bound by matrix multiplications; what
              counts is large tiles.                                 (triton_prefill.py, drawing of the causal tiles)

Requests of both kinds may lie anywhere in a batch, so a mixed step names them by index; a pure decode step needs no
index, and its metadata holds nothing that depends on the contexts: it can be recorded once in a CUDA graph and
replayed while the runner updates the persistent tensors below it (build_decode_metadata).

vLLM's counterparts are `v1/attention/backends/triton_attn.py` and, for the choice of a library, `flash_attn.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from folovllm.attention.ops import write_kv_cache

if TYPE_CHECKING:
    from folovllm.attention.backends.flash_attn import VarlenBatch
    from folovllm.attention.triton_decode import DecodeConfig, DecodeWorkspace
    from folovllm.attention.triton_prefill import PrefillConfig

MAX_HEAD_SIZE = 256
"""Head sizes of 8, 16, 24, ... up to here; sizes that are no power of two are padded to the next."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass
class TritonPagedMetadata(AttentionMetadata):
    """AttentionMetadata with the step's requests sorted by kernel."""

    num_decodes: int
    """Requests that compute one token."""
    decode_rows: torch.Tensor | None
    """[num_decodes] int32: their rows among the step's tokens; None if request b is row b for all of them."""
    decode_reqs: torch.Tensor | None
    """[num_decodes] int32: their rows of block_table and seq_lens; None likewise."""
    prefill_reqs: list[int]
    """Requests that compute several tokens."""
    deterministic: bool = False
    """Splits follow from a context's length alone and tiles are fixed: a request's bits do not depend on its batch."""
    pdl: bool = False
    """Let the next kernel of the stream start while an attention kernel drains."""
    workspace: DecodeWorkspace | None = None
    """Where parts of cut contexts meet; None is the one that all steps on this device share, one after another."""
    library_batch: VarlenBatch | None = None
    """The chunks as libraries take them; None for our own kernel."""
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def prefill_tiles(self, tile_tokens: int) -> torch.Tensor:
        """Return build_tiles' table on the device; worked out by the first layer that asks, shared by the others."""
        if tile_tokens not in self._tiles:
            from folovllm.attention.triton_prefill import build_tiles

            tiles = build_tiles(self.query_start_loc_cpu, self.seq_lens_cpu, self.prefill_reqs, tile_tokens)
            self._tiles[tile_tokens] = torch.from_numpy(tiles).to(self.block_table.device, non_blocking=True)
        return self._tiles[tile_tokens]


class TritonPagedBackend(AttentionBackend):
    """Our own kernels for everything; CUDA only, and nothing but torch and the Triton that comes with it."""

    written_kv_device: ClassVar[str | None] = "cuda"
    reads_fp8: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False
    """Batch-invariant kernels. The block table's width must then be the engine's, not the step's: it sets the split."""
    prefill_by_library: ClassVar[bool] = False
    """Prompt chunks go to the fastest FlashAttention library present instead of our own kernel."""

    @staticmethod
    def get_name() -> str:
        """Return "paged"."""
        return "paged"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return TritonPagedImpl."""
        return TritonPagedImpl

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """See AttentionBackend; any block size will do, powers of two from 16 on are fast."""
        if device.type != "cuda":
            return [f"its Triton kernels run on CUDA only, not on {device.type}"]
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if dtype not in DTYPES:
            reasons.append(f"{_short(dtype)} is not one of {', '.join(map(_short, DTYPES))}")
        if head_size % 8 or head_size > MAX_HEAD_SIZE:
            reasons.append(f"head size {head_size} is not a multiple of 8 of at most {MAX_HEAD_SIZE}")
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append(f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0")
        return reasons

    @classmethod
    def build_metadata(cls, common: AttentionMetadata, block_size: int, dtype: torch.dtype) -> TritonPagedMetadata:
        """Sort the step's requests: one new token to the decode kernel, several to the prefill kernel."""
        starts = common.query_start_loc_cpu
        lens = [starts[b + 1] - starts[b] for b in range(common.num_reqs)]
        decodes = [b for b, n in enumerate(lens) if n == 1]
        chunks = [b for b, n in enumerate(lens) if n > 1]
        rows = reqs = None
        if len(decodes) < common.num_reqs and decodes:
            index = torch.tensor([[starts[b] for b in decodes], decodes], dtype=torch.int32)
            rows, reqs = index.to(common.block_table.device, non_blocking=True)
        inherited = {f.name: getattr(common, f.name) for f in fields(AttentionMetadata)}
        metadata = TritonPagedMetadata(
            **inherited,
            num_decodes=len(decodes),
            decode_rows=rows,
            decode_reqs=reqs,
            prefill_reqs=chunks,
            deterministic=cls.deterministic,
        )
        if chunks and cls.prefill_by_library:
            from folovllm.attention.backends.flash_attn import VarlenBatch

            metadata.library_batch = VarlenBatch.of(common, chunks)
        return metadata

    @classmethod
    def build_decode_metadata(
        cls,
        num_reqs: int,
        max_model_len: int,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
        workspace: DecodeWorkspace | None = None,
        pdl: bool = False,
        order: torch.Tensor | None = None,
    ) -> TritonPagedMetadata:
        """Return the metadata of a pure decode step, from static numbers and persistent device tensors alone.

        Nothing is copied and nothing is read on the host, so this may be called while a CUDA graph is recorded, and
        the recording serves every later content of the tensors: query_start_loc [num_reqs + 1] int32 (0, 1, 2, ...;
        not read by these kernels), seq_lens [num_reqs] int32 (0: a padding row, whose output is zero), block_table
        [num_reqs, blocks] int32, slot_mapping [num_reqs] int64. Contexts must not exceed `max_model_len`.
        `workspace`: see TritonPagedMetadata. With None, run the same step once before it is recorded: the shared
        workspace is allocated then, outside the recording, and all recorded graphs and eager steps use it in turn.
        `order`: [num_reqs] int32, all requests in the order in which to start on them; None is their own.
        """
        return TritonPagedMetadata(
            num_actual_tokens=num_reqs,
            num_reqs=num_reqs,
            max_query_len=1,
            max_seq_len=max_model_len,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            query_start_loc_cpu=[],
            seq_lens_cpu=[],
            num_decodes=num_reqs,
            decode_rows=order,
            decode_reqs=order,
            prefill_reqs=[],
            deterministic=cls.deterministic,
            pdl=pdl,
            workspace=workspace,
        )

    @classmethod
    def build_prompt_metadata(
        cls,
        num_tokens: int,
        tiles: torch.Tensor,
        tile_tokens: int,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> TritonPagedMetadata:
        """Return the metadata of a step of chunks alone, from static numbers and persistent tensors: to be recorded.

        What the requests are is in `tiles` [n, 4], build_tiles' table of `tile_tokens` tokens a tile, padded with rows
        of zeros; query_start_loc and seq_lens are not read. The others are as in build_decode_metadata.
        """
        return TritonPagedMetadata(
            num_actual_tokens=num_tokens,
            num_reqs=1,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            query_start_loc_cpu=[],
            seq_lens_cpu=[],
            num_decodes=0,
            decode_rows=None,
            decode_reqs=None,
            prefill_reqs=[0],
            deterministic=cls.deterministic,
            _tiles={tile_tokens: tiles},
        )


class DeterministicPagedBackend(TritonPagedBackend):
    """The same kernels, each context cut by its length alone: the same bits for a request alone and in a crowd."""

    deterministic = True


class TritonPagedImpl(AttentionImpl):
    """One layer: write the new keys and values unless that is done, decode, then the chunks."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int) -> None:
        """See AttentionImpl. An fp8 cache holds key / k_scale and value / v_scale; both are 1 until set."""
        super().__init__(num_heads, head_size, scale, num_kv_heads)
        # Not at import: machines without Triton import this module to learn that the backend does not run there.
        from folovllm.attention import triton_decode, triton_prefill

        self._decode, self._prefill = triton_decode, triton_prefill
        self.k_scale = 1.0
        self.v_scale = 1.0
        self._shared_memory_bytes = 0

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See AttentionImpl.forward; key and value are None when a fused kernel has written them to the cache."""
        assert isinstance(metadata, TritonPagedMetadata)
        if key is not None and value is not None:
            self._write(key, value, kv_cache, metadata.slot_mapping)
        if metadata.num_decodes:
            self._attend_decodes(query, kv_cache, metadata, out)
        if not metadata.prefill_reqs:
            return out
        if metadata.library_batch is not None and kv_cache.dtype == query.dtype:
            self._attend_chunks_by_library(query, kv_cache, metadata.library_batch, out)
        else:
            self._attend_chunks(query, kv_cache, metadata, out)
        return out

    def _write(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        if kv_cache.dtype == FP8:
            key = (key.float() / self.k_scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
            value = (value.float() / self.v_scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
            kv_cache = kv_cache.view(torch.uint8)
        write_kv_cache(key, value, kv_cache, slots)

    def _attend_decodes(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: TritonPagedMetadata, out: torch.Tensor
    ) -> None:
        bound = metadata.max_seq_len
        if metadata.deterministic:  # the engine's bound, so that every step cuts a context alike
            bound = metadata.block_table.shape[1] * kv_cache.shape[2]
        config = self.decode_config(
            metadata.num_decodes, bound, metadata.deterministic, metadata.pdl, query.dtype, query.device
        )
        self._decode.paged_decode(
            query if metadata.decode_rows is not None else query[: metadata.num_decodes],
            kv_cache,
            metadata.block_table,
            metadata.seq_lens,
            out,
            self.scale,
            config,
            workspace=metadata.workspace,
            rows=metadata.decode_rows,
            reqs=metadata.decode_reqs,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )

    def decode_config(
        self,
        num_decodes: int,
        max_seq_len: int,
        deterministic: bool,
        pdl: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodeConfig:
        """Return how our kernel decodes so many requests with contexts of at most `max_seq_len`; see its chooser."""
        return self._decode.choose_decode_config(
            num_decodes,
            self.num_kv_heads,
            max_seq_len,
            deterministic=deterministic,
            dtype=dtype,
            head_size=self.head_size,
            pdl=pdl,
            shared_memory_bytes=self._shared_memory(device),
        )

    def _attend_chunks(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: TritonPagedMetadata, out: torch.Tensor
    ) -> None:
        config = self._prefill_config(query.dtype, query.device)
        tiles = metadata.prefill_tiles(self.prefill_tile_tokens(query.dtype, query.device))
        self._prefill.paged_prefill(
            query,
            kv_cache,
            metadata.block_table,
            tiles,
            out,
            self.scale,
            config,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )

    def prefill_tile_tokens(self, dtype: torch.dtype, device: torch.device) -> int:
        """Return the tokens of a query tile of our prefill kernel."""
        return self._prefill_config(dtype, device).tile_tokens(self.num_heads // self.num_kv_heads)

    def _prefill_config(self, dtype: torch.dtype, device: torch.device) -> PrefillConfig:
        return self._prefill.choose_prefill_config(
            self.num_heads // self.num_kv_heads,
            dtype=dtype,
            head_size=self.head_size,
            shared_memory_bytes=self._shared_memory(device),
        )

    def _attend_chunks_by_library(
        self, query: torch.Tensor, kv_cache: torch.Tensor, batch: VarlenBatch, out: torch.Tensor
    ) -> None:
        from folovllm.attention.backends.flash_attn import provider_for

        provider = provider_for(query.device, query.dtype, self.head_size, kv_cache.shape[2], fast_only=True)
        assert provider is not None
        batch.scatter(provider.call(batch.gather(query), kv_cache, batch, self.scale), out)

    def _shared_memory(self, device: torch.device) -> int:
        if not self._shared_memory_bytes:
            self._shared_memory_bytes = 227 * 1024
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                self._shared_memory_bytes = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
        return self._shared_memory_bytes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
