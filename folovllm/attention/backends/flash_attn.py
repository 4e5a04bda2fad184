"""FlashAttention from a library, over our pages: decodes, chunks and mixed batches in one varlen call.

FlashAttention (Dao et al. 2022, 2023, 2024) never writes the [q, S] scores to memory; triton_prefill.py shows how.
Which library is fastest depends on the GPU and on what is installed, so each is one row of PROVIDERS: what it needs,
and how it is called. All take the step in the same form, a VarlenBatch: queries of all requests one after another, and
for each request its pages and its context length.

    paged         our kernels alone
    flash_attn    the first provider that can run, for everything
    paged_flash   our decode kernel, which measured faster than every library, and a provider for the chunks (ours again
                  in a recorded prompt step, where a library would need numbers from the host)

Only providers that measured faster than our own prefill kernel (`fast`) serve paged_flash. vLLM's counterpart is
`v1/attention/backends/flash_attn.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from folovllm.attention.backends.paged_triton import TritonPagedBackend
from folovllm.attention.ops import write_kv_cache

DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class VarlenBatch:
    """Some requests of a step in the form that varlen kernels take; B and T count these requests only."""

    rows: torch.Tensor | None
    """[T] int64: their rows among the step's tokens; None if all rows, in order."""
    cu_query_lens: torch.Tensor
    """[B + 1] int32: first row of each request."""
    cu_seq_lens: torch.Tensor
    """[B + 1] int32: running sum of seq_lens, for libraries that take lengths so."""
    seq_lens: torch.Tensor
    """[B] int32."""
    block_table: torch.Tensor
    """[B, blocks] int32."""
    max_query_len: int
    """Most new tokens of a request."""
    max_seq_len: int
    """Longest context."""

    @classmethod
    def of(cls, common: AttentionMetadata, requests: Sequence[int]) -> VarlenBatch:
        """Return `requests`, in their order, as a batch of their own. Copies to the device, waits for nothing."""
        starts, seq_lens = common.query_start_loc_cpu, [common.seq_lens_cpu[b] for b in requests]
        device = common.block_table.device
        query_lens = [starts[b + 1] - starts[b] for b in requests]
        cu_seq_lens = _running_sum(seq_lens, device)
        everyone = len(requests) == common.num_reqs
        if everyone:
            return cls(
                None, common.query_start_loc, cu_seq_lens, common.seq_lens, common.block_table,
                max(query_lens), max(seq_lens),
            )  # fmt: skip
        index = torch.tensor(requests, dtype=torch.int64).to(device, non_blocking=True)
        rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in requests]).to(device, non_blocking=True)
        return cls(
            rows, _running_sum(query_lens, device), cu_seq_lens, common.seq_lens[index], common.block_table[index],
            max(query_lens), max(seq_lens),
        )  # fmt: skip

    def gather(self, query: torch.Tensor) -> torch.Tensor:
        """Return these requests' rows of `query` [step's T, H, D], contiguous."""
        return (query if self.rows is None else query[self.rows]).contiguous()

    def scatter(self, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Write `attended` [T, H, D] to these requests' rows of `out`."""
        if self.rows is None:
            out.copy_(attended)
        else:
            out.index_copy_(0, self.rows, attended)


def _running_sum(lens: Sequence[int], device: torch.device) -> torch.Tensor:
    sums = torch.zeros(len(lens) + 1, dtype=torch.int32)
    sums[1:] = torch.tensor(lens, dtype=torch.int32).cumsum(0)
    return sums.to(device, non_blocking=True)


@dataclass(frozen=True)
class FlashProvider:
    """One library: what it is, what it needs, how it is called."""

    name: str
    """As in the log line."""
    module: str
    """The module that holds the function."""
    function: str
    """The function."""
    capabilities: tuple[int, ...]
    """Major compute capabilities that its paged kernels support."""
    page_multiple: int
    """Block sizes must be a multiple of this."""
    head_sizes: tuple[int, ...]
    """Those that it was built for."""
    fast: bool
    """Measured faster than our own prefill kernel."""
    arguments: Callable[[VarlenBatch, float], dict[str, Any]]
    """Keyword arguments besides queries, keys and values."""
    parameter: str = ""
    """A parameter that the installed version must know."""

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """Return why this library cannot run such a model here; empty if it can. Imports it if all else is well."""
        reasons = []
        if dtype not in DTYPES:
            reasons.append(f"{str(dtype).removeprefix('torch.')} is neither bfloat16 nor float16")
        if head_size not in self.head_sizes:
            reasons.append(f"head size {head_size} is not one of {', '.join(map(str, self.head_sizes))}")
        if block_size % self.page_multiple:
            reasons.append(f"block_size {block_size} is not a multiple of {self.page_multiple}")
        if device.type != "cuda":
            reasons.append(f"it runs on CUDA only, not on {device.type}")
        elif torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] not in self.capabilities:
            known = ", ".join(f"{major}.x" for major in self.capabilities)
            reasons.append(f"compute capability is not one of {known}")
        return reasons or self._import_reasons()

    def _import_reasons(self) -> list[str]:
        try:
            function = _load(self.module, self.function)
        except Exception as error:  # a broken build raises anything, OSError for a missing library among them
            return [f"{self.module} does not import ({type(error).__name__}: {error})".replace("\n", " ")]
        if self.parameter and self.parameter not in inspect.signature(function).parameters:
            return [f"the installed {self.module}.{self.function} has no {self.parameter}"]
        return []

    def call(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: VarlenBatch, scale: float) -> torch.Tensor:
        """Attend causally with query [T, H, D] of `batch` to the pages of kv_cache; return [T, H, D]."""
        arguments = self.arguments(batch, scale)
        if self.module == "torch.nn.attention.varlen":
            arguments["enable_gqa"] = query.shape[1] != kv_cache.shape[3]
        attended = _load(self.module, self.function)(query, kv_cache[0], kv_cache[1], **arguments)
        result: torch.Tensor = attended[0] if isinstance(attended, tuple) else attended
        return result


@functools.cache
def _load(module: str, function: str) -> Callable[..., Any]:
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _flash_attn_3(batch: VarlenBatch, scale: float) -> dict[str, Any]:
    return {
        "cache_seqlens": batch.seq_lens,
        "page_table": batch.block_table,
        "cu_seqlens_q": batch.cu_query_lens,
        "max_seqlen_q": batch.max_query_len,
        "softmax_scale": scale,
        "causal": True,
    }


def _flash_attn_4(batch: VarlenBatch, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": batch.cu_query_lens,
        "seqused_k": batch.seq_lens,
        "max_seqlen_q": batch.max_query_len,
        "max_seqlen_k": batch.max_seq_len,
        "page_table": batch.block_table,
        "softmax_scale": scale,
        "causal": True,
    }


def _flash_attn_2(batch: VarlenBatch, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": batch.cu_query_lens,
        "cu_seqlens_k": batch.cu_seq_lens,
        "max_seqlen_q": batch.max_query_len,
        "max_seqlen_k": batch.max_seq_len,
        "block_table": batch.block_table,
        "softmax_scale": scale,
        "causal": True,
    }


def _torch_varlen(batch: VarlenBatch, scale: float) -> dict[str, Any]:
    return {
        "cu_seq_q": batch.cu_query_lens,
        "cu_seq_k": batch.cu_seq_lens,
        "max_q": batch.max_query_len,
        "max_k": batch.max_seq_len,
        "seqused_k": batch.seq_lens,
        "block_table": batch.block_table,
        "scale": scale,
        "window_size": (-1, 0),  # causal, aligned to the end of the context
    }


_ANY = (64, 96, 128, 256)
PROVIDERS: tuple[FlashProvider, ...] = (
    FlashProvider(
        "flash-attn 3", "flash_attn_interface", "flash_attn_with_kvcache", (8, 9), 1, _ANY, True, _flash_attn_3,
        "page_table",
    ),
    FlashProvider(
        "flash-attn 4", "flash_attn.cute.interface", "flash_attn_varlen_func", (9, 10), 16, (64, 96, 128), True,
        _flash_attn_4, "page_table",
    ),
    FlashProvider(
        "torch varlen", "torch.nn.attention.varlen", "varlen_attn", (8, 9, 10, 12), 256, _ANY, False, _torch_varlen,
        "block_table",
    ),
    FlashProvider(
        "flash-attn 2", "flash_attn", "flash_attn_varlen_func", (8, 9, 10, 12), 256, _ANY, False, _flash_attn_2,
        "block_table",
    ),
)  # fmt: skip
"""In order of measured speed. FlashInfer is not among them: where its kernels are not built ahead, it compiles each for
a minute at first use, and its plan step costs the host 70 us a step."""


def select_provider(
    device: torch.device, dtype: torch.dtype, head_size: int, block_size: int, fast_only: bool = False
) -> tuple[FlashProvider | None, list[str]]:
    """Return the first provider that can run, or None, and what is wrong with those passed over."""
    passed_over = []
    for provider in PROVIDERS:
        if fast_only and not provider.fast:
            passed_over.append(f"{provider.name}: slower than our own kernel")
            continue
        reasons = provider.unsupported_reasons(device, dtype, head_size, block_size)
        if not reasons:
            return provider, passed_over
        passed_over.append(f"{provider.name}: {', '.join(reasons)}")
    return None, passed_over


@functools.cache
def provider_for(
    device: torch.device, dtype: torch.dtype, head_size: int, block_size: int, fast_only: bool = False
) -> FlashProvider | None:
    """Return what select_provider chose, asked for once."""
    return select_provider(device, dtype, head_size, block_size, fast_only)[0]


@dataclass
class FlashAttnMetadata(AttentionMetadata):
    """AttentionMetadata with the step as providers take it."""

    batch: VarlenBatch
    """The whole step."""


class FlashAttnBackend(AttentionBackend):
    """One library for the whole step. Not for recorded graphs: lengths are given from the host."""

    @staticmethod
    def get_name() -> str:
        """Return "flash_attn"."""
        return "flash_attn"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return FlashAttnImpl."""
        return FlashAttnImpl

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """See AttentionBackend; the reasons of every provider."""
        if device.type != "cuda":
            return [f"FlashAttention libraries run on CUDA only, not on {device.type}"]
        provider, passed_over = select_provider(device, dtype, head_size, block_size)
        return passed_over if provider is None else []

    @classmethod
    def build_metadata(cls, common: AttentionMetadata, block_size: int, dtype: torch.dtype) -> FlashAttnMetadata:
        """Put the step in the form that providers take."""
        inherited = {f.name: getattr(common, f.name) for f in fields(AttentionMetadata)}
        batch = VarlenBatch.of(common, range(common.num_reqs))
        return FlashAttnMetadata(**inherited, batch=batch)


class FlashAttnImpl(AttentionImpl):
    """One layer: write the new keys and values unless that is done, then one call."""

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
        assert isinstance(metadata, FlashAttnMetadata)
        if key is not None and value is not None:
            write_kv_cache(key, value, kv_cache, metadata.slot_mapping)
        batch = metadata.batch
        provider = provider_for(query.device, query.dtype, self.head_size, kv_cache.shape[2])
        assert provider is not None
        batch.scatter(provider.call(batch.gather(query), kv_cache, batch, self.scale), out)
        return out


class PagedFlashBackend(TritonPagedBackend):
    """Our kernel for decodes, the fastest library present for prompt chunks."""

    prefill_by_library = True

    @staticmethod
    def get_name() -> str:
        """Return "paged_flash"."""
        return "paged_flash"

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """See AttentionBackend: what keeps our kernels from running, then what keeps every fast provider."""
        reasons = super().unsupported_reasons(device, dtype, head_size, block_size)
        if reasons:
            return reasons
        provider, passed_over = select_provider(device, dtype, head_size, block_size, fast_only=True)
        return passed_over if provider is None else []
