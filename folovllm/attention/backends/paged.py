"""PagedAttention: keys and values lie in pages (blocks) of a shared pool, found through each request's block table.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.1.
vLLM's kernels are `csrc/attention/paged_attention_v1.cu` and the Triton ones in `v1/attention/ops/`. This file is
vectorised torch:

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

import torch
from torch.nn import functional as F

from folovllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from folovllm.attention.ops import write_kv_cache

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
    block_ids: torch.Tensor | None
    """[blocks] int32; None if the chunk is the whole context, so that nothing needs reading back."""
    mask: torch.Tensor | None
    """[rows, S]: -inf for the future; None means plain causal attention."""


@dataclass
class PagedMetadata(AttentionMetadata):
    """AttentionMetadata with the step's work laid out."""

    decode_groups: list[DecodeGroup]
    """Together they hold every request with one new token and an earlier context."""
    prefill_chunks: list[PrefillChunk]
    """All others."""


class PagedBackend(AttentionBackend):
    """Runs on any device through torch's scaled_dot_product_attention."""

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
        """Sort the step's requests into decode groups and prefill chunks."""
        starts = common.query_start_loc_cpu
        decodes, chunks = [], []
        for b, seq_len in enumerate(common.seq_lens_cpu):
            if starts[b + 1] - starts[b] == 1 and seq_len > 1:
                decodes.append(b)
            else:
                chunks.append(_prefill_chunk(common, b, block_size, dtype))
        groups = [
            _decode_group(common, members, block_size, dtype)
            for members in _group_by_length(decodes, common.seq_lens_cpu)
        ]
        inherited = {field.name: getattr(common, field.name) for field in fields(common)}
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
    if end - start == seq_len:
        return PrefillChunk(start, end, seq_len, None, None)
    positions = torch.arange(seq_len, device=device)
    future = positions > positions[seq_len - (end - start) :, None]
    mask = torch.zeros(future.shape, dtype=dtype, device=device).masked_fill_(future, float("-inf"))
    return PrefillChunk(start, end, seq_len, common.block_table[b, : -(-seq_len // block_size)], mask)


class PagedImpl(AttentionImpl):
    """One layer: write the new keys and values, then a gather and an attention per group or chunk."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See AttentionImpl.forward."""
        assert isinstance(metadata, PagedMetadata)
        write_kv_cache(key, value, kv_cache, metadata.slot_mapping)
        for group in metadata.decode_groups:
            q = query if group.rows is None else query[group.rows]  # [n, H, D]
            keys, values = self._gather(kv_cache, group.block_ids, q.shape[0], group.seq_len)
            attended = self._attend(q.unsqueeze(2), keys, values, group.mask, causal=False).squeeze(2)
            if group.rows is None:
                return attended
            out.index_copy_(0, group.rows, attended)
        for chunk in metadata.prefill_chunks:
            rows = slice(chunk.start, chunk.end)
            if chunk.block_ids is None:
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
        pages = kv_cache.index_select(1, block_ids).view(2, num_reqs, -1, self.num_kv_heads, self.head_size)
        keys, values = pages.narrow(2, 0, seq_len).transpose(2, 3)
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
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
