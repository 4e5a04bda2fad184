"""Products of dozens of rows and their twins against float64: tiny in Triton's interpreter, real shapes on CUDA."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.model_executor.layers import batch_linear as bl

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-6
# The interpreter rounds to bfloat16 by cutting off, and takes tl.dot's bfloat16 operands for integers.
DTYPE = torch.bfloat16 if CUDA else torch.float16
Config = bl.GemmConfig

# (M, N, K, config): N is the number of outputs, so that a gated weight has 2 N rows. Odd sizes leave part of a tile
# empty; 9 tiles of rows are more than a group of neighbours.
TINY = [
    (17, 40, 64, Config(16, 16, 32, 4, 2)),
    (33, 24, 96, Config(32, 16, 32, 4, 3, swap=True)),
    (20, 19, 72, Config(32, 32, 16, 4, 2)),
    (1, 16, 16, Config(16, 16, 16, 4, 2, swap=True)),
    (130, 40, 32, Config(16, 16, 32, 4, 2)),
    (20, 24, 72, Config(32, 16, 32, 4, 2, tma=True)),
    (20, 24, 60, Config(32, 16, 32, 4, 2, tma=True)),  # rows of 120 bytes: not for the copy engine
]
TINY_SPLIT = [
    (17, 24, 96, Config(16, 16, 16, 4, 2, splits=3)),
    (33, 40, 88, Config(32, 16, 16, 4, 2, swap=True, splits=4)),
    (19, 24, 64, Config(16, 16, 32, 4, 2)),
    (17, 24, 96, Config(16, 16, 16, 4, 2, swap=True, splits=2, tma=True)),
]
REAL = [(m, n, k, None) for m in (17, 32, 65, 256, 300) for n, k in ((4096, 1024), (1024, 3072), (1030, 904))]
REAL += [
    (32, 4096, 1024, Config(32, 64, 128, 4, 5, swap=True, prefetch=1024)),
    (32, 1024, 3072, Config(32, 32, 128, 4, 4, swap=True, prefetch=3072)),
    (100, 1024, 2048, Config(64, 64, 128, 4, 4, prefetch=512)),
    (512, 4096, 1024, Config(128, 128, 64, 8, 4, prefetch=1024)),
    (200, 3000, 1000, Config(128, 64, 64, 4, 4, prefetch=1024, tma=True)),
    (32, 3072, 1024, Config(32, 64, 128, 4, 3, swap=True, prefetch=1024, tma=True)),
]
REAL_SPLIT = [
    (32, 1024, 3072, Config(32, 64, 128, 4, 3, swap=True, splits=8, prefetch=1024)),
    (77, 1024, 2048, Config(64, 64, 128, 4, 3, splits=3)),
    (256, 4096, 12288, Config(128, 128, 64, 8, 4, splits=4, prefetch=1024)),
]
CASES = REAL + TINY if CUDA else TINY
SPLIT_CASES = REAL + REAL_SPLIT + TINY_SPLIT if CUDA else TINY_SPLIT
PDL = [False, True] if CUDA and torch.cuda.get_device_capability() >= (9, 0) else [False]
# One unit in the last place of 16-bit sums of order 1, twice over.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def kernels_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels on any device, and fill fresh outputs with NaN: what is not written shows."""
    # cuBLAS, the twin, may else add parts of a product that it has rounded to 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    monkeypatch.setattr(bl, "runs_on_triton", lambda x: True)
    monkeypatch.setattr(bl, "takes_deterministic", lambda x: x.shape[0] > 0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def random(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal numbers."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def check(out: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    """`out` is as near to the float64 result as rounding allows, and has the twin's shape and dtype."""
    assert out.shape == twin.shape and out.dtype == twin.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(out, twin, rtol=2 * tolerance, atol=4 * tolerance)  # the twin may err the other way


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", sorted({DTYPE, torch.float16}, key=str))
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_linear(m: int, n: int, k: int, config: Config | None, dtype: torch.dtype, pdl: bool) -> None:
    """Plain, and with bias and residual; into a new tensor, a given one, and over the residual itself."""
    x, weight = random(m, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5)
    bias, residual = random(n, dtype=dtype), random(m, n, dtype=dtype)
    before = residual.clone()
    exact = x.double() @ weight.double().T
    check(bl.linear(x, weight, pdl=pdl, config=config), bl.linear_torch(x, weight), exact)
    twin, exact = bl.linear_torch(x, weight, bias, residual), exact + bias.double() + residual.double()
    check(bl.linear(x, weight, bias, residual, pdl=pdl, config=config), twin, exact)
    assert torch.equal(residual, before)
    out = torch.full_like(residual, float("nan"))
    assert bl.linear(x, weight, bias, residual, out, pdl=pdl, config=config) is out
    check(out, twin, exact)
    check(bl.linear(x, weight, bias, residual, residual, pdl=pdl, config=config), twin, exact)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_gate_up(m: int, n: int, k: int, config: Config | None, with_bias: bool, pdl: bool) -> None:
    """silu(gate) * up; output n pairs weight rows n and N + n."""
    x, weight = random(m, k), random(2 * n, k, scale=k**-0.5)
    bias = random(2 * n) if with_bias else None
    product = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    gate, up = product.chunk(2, dim=-1)
    out = bl.gate_up(x, weight, bias, pdl=pdl, config=config)
    check(out, bl.gate_up_torch(x, weight, bias), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "config"), SPLIT_CASES)
def test_linear_norm(m: int, n: int, k: int, config: Config | None, with_bias: bool, pdl: bool) -> None:
    """The norm of the sum, and the sum in the residual's place, whether or not K is cut; twice the same bits."""
    x, weight, residual, gamma = random(m, k), random(n, k, scale=k**-0.5), random(m, n), random(n)
    bias = random(n) if with_bias else None
    summed, twin_summed, again = residual.clone(), residual.clone(), residual.clone()
    out = bl.linear_norm(x, weight, bias, summed, gamma, EPS, pdl=pdl, config=config)
    twin = bl.linear_norm_torch(x, weight, bias, twin_summed, gamma, EPS)
    product = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    check(summed, twin_summed, product + residual.double())
    wide = summed.double()
    check(out, twin, wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma.double())
    assert torch.equal(out, bl.linear_norm(x, weight, bias, again, gamma, EPS, pdl=pdl, config=config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *([torch.bfloat16] if CUDA else [])])
def test_deterministic_linear(dtype: torch.dtype) -> None:
    """A row has the same bits alone and anywhere in any batch; and they are right."""
    if CUDA:
        n, k, batches = 1030, 1000, (2, 3, 16, 17, 31, 64, 65, 128, 200, 256, 300, 2049)
    else:
        n, k, batches = 70, 136, (2, 65)
    weight, bias = random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
    x = random(max(batches), k, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    full = bl.deterministic_linear(x, weight, bias)
    check(full, torch.nn.functional.linear(x, weight, bias), exact)
    check(bl.deterministic_linear(x, weight), torch.nn.functional.linear(x, weight), exact - bias.double())
    for m in batches:
        rows = torch.randperm(len(x))[:m].to(DEVICE)
        out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
        assert bl.deterministic_linear(x[rows].contiguous(), weight, bias, out) is out
        assert torch.equal(out, full[rows]), m
    for row in torch.randint(len(x), (3,)).tolist():
        assert torch.equal(bl.deterministic_linear(x[row : row + 1], weight, bias), full[row : row + 1])
    assert bl.deterministic_linear(x[:0], weight).shape == (0, n)


def test_float32_is_not_rounded_to_tf32() -> None:
    """Numbers that TF32's 10 bits of fraction cannot hold."""
    x = torch.full((3, 32), 1 + 2.0**-18, device=DEVICE)
    assert bl.deterministic_linear(x, torch.eye(32, device=DEVICE)).eq(1 + 2.0**-18).all()


def test_measured_shapes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured tile serves its bucket of rows and nothing else."""
    tile = Config(64, 64, 64, 4, 3)
    monkeypatch.setattr(bl, "MEASURED", {(64, 1024, 3072, "norm"): tile})
    assert [bl.row_bucket(m) for m in (1, 16, 17, 32, 33, 512, 513)] == [None, None, 32, 32, 64, 512, None]
    for m, expected in ((32, False), (33, True), (64, True), (65, False), (600, False), (1, False)):
        assert bl.uses_batch_linear(m, 1024, 3072, "norm") is expected
        assert (bl.default_config(m, 1024, 3072, "norm") == tile) is expected
    assert not bl.uses_batch_linear(64, 1024, 3072, "none")


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off CUDA, and for no rows, the twins run."""
    monkeypatch.undo()
    weight, gamma = torch.randn(8, 32), torch.randn(8)
    for m in (0, 17):
        x, residual = torch.randn(m, 32), torch.randn(m, 8)
        assert not bl.runs_on_triton(x)
        assert torch.equal(bl.linear(x, weight), bl.linear_torch(x, weight))
        assert torch.equal(bl.deterministic_linear(x, weight), torch.nn.functional.linear(x, weight))
        assert torch.equal(bl.gate_up(x, weight), bl.gate_up_torch(x, weight))
        expected = bl.linear_norm_torch(x, weight, None, residual.clone(), gamma, EPS)
        assert torch.equal(bl.linear_norm(x, weight, None, residual, gamma, EPS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [17, 32, 200])
def test_a_chain_with_pdl_in_a_graph_equals_the_chain_without(m: int) -> None:
    """Twelve dependent layers: a kernel that read before its predecessor had written would differ."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    e, inner = 1024, 3072
    layers = [tuple(random(*s, scale=e**-0.5) for s in ((e, e), (2 * inner, e), (e, inner))) for _ in range(12)]
    gamma, x = random(e), random(m, e)

    def chain(pdl: bool) -> torch.Tensor:
        residual, hidden = x.clone(), x
        for o, gate_up, down in layers:
            hidden = bl.linear_norm(bl.linear(hidden, o, pdl=pdl), o, None, residual, gamma, EPS, pdl=pdl)
            hidden = bl.linear_norm(bl.gate_up(hidden, gate_up, pdl=pdl), down, None, residual, gamma, EPS, pdl=pdl)
        return hidden

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(20):
        x.copy_(random(m, e))
        graph.replay()
        assert torch.equal(captured, chain(False))


def test_products_measured_slower_go_to_cublas() -> None:
    """Of Qwen3-0.6B's products all are faster here up to 256 rows; of Qwen3-8B's one, up to 64."""
    rows = [16, 17, 64, 65, 128, 129, 256, 257]
    for product in ((4096, 1024, "none"), (3072, 1024, "silu_mul"), (1024, 3072, "norm"), (1024, 2048, "norm")):
        assert [m for m in rows if bl.uses_batch_linear(m, *product)] == [17, 64, 65, 128, 129, 256]
    assert [m for m in rows if bl.uses_batch_linear(m, 12288, 4096, "silu_mul")] == [17, 64]
    assert not bl.uses_batch_linear(64, 4096, 1025, "none")


@pytest.mark.gpu
def test_a_tile_filled_in_part_takes_no_longer_than_a_full_one() -> None:
    """Rows that are padding must not all read one row: that took 24 us at 136 rows where 256 took 7."""
    weights = [random(4096, 1024, scale=0.03) for _ in range(8)]
    tile = Config(128, 64, 64, 8, 5)
    times = {}
    for m in (256, 136):
        x, out = random(m, 1024), random(m, 4096)
        bl.linear(x, weights[0], None, None, out, config=tile)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights * 4:
                bl.linear(x, weight, None, None, out, config=tile)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        times[m] = min(events[i].elapsed_time(events[i + 1]) for i in range(2, 11))
    assert times[136] < 1.5 * times[256]
