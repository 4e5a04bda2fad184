"""The paged backend against attention's definition (torch_naive): any mix of decodes and chunks, any block size.

Every slot that no request owns holds large finite garbage, and so do the ends of the block tables: what is not a
request's own must not reach its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.backends.paged import MAX_PADDING_TOKENS, PagedBackend, PagedMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.utils import cpu_kernels

GARBAGE = 1e4
CONTIGUOUS = 1024
"""A block size that holds every context here: the contiguous cache."""
Batch = Sequence[tuple[int, int]]
"""Per request: (tokens computed in this step, context length with them)."""

PURE_DECODE: Batch = [(1, 40)] * 5
RAGGED_DECODE: Batch = [(1, 50), (1, 33), (1, 2), (1, 49), (1, 50)]
MANY_GROUPS: Batch = [(1, 5), (1, 700), (1, 130), (1, 710), (1, 9), (1, 300), (1, 131), (1, 2), (1, 695)]
MIXED: Batch = [(5, 5), (1, 30), (17, 60), (1, 2), (1, 31), (1, 1), (33, 33), (1, 64), (2, 17)]
MIXED_GROUPS: Batch = [(1, 600), (7, 20), (1, 8), (1, 605), (3, 3), (1, 12), (64, 300), (1, 280)]
BATCHES = {
    "decodes of one length": PURE_DECODE,
    "ragged decodes": RAGGED_DECODE,
    "decodes in several groups": MANY_GROUPS,
    "decodes and chunks": MIXED,
    "groups and chunks": MIXED_GROUPS,
    "prefills": [(9, 9), (16, 16), (1, 1), (17, 17)],
    "later chunks": [(9, 30), (16, 48), (2, 3)],
    "one decode": [(1, 37)],
    "one prompt of one token": [(1, 1)],
    "prompts of one token": [(1, 1), (1, 1), (1, 1)],
    "one chunk": [(6, 22)],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def decode_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decodes, and bfloat16 chunks, by the CPU kernels, and by torch as on machines without a C compiler."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernels, "available", lambda: (False, "a test"))
    elif not cpu_kernels.available()[0]:
        pytest.skip(cpu_kernels.available()[1])
    return str(request.param)


@pytest.fixture
def by_torch(decode_by: str) -> None:
    """For tests of the groups, which the kernel has no use for."""
    if decode_by != "torch":
        pytest.skip("the kernel needs no groups")


@dataclass
class Problem:
    """A step's metadata, its query, key and value, and the cache before it."""

    metadata: AttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    block_size: int

    def run(self, backend: type[AttentionBackend], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the attention output of `backend` in `dtype`, on copies."""
        num_heads, head_size = self.query.shape[1:]
        impl = backend.get_impl_cls()(num_heads, head_size, head_size**-0.5, self.key.shape[1])
        metadata = backend.build_metadata(self.metadata, self.block_size, dtype)
        query, key, value, kv_cache = (
            t.to(dtype, copy=True) for t in (self.query, self.key, self.value, self.kv_cache)
        )
        out = torch.full_like(query, float("nan"))
        return impl.forward(query, key, value, kv_cache, metadata, out)


def make_problem(
    batch: Batch, block_size: int, num_heads: int = 4, num_kv_heads: int = 2, head_size: int = 64, seed: int = 0
) -> Problem:
    """Random contexts in shuffled blocks of a cache that is garbage elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-seq_len // block_size) for _, seq_len in batch]
    total = 1 + sum(num_blocks) + 3
    shuffled = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    signs = torch.randint(0, 2, (2, total, block_size, num_kv_heads, head_size), generator=generator) * 2 - 1
    kv_cache = signs.float() * GARBAGE
    # Beyond its own blocks, a table names any block of the pool: other requests', unused ones, the null block.
    table = torch.randint(0, total, (len(batch), max(num_blocks) + 2), generator=generator, dtype=torch.int32)
    starts, slots = [0], []
    for b, (num_new, seq_len) in enumerate(batch):
        own = [shuffled.pop() for _ in range(num_blocks[b])]
        table[b, : len(own)] = torch.tensor(own)
        own_slots = [own[p // block_size] * block_size + p % block_size for p in range(seq_len)]
        history = own_slots[: seq_len - num_new]
        rows = kv_cache.view(2, total * block_size, num_kv_heads, head_size)
        rows[:, history] = torch.randn((2, len(history), num_kv_heads, head_size), generator=generator)
        slots += own_slots[seq_len - num_new :]
        starts.append(starts[-1] + num_new)
    seq_lens = [seq_len for _, seq_len in batch]
    metadata = AttentionMetadata(
        num_actual_tokens=starts[-1],
        num_reqs=len(batch),
        max_query_len=max(num_new for num_new, _ in batch),
        max_seq_len=max(seq_lens),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots),
        query_start_loc_cpu=starts,
        seq_lens_cpu=seq_lens,
    )
    shape = (starts[-1], num_kv_heads, head_size)
    key, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    query = torch.randn((starts[-1], num_heads, head_size), generator=generator)
    return Problem(metadata, query, key, value, kv_cache, block_size)


def check_float32(problem: Problem) -> None:
    expected = problem.run(TorchNaiveBackend)
    assert expected.isfinite().all() and expected.abs().max() < 100, "garbage reached the reference itself"
    torch.testing.assert_close(problem.run(PagedBackend), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_size", [1, 8, 16, CONTIGUOUS])
@pytest.mark.parametrize("name", BATCHES)
def test_float32_equals_the_definition(name: str, block_size: int) -> None:
    check_float32(make_problem(BATCHES[name], block_size))


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8], ids=["MQA", "GQA", "MHA"])
def test_head_sizes_and_groups(num_kv_heads: int, head_size: int) -> None:
    check_float32(make_problem(MIXED_GROUPS, 16, num_heads=8, num_kv_heads=num_kv_heads, head_size=head_size))


@pytest.mark.parametrize("block_size", [1, 16, CONTIGUOUS])
@pytest.mark.parametrize("name", BATCHES)
def test_bfloat16_is_near_the_float32_definition(name: str, block_size: int) -> None:
    problem = make_problem(BATCHES[name], block_size, num_heads=6, num_kv_heads=2)
    expected = problem.run(TorchNaiveBackend)
    got = problem.run(PagedBackend, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).norm() / expected.norm()) < 2e-2


def test_chunks_go_to_the_kernel_that_takes_them(decode_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks of a step in one call in bfloat16 on AMX; in float32, or for an odd head size, none."""
    calls: list[list[list[int]]] = []
    kernel = cpu_kernels.paged_prefill

    def recorded(*args: Any) -> None:
        calls.append(args[3].tolist())
        kernel(*args)

    monkeypatch.setattr(cpu_kernels, "paged_prefill", recorded)
    problem = make_problem(MIXED, 16)
    problem.run(PagedBackend)
    make_problem(MIXED, 16, head_size=48).run(PagedBackend, torch.bfloat16)
    assert calls == []
    by_kernel = problem.run(PagedBackend, torch.bfloat16)
    if not cpu_kernels.prefill_usable(torch.bfloat16, 64):
        assert calls == []
        return
    assert calls == [[[0, 0, 5, 5], [2, 6, 23, 60], [6, 26, 59, 33], [8, 60, 62, 17]]]
    monkeypatch.setattr(cpu_kernels, "prefill_usable", lambda dtype, head_size: False)
    by_torch = problem.run(PagedBackend, torch.bfloat16)
    assert len(calls) == 1 and (by_kernel - by_torch).abs().max() < 0.05


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8], ids=["MQA", "GQA", "MHA"])
def test_bfloat16_head_sizes_and_groups(num_kv_heads: int, head_size: int) -> None:
    problem = make_problem(MIXED_GROUPS, 16, num_heads=8, num_kv_heads=num_kv_heads, head_size=head_size)
    expected = problem.run(TorchNaiveBackend)
    got = problem.run(PagedBackend, torch.bfloat16)
    assert float((got.float() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    """What the cases above did not think of."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch = []
    for _ in range(draw(1, 12)):
        seq_len = draw(1, draw(1, 400))
        batch.append((1 if draw(0, 2) else draw(1, seq_len), seq_len))
    check_float32(make_problem(batch, [1, 3, 8, 16, CONTIGUOUS][draw(0, 4)], head_size=16, seed=seed))


def paged_metadata(batch: Batch, block_size: int = 16) -> PagedMetadata:
    problem = make_problem(batch, block_size, head_size=8)
    return PagedBackend.build_metadata(problem.metadata, block_size, torch.float32)


def group_sizes(metadata: PagedMetadata) -> list[int]:
    return [len(g.block_ids) // -(-g.seq_len // 16) for g in metadata.decode_groups]


def test_the_batches_are_what_they_are_called(by_torch: None) -> None:
    """One group with and without mask, several groups, rows out of order, chunks with and without history."""
    (group,) = paged_metadata(PURE_DECODE).decode_groups
    assert group.rows is None and group.mask is None
    (group,) = paged_metadata(RAGGED_DECODE).decode_groups
    assert group.rows is None and group.mask is not None and group.mask.shape == (5, 1, 1, 50)
    many = paged_metadata(MANY_GROUPS)
    assert len(many.decode_groups) > 2 and not many.prefill_chunks
    rows = [g.rows.tolist() for g in many.decode_groups if g.rows is not None]
    assert sorted(row for r in rows for row in r) == list(range(len(MANY_GROUPS))), "each request in exactly one group"
    assert any(r != sorted(r) for r in rows)
    mixed = paged_metadata(MIXED)
    assert sorted(c.end - c.start for c in mixed.prefill_chunks) == [1, 2, 5, 17, 33]
    assert [c.mask is None for c in mixed.prefill_chunks] == [True, False, True, True, False]
    assert sum(group_sizes(mixed)) == 4


def test_groups_hold_no_more_padding_than_allowed(by_torch: None) -> None:
    generator = torch.Generator().manual_seed(5)
    batch = [(1, int(n)) for n in torch.randint(2, 900, (40,), generator=generator)]
    metadata = paged_metadata(batch)
    assert len(metadata.decode_groups) > 3
    for group in metadata.decode_groups:
        assert group.rows is not None
        lengths = [batch[row][1] for row in group.rows.tolist()]
        assert group.seq_len == max(lengths)
        assert sum(group.seq_len - n for n in lengths) <= MAX_PADDING_TOKENS


def test_the_step_writes_its_keys_and_values_and_nothing_else() -> None:
    problem = make_problem(MIXED, 8, head_size=16)
    impl = PagedBackend.get_impl_cls()(4, 16, 0.25, 2)
    metadata = PagedBackend.build_metadata(problem.metadata, 8, torch.float32)
    cache = problem.kv_cache.clone()
    impl.forward(problem.query, problem.key, problem.value, cache, metadata, torch.empty_like(problem.query))
    rows = cache.view(2, -1, 2, 16)
    slots = metadata.slot_mapping
    assert torch.equal(rows[0, slots], problem.key) and torch.equal(rows[1, slots], problem.value)
    rows[:, slots] = problem.kv_cache.view(2, -1, 2, 16)[:, slots]
    assert torch.equal(cache, problem.kv_cache)


@pytest.mark.parametrize("backend", [PagedBackend, TorchNaiveBackend])
def test_a_wrong_block_would_show(backend: type[AttentionBackend]) -> None:
    """The comparisons above can fail: one wrong entry of the table moves the output by far more than 1e-5."""
    problem = make_problem(MIXED, 8)
    before = problem.run(backend)
    row = next(b for b, (_, seq_len) in enumerate(MIXED) if seq_len == 60)
    problem.metadata.block_table[row, 3] = 0
    assert (problem.run(backend) - before).abs().max() > 1
