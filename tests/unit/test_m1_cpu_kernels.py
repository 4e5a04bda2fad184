"""The C kernels against float64 arithmetic and torch's operators, with one to three threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from folovllm.model_executor.layers import fused_ops
from folovllm.utils import cpu_kernels

HAS_COMPILER = os.name == "posix" and cpu_kernels.available()[1].startswith("no C compiler") is False
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(576, 960), (64, 49), (40, 7), (96, 16), (33, 100), (1, 1), (32, 17)]
"""(K, N): whole tiles, ragged outputs, ragged inputs, fewer outputs than a tile has."""
ROWS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 64, 70]


@pytest.fixture(autouse=True, params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_near(got: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    """`got` has the shape of the float64 `expected`, and an error of that many roundings to its dtype."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    bound = roundings * (2**-8 if got.dtype == torch.bfloat16 else 1e-6)
    assert float((got.double() - expected).norm()) <= bound * float(expected.norm()) + 1e-30


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def test_a_machine_with_a_compiler_has_the_kernels() -> None:
    assert cpu_kernels.available()[0], cpu_kernels.available()[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_linear(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        wide = torch.randn(rows, num_inputs + 3).to(dtype)
        x, weight = wide[:, :num_inputs], torch.randn(num_outputs, num_inputs).to(dtype)
        bias, residual = torch.randn(num_outputs).to(dtype), torch.randn(rows, num_outputs).to(dtype)
        product = x.double() @ weight.double().T
        assert_near(cpu_kernels.linear(x, weight), product)
        assert_near(cpu_kernels.linear(x, weight, bias), product + bias.double())
        rounded = cpu_kernels.linear(x, weight)
        floats = cpu_kernels.linear(x, weight, float_output=True)
        assert floats.dtype == torch.float32 and torch.equal(floats.to(dtype), rounded)
        torch.testing.assert_close(floats.double(), product, rtol=1e-4, atol=1e-3)
        expected = residual + rounded
        assert cpu_kernels.linear(x, weight, residual=residual) is residual
        assert torch.equal(residual, expected), "rounded, then added: as torch's two operators do"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_linear_silu_and_mul(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, weight = torch.randn(rows, num_inputs).to(dtype), torch.randn(2 * num_outputs, num_inputs).to(dtype)
        for bias in (None, torch.randn(2 * num_outputs).to(dtype)):
            gate, up = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).chunk(2, dim=-1)
            got = cpu_kernels.linear_silu_and_mul(x, weight, bias)
            assert_near(got, F.silu(gate) * up)


@pytest.mark.parametrize("rows", [128, 130, 159, 161, 600])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 48), (32, 16), (1536, 33), (576, 100), (608, 1)])
def test_linear_of_many_rows(num_inputs: int, num_outputs: int, rows: int) -> None:
    """Outputs that fill no tile, inputs in one and several blocks, rows that end anywhere."""
    x, weight = torch.randn(rows, num_inputs + 32).bfloat16()[:, :num_inputs], torch.randn(2 * num_outputs, num_inputs)
    weight, bias = weight.bfloat16(), torch.randn(2 * num_outputs).bfloat16()
    for offset in (None, bias):
        product = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        rounded = cpu_kernels.linear(x, weight, offset)
        assert_near(rounded, product)
        floats = cpu_kernels.linear(x, weight, offset, float_output=True)
        assert torch.equal(floats.bfloat16(), rounded)
        torch.testing.assert_close(floats.double(), product, rtol=1e-4, atol=1e-3)
        residual = torch.randn(rows, 2 * num_outputs).bfloat16()
        expected = residual + rounded
        assert torch.equal(cpu_kernels.linear(x, weight, offset, residual=residual), expected)
        gate, up = product.chunk(2, dim=-1)
        assert_near(cpu_kernels.linear_silu_and_mul(x, weight, offset), F.silu(gate) * up)


@pytest.mark.skipif(not cpu_kernels.multiplies_int4(torch.bfloat16, 32, 16, 32), reason="needs AMX")
@pytest.mark.parametrize("rows", [1, 5, 40, 130])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "group_size"),
    [(576, 96, 64), (1536, 32, 128), (64, 33, 32), (96, 50, 96), (608, 16, 608)],
)
def test_linear_of_4_bits(num_inputs: int, num_outputs: int, group_size: int, rows: int) -> None:
    """The product with the weight that the integers mean, to the bit; every integer and zero point occurs."""
    integers = torch.randint(0, 16, (2 * num_outputs, num_inputs), dtype=torch.uint8)
    scales = (torch.rand(2 * num_outputs, num_inputs // group_size) * 0.1).bfloat16()
    zeros = torch.randint(0, 17, scales.shape, dtype=torch.uint8)
    spread = [t.float().repeat_interleave(group_size, 1) for t in (zeros, scales)]
    weight = ((integers.float() - spread[0]) * spread[1]).bfloat16()
    packed = cpu_kernels.pack_int4(integers)
    assert packed.shape == (2 * num_outputs, num_inputs // 2)
    x, residual = torch.randn(rows, num_inputs + 32).bfloat16()[:, :num_inputs], torch.randn(rows, 2 * num_outputs)
    residual = residual.bfloat16()
    for bias in (None, torch.randn(2 * num_outputs).bfloat16()):
        got = cpu_kernels.linear_int4(x, packed, scales, zeros, bias)
        assert torch.equal(got, cpu_kernels.linear(x, weight, bias))
        got = cpu_kernels.linear_int4(x, packed, scales, zeros, bias, residual.clone())
        assert torch.equal(got, cpu_kernels.linear(x, weight, bias, residual.clone()))
        got = cpu_kernels.linear_int4(x, packed, scales, zeros, bias, silu_and_mul=True)
        assert torch.equal(got, cpu_kernels.linear_silu_and_mul(x, weight, bias))


@pytest.mark.parametrize("rows", [40, 300])
def test_a_row_does_not_depend_on_the_others(rows: int) -> None:
    """Not on their values, nor on their number: few and many rows go different ways."""
    weight = torch.randn(160, 640).bfloat16()
    for multiply in (cpu_kernels.linear, cpu_kernels.linear_silu_and_mul):
        x = torch.randn(rows, 640).bfloat16()
        together = multiply(x, weight)
        x[1:] = float("nan")
        assert torch.equal(multiply(x, weight)[0], together[0])
        assert torch.equal(multiply(x[:1], weight)[0], together[0])


def test_many_rows_on_many_threads() -> None:
    """With more threads than pairs of tiles, rows are shared out too."""
    x, weight = torch.randn(300, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    threads = torch.get_num_threads()
    alone = cpu_kernels.linear(x, weight)
    try:
        for count in (2, 3, 5, 8):
            torch.set_num_threads(count)
            assert torch.equal(cpu_kernels.linear(x, weight), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 70])
@pytest.mark.parametrize("size", [1, 7, 64, 576, 1030])
def test_rms_norm(size: int, num_tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(num_tokens, size + 5).to(dtype)[:, :size], torch.randn(size).to(dtype)
    residual = torch.randn(num_tokens, size).to(dtype)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        wide = rows.double()
        return wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert_near(cpu_kernels.rms_norm(x, weight, 1e-5), norm(x))
    summed = residual + x
    out = poisoned((num_tokens, size), dtype)
    assert cpu_kernels.rms_norm(x, weight, 1e-5, residual, out) is out
    assert torch.equal(residual, summed)
    assert_near(out, norm(summed))
    twin = fused_ops.rms_norm_torch(summed, weight, 1e-5)
    assert torch.allclose(out.float(), twin.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 1), (1, 1536), (5, 33), (70, 300)])
def test_silu_and_mul(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(num_tokens, 2 * size) * 8).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(cpu_kernels.silu_and_mul(gate_up), F.silu(gate) * up, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_far_out(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e30, -500.0, -90.0, -0.0, 0.0, 1e-30, 90.0, 500.0, 1e30] * 2, dtype=dtype)
    got = cpu_kernels.silu_and_mul(torch.cat((gates, torch.ones_like(gates))).unsqueeze(0))[0]
    assert torch.allclose(got.float(), F.silu(gates.float()), atol=1e-4, rtol=2**-7)
    assert cpu_kernels.silu_and_mul(torch.full((1, 64), float("nan"), dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (5, 1, 80)])
@pytest.mark.parametrize("num_tokens", [0, 1, 37, 150])
def test_rope_write_kv(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, normed: bool, dtype: torch.dtype
) -> None:
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size).to(dtype)
    table, positions = torch.randn(2, 100, head_size).to(dtype), torch.randint(0, 100, (num_tokens,))
    slots = torch.randperm(200)[:num_tokens]
    slots[::7] = -1
    weights = [torch.randn(head_size).to(dtype) if normed else None for _ in range(2)]
    cache = torch.full((2, 40, 5, num_kv_heads, head_size), 7.0, dtype=dtype)
    expected_qkv, expected_cache = qkv.clone(), cache.clone()
    arguments = (positions, table, *weights, 1e-6)
    expected = fused_ops.qk_norm_rope_write_kv_torch(
        expected_qkv, *arguments, expected_cache, slots, num_heads, num_kv_heads
    )
    turned_too, other_cache = qkv.clone(), cache.clone()
    query = cpu_kernels.qk_norm_rope_write_kv(qkv, *arguments, cache, slots, num_heads, num_kv_heads)
    assert query.stride() == expected.stride() and query.data_ptr() == qkv.data_ptr()
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(qkv, expected_qkv, **tolerance)
    torch.testing.assert_close(cache, expected_cache, **tolerance)
    assert_near(query, expected.double())
    cpu_kernels.qk_norm_rope_write_kv(
        turned_too, *arguments, other_cache, slots, num_heads, num_kv_heads, keep_keys=False
    )
    assert torch.equal(other_cache, cache)
    heads = turned_too.view(num_tokens, num_heads + 2 * num_kv_heads, head_size)
    keys = heads[:, num_heads : num_heads + num_kv_heads]
    written = slots >= 0
    assert torch.equal(keys[written], cache[0].flatten(0, 1)[slots[written]])


CONTEXTS = [1, 700, 130, 9, 300, 2, 64, 65, 16, 17]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 13, 16, 1024])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (5, 1, 80)])
def test_paged_decode(num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype) -> None:
    check_paged_decode(num_heads, num_kv_heads, head_size, block_size, dtype)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"),
    [(17, 17, 32), (16, 8, 128), (6, 3, 96), (20, 5, 256), (14, 2, 64), (24, 3, 64), (16, 1, 64), (20, 1, 64)],
)
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_paged_decode_of_all_group_sizes(num_heads: int, num_kv_heads: int, head_size: int, block_size: int) -> None:
    """Groups of 1 to 20 heads; heads that fill the 16 columns of a tile, overfill them, leave a rest."""
    check_paged_decode(num_heads, num_kv_heads, head_size, block_size, torch.bfloat16)


@pytest.mark.parametrize("scale", [3.0, -3.0, 1e-3])
def test_paged_decode_of_scores_far_apart(scale: float) -> None:
    """Weights that are all but one zero, or all but equal; the largest score may be the first or the last."""
    check_paged_decode(9, 3, 64, 16, torch.bfloat16, scale)


def check_paged_decode(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, scale: float | None = None
) -> None:
    """All of a batch; some of it, out of order; one long context, which the threads must share."""
    num_reqs, blocks = len(CONTEXTS), [-(-n // block_size) for n in CONTEXTS]
    own = torch.randperm(sum(blocks) + 2).int().split([*blocks, 2])
    table = torch.zeros(num_reqs, max(blocks) + 3, dtype=torch.int32)
    cache = torch.full((2, sum(blocks) + 2, block_size, num_kv_heads, head_size), float("nan"), dtype=dtype)
    flat = cache.view(2, -1, num_kv_heads, head_size)
    slots = []
    for b, length in enumerate(CONTEXTS):
        table[b, : blocks[b]] = own[b]
        position = torch.arange(length)
        slots.append(table[b, position // block_size].long() * block_size + position % block_size)
        flat[:, slots[b]] = torch.randn(2, length, num_kv_heads, head_size).to(dtype)
    seq_lens = torch.tensor(CONTEXTS, dtype=torch.int32)
    wide = torch.randn(num_reqs + 4, num_heads + 3, head_size).to(dtype)
    query, scale = wide[:, :num_heads], head_size**-0.5 if scale is None else scale
    for reqs in (None, [5, 1, 7], [1], [0], []):
        rows = list(range(num_reqs)) if reqs is None else [b + 2 for b in reqs]
        out = poisoned((num_reqs + 4, num_heads, head_size), dtype)
        index = (None, None) if reqs is None else tuple(torch.tensor(i, dtype=torch.int32) for i in (rows, reqs))
        cpu_kernels.paged_decode(query, cache, table, seq_lens, out, scale, *index)
        for b, row in zip(range(num_reqs) if reqs is None else reqs, rows, strict=True):
            keys, values = flat[:, slots[b]].double().repeat_interleave(num_heads // num_kv_heads, 2).transpose(1, 2)
            weights = (query[row].double().unsqueeze(1) @ keys.transpose(1, 2) * scale).softmax(-1)
            assert_near(out[row], (weights @ values).squeeze(1), 2)
        untouched = [row for row in range(num_reqs + 4) if row not in rows]
        assert out[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 13, 16, 64])
def test_paged_decode_of_a_shared_prefix(block_size: int, dtype: torch.dtype, threads: int) -> None:
    """Requests that begin with the same blocks: all of them, and beside one that does not."""
    lengths, shared, num_heads, num_kv_heads, head_size = [209, 210, 208 + 64, 300, 209], 208, 6, 2, 32
    common, blocks = shared // block_size, [-(-n // block_size) for n in lengths]
    ids = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for b, own in enumerate(ids.split(blocks)):
        table[b, : blocks[b]] = own
        table[b, :common] = table[0, :common]
    strange = table[:1].clone()  # as long as the first, in blocks of its own from the third on
    strange[0, 2 : blocks[0]] = table[3, blocks[3] - (blocks[0] - 2) : blocks[3]]
    table, lengths = torch.cat([table, strange]), [*lengths, lengths[0]]
    cache = torch.randn(2, int(ids.numel()), block_size, num_kv_heads, head_size).to(dtype)
    query = torch.randn(len(lengths), num_heads, head_size).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    for reqs in ([0, 1, 2, 3, 4], [4, 2], [0, 5, 3], [1, 2, 3, 5]):
        index = torch.tensor(reqs, dtype=torch.int32)
        out, alone = poisoned(tuple(query.shape), dtype), poisoned(tuple(query.shape), dtype)
        cpu_kernels.paged_decode(query, cache, table, seq_lens, out, 0.2, index, index)
        for b in reqs:
            pages = cache[:, table[b].long()].flatten(1, 2)[:, : lengths[b]].double()
            keys, values = pages.repeat_interleave(num_heads // num_kv_heads, 2).transpose(1, 2)
            weights = (query[b].double().unsqueeze(1) @ keys.transpose(1, 2) * 0.2).softmax(-1)
            assert_near(out[b], (weights @ values).squeeze(1), 2)
            only = torch.tensor([b], dtype=torch.int32)
            cpu_kernels.paged_decode(query, cache, table, seq_lens, alone, 0.2, only, only)
        if threads == 1:  # more of them cut a request elsewhere in another batch
            assert torch.equal(out[reqs], alone[reqs]), "the tiles are met in the same order"


def test_one_openmp_library_is_mapped() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    mapped = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(mapped) <= 1, "two pools of spinning threads"
