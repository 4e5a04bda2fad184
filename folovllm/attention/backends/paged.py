"""PagedAttention: keys and values lie in pages (blocks) of a shared pool, found through each request's block table.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.1.
vLLM's kernels are `csrc/attention/paged_attention_v1.cu` and the Triton ones in `v1/attention/ops/`. Where a C compiler
is at hand, CPU kernels read the pages where they lie: one for all decodes (csrc/cpu_kernels_typed.h), and in bfloat16
on processors with AMX one for all prompt chunks (csrc/cpu_prefill_bf16.h), each with its own drawing. The rest, and
without a compiler everything, is vectorised torch:

    decode    The requests that compute one token are sorted by context length and cut into groups of similar length.
              A group is one gather of pages and one batched attention over [n, S], shorter contexts masked:

                  block table          gathered keys [n, S, Hkv, D]         mask
                  7 3 9        ->      page 7 | page 3 | page 9             . . . . . . . . . x
                  4 1 (0)              page 4 | page 1 | page 0 (null)      . . . . . x x x x x

    prefill   A request's chunk attends on its own: its new keys if it starts the prompt, else its pages so far.

Who is in which group is worked out once a step, in build_metadata; the layers only gather and attend.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from folovllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from folovllm.attention.ops import write_kv_cache
from folovllm.utils import cpu_kernels

MAX_PADDING_TOKENS = 256
"""Masked positions a decode group may hold: gathering about that many costs as much as one more group."""


@dataclass
class DecodeGroup:
    """Requests that decode one token, of similar context length: n of them, S positions each."""

    rows: torch.Tensor | None
    """[n] int64: their rows among the step's tokens; None means all rows, in order."""
    block_ids: torch.Tensor
    """[n * blocks] int32: their pages, row after row, short tables filled with the null block 0."""
    seq_len: int
    """S, the longest context of the group."""
    mask: torch.Tensor | None
    """[n, 1, 1, S] in the model's dtype: 0, or -inf past a request's end; None if all are S long."""


@dataclass
class PrefillChunk:
    """One request that computes several tokens."""

    start: int
    """First of its rows."""
    end: int
    """One past the last."""
    seq_len: int
    """Its context, these rows included."""
    block_ids: torch.Tensor
    """[blocks] int32."""
    mask: torch.Tensor | None
    """[rows, S]: -inf for the future; None means plain causal attention."""


@dataclass
class PagedMetadata(AttentionMetadata):
    """AttentionMetadata with the step's work laid out."""

    decode_groups: list[DecodeGroup]
    """Together they hold every request with one new token and an earlier context; empty if the kernel does them."""
    prefill_chunks: list[PrefillChunk]
    """All others; empty while `chunk_table` holds them."""
    chunk_table: torch.Tensor | None = None
    """[n, 4] int32, a row per chunk, for the kernel that does all at once: see cpu_kernels.paged_prefill."""
    num_decodes: int = 0
    """Requests with one new token that the kernel does."""
    decode_rows: torch.Tensor | None = None
    """[num_decodes] int32: their rows among the step's tokens; None if request b is row b for all of them."""
    decode_reqs: torch.Tensor | None = None
    """[num_decodes] int32: their rows of block_table and seq_lens; None likewise."""

    def lay_out_chunks(self, block_size: int, dtype: torch.dtype) -> None:
        """Turn `chunk_table` into `prefill_chunks`, for the first layer of a model that the kernel does not take."""
        assert self.chunk_table is not None
        reqs = self.chunk_table[:, 0].tolist()
        self.prefill_chunks = [_prefill_chunk(self, b, block_size, dtype) for b in reqs]
        self.chunk_table = None


class PagedBackend(AttentionBackend):
    """Runs on any device through torch's scaled_dot_product_attention, and on CPUs through our kernel."""

    written_kv_device: ClassVar[str | None] = "cpu"

    @staticmethod
    def get_name() -> str:
        """Return "paged"."""
        return "paged"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return PagedImpl."""
        return PagedImpl

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        """Return []: any device, dtype, head size and block size will do."""
        return []

    @classmethod
    def build_metadata(cls, common: AttentionMetadata, block_size: int, dtype: torch.dtype) -> PagedMetadata:
        """Sort the step's requests: one new token to the kernel, or into decode groups; several into prefill chunks."""
        inherited = {field.name: getattr(common, field.name) for field in fields(AttentionMetadata)}
        if common.block_table.device.type == "cpu" and dtype in cpu_kernels.SUFFIXES and cpu_kernels.available()[0]:
            if common.max_query_len == 1:
                return PagedMetadata(**inherited, decode_groups=[], prefill_chunks=[], num_decodes=common.num_reqs)
            starts = np.array(common.query_start_loc_cpu, dtype=np.int32)
            single = np.diff(starts) == 1
            reqs, several = np.flatnonzero(single).astype(np.int32), np.flatnonzero(~single)
            seq_lens = np.array(common.seq_lens_cpu, dtype=np.int32)
            table = np.stack((several.astype(np.int32), starts[several], starts[several + 1], seq_lens[several]), 1)
            return PagedMetadata(
                **inherited,
                decode_groups=[],
                prefill_chunks=[],
                chunk_table=torch.from_numpy(table),
                num_decodes=len(reqs),
                decode_rows=torch.from_numpy(starts[reqs]),
                decode_reqs=torch.from_numpy(reqs),
            )
        starts_list = common.query_start_loc_cpu
        decodes, chunks = [], []
        for b, seq_len in enumerate(common.seq_lens_cpu):
            if starts_list[b + 1] - starts_list[b] == 1 and seq_len > 1:
                decodes.append(b)
            else:
                chunks.append(_prefill_chunk(common, b, block_size, dtype))
        groups = [
            _decode_group(common, members, block_size, dtype)
            for members in _group_by_length(decodes, common.seq_lens_cpu)
        ]
        return PagedMetadata(**inherited, decode_groups=groups, prefill_chunks=chunks)


def _group_by_length(requests: list[int], seq_lens: list[int]) -> list[list[int]]:
    """Cut `requests` into groups of similar length: longest first, a new group once padding exceeds the bound."""
    if not requests:
        return []
    lengths = [seq_lens[b] for b in requests]
    if max(lengths) * len(lengths) - sum(lengths) <= MAX_PADDING_TOKENS:
        return [requests]  # the usual case, and the only one that keeps rows in order
    groups: list[list[int]] = []
    padding = longest = 0
    for b in sorted(requests, key=seq_lens.__getitem__, reverse=True):
        padding += longest - seq_lens[b]
        if not groups or padding > MAX_PADDING_TOKENS:
            groups.append([])
            padding, longest = 0, seq_lens[b]
        groups[-1].append(b)
    return groups


def _decode_group(common: AttentionMetadata, members: list[int], block_size: int, dtype: torch.dtype) -> DecodeGroup:
    device = common.block_table.device
    seq_lens = [common.seq_lens_cpu[b] for b in members]
    longest = max(seq_lens)
    everyone = len(members) == common.num_actual_tokens and members == list(range(common.num_reqs))
    if everyone:
        rows, lengths, table = None, common.seq_lens, common.block_table
    else:
        index = torch.tensor(members, device=device)
        rows = common.query_start_loc[index].long()
        lengths, table = common.seq_lens[index], common.block_table[index]
    mask = None
    if min(seq_lens) < longest:
        past_end = torch.arange(longest, device=device) >= lengths[:, None]
        mask = torch.zeros((len(members), 1, 1, longest), dtype=dtype, device=device)
        mask.masked_fill_(past_end[:, None, None, :], float("-inf"))
    num_blocks = -(-longest // block_size)
    return DecodeGroup(rows, table[:, :num_blocks].reshape(-1), longest, mask)


def _prefill_chunk(common: AttentionMetadata, b: int, block_size: int, dtype: torch.dtype) -> PrefillChunk:
    device = common.block_table.device
    start, end = common.query_start_loc_cpu[b], common.query_start_loc_cpu[b + 1]
    seq_len = common.seq_lens_cpu[b]
    block_ids = common.block_table[b, : -(-seq_len // block_size)]
    if end - start == seq_len:
        return PrefillChunk(start, end, seq_len, block_ids, None)
    positions = torch.arange(seq_len, device=device)
    future = positions > positions[seq_len - (end - start) :, None]
    mask = torch.zeros(future.shape, dtype=dtype, device=device).masked_fill_(future, float("-inf"))
    return PrefillChunk(start, end, seq_len, block_ids, mask)


class PagedImpl(AttentionImpl):
    """One layer: write the new keys and values unless that is done, then the kernel, the groups, the chunks."""

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
        assert isinstance(metadata, PagedMetadata)
        if key is not None and value is not None:
            write_kv_cache(key, value, kv_cache, metadata.slot_mapping)
        if metadata.num_decodes:
            cpu_kernels.paged_decode(
                query,
                kv_cache,
                metadata.block_table,
                metadata.seq_lens,
                out,
                self.scale,
                metadata.decode_rows,
                metadata.decode_reqs,
            )
        for group in metadata.decode_groups:
            q = query if group.rows is None else query[group.rows]  # [n, H, D]
            keys, values = self._gather(kv_cache, group.block_ids, q.shape[0], group.seq_len)
            # The heads that share a KV head take the place of query positions: its keys are read once for all.
            packed = q.view(q.shape[0], self.num_kv_heads, -1, self.head_size)
            attended = self._attend(packed, keys, values, group.mask, causal=False).reshape(q.shape)
            if group.rows is None:
                return attended
            out.index_copy_(0, group.rows, attended)
        if metadata.chunk_table is not None:
            if cpu_kernels.prefill_usable(query.dtype, self.head_size):
                cpu_kernels.paged_prefill(query, kv_cache, metadata.block_table, metadata.chunk_table, out, self.scale)
            else:
                metadata.lay_out_chunks(kv_cache.shape[2], query.dtype)
        for chunk in metadata.prefill_chunks:
            rows = slice(chunk.start, chunk.end)
            if chunk.mask is None and key is not None and value is not None:  # the whole context is at hand
                keys, values = (t[rows].transpose(0, 1).unsqueeze(0) for t in (key, value))
            else:
                keys, values = self._gather(kv_cache, chunk.block_ids, 1, chunk.seq_len)
            q = query[rows].transpose(0, 1).unsqueeze(0)  # [1, H, rows, D]
            attended = self._attend(q, keys, values, chunk.mask, causal=chunk.mask is None)
            out[rows] = attended.squeeze(0).transpose(0, 1)
        return out

    def _gather(
        self, kv_cache: torch.Tensor, block_ids: torch.Tensor, num_reqs: int, seq_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of `num_reqs` requests, [num_reqs, Hkv, seq_len, D] each.

        Whole pages are copied; of a page longer than the context (a contiguous cache), only what is used.
        """
        if kv_cache.shape[2] > seq_len:
            kv_cache = kv_cache[:, :, :seq_len]
        # Twice along dimension 0, a copy of whole pages each, takes half the time of once along dimension 1.
        keys, values = (
            pages.index_select(0, block_ids)
            .view(num_reqs, -1, self.num_kv_heads, self.head_size)
            .narrow(1, 0, seq_len)
            .transpose(1, 2)
            for pages in kv_cache
        )
        return keys, values

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """Attention of query [n, H, q, D] over keys, values [n, Hkv, S, D]; head h reads KV head h // (H / Hkv)."""
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
