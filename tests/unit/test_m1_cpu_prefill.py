"""The C kernel for prompt chunks against float64 attention: any chunk, context, block size and grouping of heads.

The output and every slot that no request owns hold NaN: a key too many, or a row not written, shows at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from folovllm.utils import cpu_kernels

pytestmark = pytest.mark.skipif(
    not cpu_kernels.prefill_usable(torch.bfloat16, 64), reason="no C compiler, or a processor without AMX"
)
ONE_BLOCK = 1024
"""A block size that holds every context here: the contiguous cache."""
Batch = Sequence[tuple[int, int]]
"""Per request: (tokens computed in this step, context length with them)."""
PROMPTS: Batch = [(33, 33), (128, 128), (1, 1), (64, 64), (2, 2)]
LATER: Batch = [(32, 544), (5, 68), (65, 129), (16, 700)]


@pytest.fixture(autouse=True, params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass
class Step:
    """The requests' queries side by side, and their contexts in shuffled pages."""

    query: torch.Tensor
    """[T, H, D], a view of a wider tensor as in the engine; a row without owner before each request."""
    keys: list[torch.Tensor]
    """Per request [S, Hkv, D]."""
    values: list[torch.Tensor]
    kv_cache: torch.Tensor
    table: torch.Tensor
    chunks: torch.Tensor
    scale: float

    def attend(self, chunks: torch.Tensor | None = None) -> torch.Tensor:
        """Return the kernel's output, NaN where it wrote nothing."""
        out = torch.full(self.query.shape, float("nan"), dtype=torch.bfloat16)
        rows = self.chunks if chunks is None else chunks
        cpu_kernels.paged_prefill(self.query, self.kv_cache, self.table, rows, out, self.scale)
        return out


def make_step(batch: Batch, block_size: int, num_heads: int = 6, num_kv_heads: int = 2, head_size: int = 64) -> Step:
    num_blocks = [-(-seq_len // block_size) for _, seq_len in batch]
    total = sum(num_blocks) + 2
    shuffled = torch.randperm(total).int()
    kv_cache = torch.full((2, total, block_size, num_kv_heads, head_size), float("nan"), dtype=torch.bfloat16)
    slots_of = kv_cache.view(2, total * block_size, num_kv_heads, head_size)
    table = torch.randint(0, total, (len(batch), max(num_blocks) + 1), dtype=torch.int32)
    keys, values, chunks, used, start = [], [], [], 0, 0
    for b, (num_new, seq_len) in enumerate(batch):
        own = shuffled[used : used + num_blocks[b]]
        used += num_blocks[b]
        table[b, : len(own)] = own
        positions = torch.arange(seq_len)
        slots = own.long()[positions // block_size] * block_size + positions % block_size
        keys.append(torch.randn(seq_len, num_kv_heads, head_size).bfloat16())
        values.append(torch.randn(seq_len, num_kv_heads, head_size).bfloat16())
        slots_of[0, slots], slots_of[1, slots] = keys[-1], values[-1]
        chunks.append([b, start + 1, start + 1 + num_new, seq_len])
        start += 1 + num_new
    query = torch.randn(start, num_heads + 2, head_size).bfloat16()[:, :num_heads]
    return Step(query, keys, values, kv_cache, table, torch.tensor(chunks, dtype=torch.int32), head_size**-0.5)


def definition(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention in float64: the queries [n, H, D] are the last n of the S positions."""
    num_new, num_heads, _ = query.shape
    wide = [t.double().repeat_interleave(num_heads // t.shape[1], dim=1) for t in (keys, values)]
    scores = torch.einsum("nhd,shd->hns", query.double(), wide[0]) * scale
    positions = torch.arange(len(keys))
    scores = scores.masked_fill(positions > positions[len(keys) - num_new :, None], -math.inf)
    return torch.einsum("hns,shd->nhd", scores.softmax(-1), wide[1])


def check(step: Step) -> None:
    out = step.attend()
    unwritten = torch.ones(len(out), dtype=torch.bool)
    for b, start, end, _ in step.chunks.tolist():
        expected = definition(step.query[start:end], step.keys[b], step.values[b], step.scale)
        # Per row and head: the result's rounding, and that of the weights.
        error = (out[start:end].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 2**-7, f"request {b}: {error.max():.2e}"
        unwritten[start:end] = False
    assert bool(out[unwritten].isnan().all()), "a row that belongs to no chunk was written"


@pytest.mark.parametrize("block_size", [1, 8, 16, 64, ONE_BLOCK])
@pytest.mark.parametrize("batch", [PROMPTS, LATER], ids=["prompts", "later chunks"])
def test_block_sizes(batch: Batch, block_size: int) -> None:
    check(make_step(batch, block_size))


@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 3, 5, 8])
def test_heads(group: int, num_kv_heads: int, head_size: int) -> None:
    check(make_step([(35, 35), (18, 130)], 16, group * num_kv_heads, num_kv_heads, head_size))


def test_every_chunk_length(threads: int) -> None:
    """1 to 130 new tokens, after none, a whole block of keys less one, one, and any number of earlier ones."""
    for num_new in range(threads, 131, 3):
        earlier = [0, 63, 64, int(torch.randint(0, 571, ()))]
        check(make_step([(num_new, num_new + n) for n in earlier], 16, 3, 1, 32))


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int) -> None:
    torch.manual_seed(100 + seed)
    batch = []
    for _ in range(int(torch.randint(1, 20, ()))):
        seq_len = int(torch.randint(1, 400, ()))
        batch.append((int(torch.randint(1, seq_len + 1, ())), seq_len))
    check(make_step(batch, [1, 5, 16, 64][seed % 4], 4, 2, 64))


def test_a_long_prompt() -> None:
    """More rows than an item may hold: the prompt is cut for one thread too."""
    check(make_step([(1000, 1000)], 16, 8, 1, 256))


def test_large_scores_do_not_overflow() -> None:
    """Scores in the thousands, growing and falling along the context: the running maximum must be subtracted."""
    step = make_step(LATER, 16)
    for b, keys in enumerate(step.keys):
        positions = torch.arange(len(keys))
        slots = step.table[b].long()[positions // 16] * 16 + positions % 16
        keys *= (torch.linspace(-60, 60, len(keys)).abs()[:, None, None]).bfloat16()
        step.kv_cache.view(2, -1, *step.kv_cache.shape[3:])[0, slots] = keys
    out = step.attend()
    for b, start, end, _ in step.chunks.tolist():
        expected = definition(step.query[start:end], step.keys[b], step.values[b], step.scale)
        assert float((out[start:end].double() - expected).norm() / expected.norm()) < 2**-7


def test_same_bits_for_any_threads_batch_and_chunks() -> None:
    """A row's result is its own: whatever else is in the step, and however its prompt was cut."""
    step = make_step([(90, 190), (200, 200), (40, 333)], 16, 9, 3)
    whole = step.attend()
    alone = torch.cat([step.attend(row)[row[0, 1] : row[0, 2]] for row in step.chunks.split(1)])
    together = torch.cat([whole[start:end] for _, start, end, _ in step.chunks.tolist()])
    assert torch.equal(alone, together)
    for cut in (1, 17, 64, 101):
        parts = torch.tensor([[1, 92, 92 + cut, cut], [1, 92 + cut, 292, 200]], dtype=torch.int32)
        assert torch.equal(step.attend(parts)[92:292], whole[92:292])
    torch.set_num_threads(1)
    assert torch.equal(step.attend().nan_to_num(), whole.nan_to_num())


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cpu_kernels.prefill_usable(torch.float32, 64)
    assert not cpu_kernels.prefill_usable(torch.bfloat16, 80)
    monkeypatch.setattr(cpu_kernels, "available", lambda: (False, "a test"))
    assert not cpu_kernels.prefill_usable(torch.bfloat16, 64)
