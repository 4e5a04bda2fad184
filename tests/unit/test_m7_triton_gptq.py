"""The GPTQ kernels and their twins against float64: tiny through Triton's interpreter, real shapes on CUDA."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.model_executor.layers.quantization import packing
from folovllm.model_executor.layers.quantization import triton_gptq as tg
from folovllm.model_executor.layers.quantization import triton_gptq_tiles as tiles
from folovllm.model_executor.layers.quantization.triton_gptq_tiles import MAX_ROWS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-6
# The interpreter rounds to bfloat16 by cutting off, and takes tl.dot's bfloat16 operands for integers.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
PDL = [False, True] if CUDA and torch.cuda.get_device_capability() >= (9, 0) else [False]
Gemv, Gemm = tg.GemvConfig, tg.PackedGemmConfig

# (bits, group size, symmetric), each used with inputs that leave part of the last block empty.
FORMATS = [
    (4, 32, False),
    (4, 64, True),
    (4, 128, False),
    (4, -1, True),
    (8, 32, False),
    (8, 128, True),
    (8, -1, False),
]
# (M, N, K, config): odd numbers of rows and outputs; more than one tile, split, step and prefetched step.
TINY = [
    (1, 13, 384, Gemv(4, 1, 1, row_tiles=2, prefetch=1)),
    (1, 24, 640, Gemv(8, 2, 1, prefetch=2)),
    (1, 20, 384, Gemm(16, 16, 1, 2)),
    (3, 20, 640, Gemm(16, 16, 1, 2)),
    (19, 40, 384, Gemm(16, 32, 1, 2)),
]
REAL: list[tuple[int, int, int, Gemv | Gemm | None]] = [
    (m, n, k, None) for m in (1, 2, 7, 16, 17, 64, 100, 256, 300) for n, k in ((1024, 1024), (1030, 4096), (576, 1536))
]
REAL += [(1, 6144, 4096, None), (16, 4096, 12288, None), (200, 4096, 4096, Gemm(128, 128, 8, 2, tma=True))]
REAL += [(200, 4096, 4096, None), (500, 12288, 4096, None), (40, 12288, 4096, None)]
CASES = TINY + REAL if CUDA else TINY
ONE_ROW = [(n, k, config) for m, n, k, config in CASES if m == 1 and not isinstance(config, Gemm)]


@pytest.fixture(autouse=True)
def kernels_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels on any device, and fill fresh outputs with NaN: what is not written shows."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    monkeypatch.setattr(tg, "runs_on_triton", lambda x: True)
    empty = torch.empty

    def poisoned(*args: int, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def quantized(
    n: int, k: int, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> tuple[tg.PackedWeight, torch.Tensor]:
    """Return a random packed weight, and what it means in float64, [N, K], computed from the numbers themselves."""
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    values = torch.randint(0, 2**bits, (k, n), device=DEVICE)
    scales = (torch.rand(groups, n, device=DEVICE) + 0.5).to(dtype) * (2.0 ** (1 - bits) / k**0.5)
    # Up to 2**bits: format "gptq" stores zero points minus one.
    zeros = torch.full((groups, n), 2 ** (bits - 1)) if sym else torch.randint(0, 2**bits + 1, (groups, n))
    zeros = zeros.to(DEVICE)
    index = torch.arange(k, device=DEVICE) // size
    meaning = (values.double() - zeros.double()[index]) * scales.double()[index]
    packed = tg.repack_for_triton(packing.pack_rows(values, bits), scales, zeros, bits, group_size)
    assert (packed.zeros is None) == sym
    return packed, meaning.T


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal numbers."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def check(out: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    """`out` is as near to the float64 result as rounding weights and results allows; so is the twin."""
    assert out.shape == twin.shape and out.dtype == twin.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(out, twin, rtol=2 * tolerance, atol=4 * tolerance)  # the twin may err the other way


def fits(k: int, group_size: int) -> bool:
    """Whether groups are all full."""
    return group_size == -1 or k % group_size == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "sym"), FORMATS)
def test_twin_is_the_definition(bits: int, group_size: int, sym: bool, dtype: torch.dtype) -> None:
    """Repacking and the plain dequantization give the number that each weight means, rounded once."""
    for k in (256, 384, 512, 640):
        packed, meaning = quantized(13, k, bits, group_size, sym, dtype)
        dequantized = tg.dequantize_torch(packed)
        assert torch.equal(dequantized, meaning.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "sym"), FORMATS)
def test_dequantize(bits: int, group_size: int, sym: bool, dtype: torch.dtype) -> None:
    """Bit for bit the twin's, whole and in parts; a workspace is not written beyond the part."""
    for n, k in [(40, 384), (13, 256)] + ([(1030, 4096)] if CUDA else []):
        packed, _ = quantized(n, k, bits, group_size, sym, dtype)
        twin = tg.dequantize_torch(packed)
        assert torch.equal(tg.dequantize_packed(packed), twin)
        workspace = torch.full((n, k), 7.0, dtype=dtype, device=DEVICE)
        part = tg.dequantize_packed(packed, 3, n - 2, workspace)
        assert torch.equal(part, twin[3 : n - 2]) and bool((workspace[n - 5 :] == 7).all())


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "sym"), FORMATS)
def test_linear(bits: int, group_size: int, sym: bool, dtype: torch.dtype, pdl: bool) -> None:
    """Every format: plain, split along K, and with a bias and a residual, which is added after rounding."""
    # Real shapes take turns: each is a kernel to compile, for each format.
    turn = FORMATS.index((bits, group_size, sym))
    for m, n, k, config in TINY + CASES[len(TINY) :][turn :: len(FORMATS)]:
        if not fits(k, group_size):
            continue
        packed, meaning = quantized(n, k, bits, group_size, sym, dtype)
        x, bias, residual = random(m, k, dtype=dtype), random(n, dtype=dtype), random(m, n, dtype=dtype)
        before = residual.clone()
        exact = x.double() @ meaning.T
        configs = [config, replace(config, splits=3)] if isinstance(config, Gemm) else [config]
        for tile in configs:
            check(tg.linear(x, packed, pdl=pdl, config=tile), tg.packed_linear_torch(x, packed), exact)
            out = tg.linear(x, packed, bias, residual, pdl=pdl, config=tile)
            twin = tg.packed_linear_torch(x, packed, bias, residual)
            check(out, twin, exact + bias.double() + residual.double())
        assert torch.equal(residual, before)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_gate_up(m: int, n: int, k: int, config: Gemv | Gemm | None, pdl: bool) -> None:
    """Gates and ups of one packed weight, with a bias for both halves."""
    for bits, group_size, sym in FORMATS[2:6:3]:
        packed, meaning = quantized(2 * n, k, bits, group_size, sym, DTYPES[-1])
        x, bias = random(m, k, dtype=DTYPES[-1]), random(2 * n, dtype=DTYPES[-1])
        gate, up = (x.double() @ meaning.T + bias.double()).chunk(2, dim=-1)
        for tile in [config, replace(config, fuses_silu=False)] if isinstance(config, Gemm) else [config]:
            out = tg.gate_up(x, packed, bias, pdl=pdl, config=tile)
            check(out, tg.gate_up_torch(x, packed, bias), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(("n", "k", "config"), ONE_ROW)
def test_norm_before_one_row(n: int, k: int, config: Gemv | None, pdl: bool) -> None:
    """RMSNorm and the product in one kernel, with and without SiLU-mul after it."""
    dtype = DTYPES[-1]
    packed, meaning = quantized(2 * n, k, 4, 128, False, dtype)
    x, gamma, bias = random(1, k, dtype=dtype, scale=3.0), random(k, dtype=dtype), random(2 * n, dtype=dtype)
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma.double()
    exact = normed @ meaning.T + bias.double()
    twin = tg.norm_torch(x, gamma, EPS)
    out = tg.norm_linear(x, gamma, EPS, packed, bias, pdl=pdl, config=config)
    check(out, tg.packed_linear_torch(twin, packed, bias), exact)
    out = tg.norm_gate_up(x, gamma, EPS, packed, bias, pdl=pdl, config=config)
    gate, up = exact.chunk(2, dim=-1)
    check(out, tg.gate_up_torch(twin, packed, bias), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("splits", [1, 2])
def test_norm_after(splits: int) -> None:
    """The norm adds the parts of a split product; the residual becomes the sum."""
    if not CUDA and splits == 1:
        pytest.skip("the norm of an unsplit product is fused_ops', tested there")
    dtype = DTYPES[-1]
    packed, _ = quantized(24, 640, 4, 128, True, dtype)
    x, gamma, bias, residual = (random(*s, dtype=dtype) for s in ((5, 640), (24,), (24,), (5, 24)))
    expected_residual = residual.clone()
    expected = tg.linear_norm_torch(x, packed, bias, expected_residual, gamma, EPS)
    out = tg.linear_norm(x, packed, bias, residual, gamma, EPS, config=Gemm(16, 16, 1, 2, splits=splits))
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(residual, expected_residual, rtol=tolerance, atol=tolerance)


def test_many_rows_dequantize_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above MAX_ROWS: parts of the weight, through one workspace, into their columns."""
    monkeypatch.setattr(tg, "WORKSPACE_BYTES", 1)
    packed, meaning = quantized(300, 256, 4, 128, True, torch.float16)
    x = random(MAX_ROWS + 1, 256, dtype=torch.float16)
    check(tg.linear(x, packed), tg.packed_linear_torch(x, packed), x.double() @ meaning.T)


def test_tiles_are_ones_the_kernel_can_run() -> None:
    """Measured or by rule: powers of two, in an H100's shared memory, split only where parts are added afterwards."""
    shapes = [(n, k, gated) for n, k in ((64, 256), (576, 1536), (4096, 12288)) for gated in (False, True)]
    ruled = [(tiles.default_config(m, *shape), *shape) for m in range(2, MAX_ROWS + 1) for shape in shapes]
    for tile, n, k, gated in ruled + [(tile, *shape) for (_, *shape), tile in tiles.MEASURED_GEMM.items()]:
        assert isinstance(tile, Gemm)
        assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.block_m, tile.block_n))
        fused = gated and tile.fuses_silu
        assert tile.splits == 1 or (not fused and k // tile.splits >= 256), (n, k, tile)
        weights = max(1, tile.num_stages - 1) * tile.block_n * 128 * (2 if fused else 1)
        assert tile.num_stages * tile.block_m * 512 + weights <= 220_000
    assert all(bucket in tiles.ROW_BUCKETS for bucket, *_ in tiles.MEASURED_GEMM)


def test_a_tile_is_that_of_the_next_larger_bucket() -> None:
    for (bucket, n, k, gated), tile in tiles.MEASURED_GEMM.items():
        smaller = max((other for other in tiles.ROW_BUCKETS if other < bucket), default=1)
        assert tiles.default_config(bucket, n, k, gated) == tiles.default_config(smaller + 1, n, k, gated) == tile
    assert tiles.default_config(1025, 12288, 4096, True) is None  # dequantized


def test_what_cannot_be_packed_is_refused() -> None:
    """By its value."""
    words, scales = torch.zeros(48, 8, dtype=torch.int32), torch.ones(4, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="bits=2"):
        tg.repack_for_triton(words, scales, scales, 2, 96)
    with pytest.raises(ValueError, match="group_size=96"):
        tg.repack_for_triton(words, scales, scales, 4, 96)
    with pytest.raises(ValueError, match="float32"):
        tg.repack_for_triton(words, scales.float(), scales, 4, 128)


def test_packed_bytes() -> None:
    """4 bits in groups of 128: less than 0.30 of 16-bit weights."""
    packed, _ = quantized(64, 4096, 4, 128, True, torch.bfloat16)
    assert sum(t.nbytes for t in packed.tensors()) <= 0.27 * 64 * 4096 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("m", [1, 16, 64, 400])
def test_in_a_cuda_graph(m: int) -> None:
    """A recorded product follows its input."""
    packed, meaning = quantized(4096, 4096, 4, 128, True, torch.bfloat16)
    x = random(m, 4096, dtype=torch.bfloat16)
    tg.linear(x, packed, pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tg.linear(x, packed, pdl=True)
    x.copy_(random(m, 4096, dtype=torch.bfloat16))
    graph.replay()
    check(out, tg.packed_linear_torch(x, packed), x.double() @ meaning.T)
