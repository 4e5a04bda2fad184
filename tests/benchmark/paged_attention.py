"""A decode step's attention of one layer on the CPU: the paged backend beside gathering one request at a time.

SmolLM2-135M's shape, bfloat16, contexts of different lengths. "one at a time" gathers a request's pages and attends
with the same library call, request after request; "torch" is the paged backend's gather in groups; "kernel" is its C
kernel, which gathers nothing. They take turns; medians:

    python -m tests.benchmark.paged_attention [--pairs 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.nn import functional as F

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.backends.paged import PagedBackend, PagedImpl
from folovllm.attention.ops import gather_kv_cache
from folovllm.utils import cpu_kernels

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 9, 3, 64, 16
SCALE = HEAD_SIZE**-0.5


def metadata_of(seq_lens: list[int], table: torch.Tensor) -> AttentionMetadata:
    """A step in which every request computes its last token."""
    starts = list(range(len(seq_lens) + 1))
    last = torch.tensor(seq_lens) - 1
    blocks = table[torch.arange(len(seq_lens)), last // BLOCK_SIZE].long()
    return AttentionMetadata(
        num_actual_tokens=len(seq_lens),
        num_reqs=len(seq_lens),
        max_query_len=1,
        max_seq_len=max(seq_lens),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table,
        slot_mapping=blocks * BLOCK_SIZE + last % BLOCK_SIZE,
        query_start_loc_cpu=starts,
        seq_lens_cpu=seq_lens,
    )


def one_at_a_time(query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """Gather and attend, request after request."""
    out = torch.empty_like(query)
    for b, seq_len in enumerate(metadata.seq_lens_cpu):
        keys, values = (
            t.transpose(0, 1).unsqueeze(0) for t in gather_kv_cache(cache, metadata.block_table[b], seq_len)
        )
        packed = query[b].view(1, KV_HEADS, -1, HEAD_SIZE)
        out[b] = F.scaled_dot_product_attention(packed, keys, values, scale=SCALE).view(HEADS, HEAD_SIZE)
    return out


def compare(num_reqs: int, context: int, pairs: int) -> None:
    """Print a line for contexts of 3/4 to 5/4 of `context`."""
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.randint(context * 3 // 4, context * 5 // 4, (num_reqs,), generator=generator).tolist()
    blocks = max(seq_lens) // BLOCK_SIZE + 1
    table = torch.randperm(num_reqs * blocks, generator=generator).int().view(num_reqs, blocks)
    cache = torch.randn(2, num_reqs * blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE, generator=generator).bfloat16()
    query = torch.randn(num_reqs, HEADS, HEAD_SIZE, generator=generator).bfloat16()
    metadata = metadata_of(seq_lens, table)
    impl = PagedImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS)
    built = {"kernel": PagedBackend.build_metadata(metadata, BLOCK_SIZE, torch.bfloat16)}
    with mock.patch.object(cpu_kernels, "available", lambda: (False, "switched off")):
        built["torch"] = PagedBackend.build_metadata(metadata, BLOCK_SIZE, torch.bfloat16)

    def paged(kind: str) -> torch.Tensor:
        return impl.forward(query, None, None, cache, built[kind], torch.empty_like(query))

    ways: dict[str, Callable[[], torch.Tensor]] = {"one at a time": lambda: one_at_a_time(query, cache, metadata)}
    ways |= {"torch": lambda: paged("torch")}
    if built["kernel"].num_decodes:
        ways |= {"kernel": lambda: paged("kernel")}
    expected = ways["one at a time"]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        torch.testing.assert_close(way().float(), expected.float(), atol=0.03, rtol=0.03, msg=name)
    for _ in range(pairs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - start) * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    slowest = medians["one at a time"]
    told = ", ".join(f"{name} {value:.0f} us ({slowest / value:.1f}x)" for name, value in medians.items())
    print(f"{num_reqs:3d} x {context:4d}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    for num_reqs, context in ((1, 192), (16, 192), (64, 192), (32, 512)):
        compare(num_reqs, context, args.pairs)


if __name__ == "__main__":
    main()
