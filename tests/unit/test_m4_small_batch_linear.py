"""The small-batch products and their twins against float64: tiny through Triton's interpreter, real shapes on CUDA."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.model_executor.layers import small_batch_linear as sbl

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-6
# The interpreter rounds to bfloat16 by cutting off, and takes tl.dot's bfloat16 operands for integers.
DTYPE = torch.bfloat16 if CUDA else torch.float16
Config = sbl.SmallBatchConfig

# (M, N, K, config): N is the number of outputs, so that a gated weight has 2 N rows. Odd sizes leave part of a tile
# empty; row_tiles and prefetch exercise the order of the steps.
TINY = [
    (1, 24, 64, Config(4, 64, 1)),
    (1, 24, 96, Config(4, 32, 1, row_tiles=2, prefetch=2)),
    (1, 13, 72, Config(2, 32, 1, row_tiles=4, prefetch=3)),
    (2, 24, 64, Config(8, 64, 1, split=1)),
    (5, 24, 96, Config(8, 32, 1, row_tiles=2, prefetch=2, split=2)),
    (16, 13, 72, Config(4, 64, 1, row_tiles=2, prefetch=1, split=4)),
]
REAL = [(m, n, k, None) for m in (1, 2, 7, 16) for n, k in ((1024, 1024), (3072, 1024), (1024, 3072), (1030, 4096))]
REAL += [(1, 896, 4864, None), (3, 4864, 896, None), (1, 577, 576, None), (16, 4096, 12288, None)]
REAL += TINY
CASES = REAL if CUDA else TINY
PDL = [False, True] if CUDA and torch.cuda.get_device_capability() >= (9, 0) else [False]
# One unit in the last place of 16-bit sums of order 1, twice over.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.fixture(autouse=True)
def kernels_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels on any device, and fill fresh outputs with NaN: what is not written shows."""
    # cuBLAS, the twin, may else add parts of a product that it has rounded to 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    monkeypatch.setattr(sbl, "runs_on_triton", lambda x: True)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal numbers."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def check(out: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    """`out` is as near to the float64 result as rounding allows, and has the twin's shape and dtype."""
    assert out.shape == twin.shape and out.dtype == twin.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(out, twin, rtol=2 * tolerance, atol=4 * tolerance)  # the twin may err the other way


def norm64(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float64."""
    wide = hidden.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", sorted({DTYPE, torch.float16}, key=str))
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_linear(m: int, n: int, k: int, config: Config | None, dtype: torch.dtype, pdl: bool) -> None:
    """Plain, with a bias, and with a residual, which is added after rounding and left alone."""
    x, weight = random(m, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5)
    bias, residual = random(n, dtype=dtype), random(m, n, dtype=dtype)
    before = residual.clone()
    exact = x.double() @ weight.double().T
    check(sbl.linear(x, weight, pdl=pdl, config=config), sbl.linear_torch(x, weight), exact)
    out = sbl.linear(x, weight, bias, residual, pdl=pdl, config=config)
    check(out, sbl.linear_torch(x, weight, bias, residual), exact + bias.double() + residual.double())
    assert torch.equal(residual, before)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_norm_linear(m: int, n: int, k: int, config: Config | None, with_residual: bool, pdl: bool) -> None:
    """The product of the normalised sum; the sum itself comes back bit for bit, in a tensor of its own."""
    dtype = DTYPE
    x, gamma = random(m, k, dtype=dtype, scale=3.0), random(k, dtype=dtype)
    residual = random(m, k, dtype=dtype) if with_residual else None
    weight, bias = random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
    before = None if residual is None else residual.clone()
    out, hidden = sbl.norm_linear(x, residual, gamma, EPS, weight, bias, pdl=pdl, config=config)
    twin, twin_hidden = sbl.norm_linear_torch(x, residual, gamma, EPS, weight, bias)
    assert torch.equal(hidden, twin_hidden)
    check(out, twin, norm64(hidden, gamma) @ weight.double().T + bias.double())
    if residual is None:
        assert hidden is x
    else:
        assert torch.equal(residual, before)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_gate_up(m: int, n: int, k: int, config: Config | None, pdl: bool) -> None:
    """silu(gate) * up with and without the norm before it; output n pairs weight rows n and N + n."""
    dtype = DTYPE
    x, residual, gamma = random(m, k, dtype=dtype), random(m, k, dtype=dtype), random(k, dtype=dtype)
    weight, bias = random(2 * n, k, dtype=dtype, scale=k**-0.5), random(2 * n, dtype=dtype)

    def exact(normed: torch.Tensor) -> torch.Tensor:
        gate, up = (normed @ weight.double().T + bias.double()).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    twin = sbl.silu_mul_torch(torch.nn.functional.linear(x, weight, bias))
    check(sbl.gate_up(x, weight, bias, pdl=pdl, config=config), twin, exact(x.double()))
    out, hidden = sbl.norm_gate_up(x, residual, gamma, EPS, weight, bias, pdl=pdl, config=config)
    normed, twin_hidden = sbl.norm_linear_torch(x, residual, gamma, EPS, weight, bias)
    assert torch.equal(hidden, twin_hidden)
    check(out, sbl.silu_mul_torch(normed), exact(norm64(hidden, gamma)))


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_greedy_ids(m: int, n: int, k: int, config: Config | None, pdl: bool) -> None:
    """The id of the largest logit; of equal ones the lowest, in whatever programs and row tiles they are."""
    # Small integers: every sum is exact, so that ties are ties for any order of summation.
    x = torch.randint(-2, 3, (m, k)).to(DEVICE, DTYPE)
    weight = torch.randint(-1, 2, (n, k)).to(DEVICE, DTYPE)
    x[:, :2], weight[:, :2] = 1, 0
    for row in range(m):  # the largest logit of row 0 is tied across the weight's ends; others are somewhere
        ids = [n - 1, n // 2, 3] if row == 0 else [int(torch.randint(0, n, ()))]
        for i in ids:
            weight[i, 2:] = x[row, 2:].sign()
    logits = (x.double() @ weight.double().T).to(x.dtype)
    lowest = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    out = sbl.greedy_ids(x, weight, pdl=pdl, config=config)
    assert out.dtype == torch.int64 and out.tolist() == lowest.tolist()
    assert logits.gather(1, sbl.greedy_ids_torch(x, weight)[:, None]).squeeze(1).tolist() == logits.amax(-1).tolist()


def test_default_config_covers_the_product() -> None:
    """Tiles are powers of two (what tl.arange takes), with at least 16 columns in a tensor-core part."""
    for m in (1, 2, 16):
        for n, k in ((4096, 1024), (1024, 3072), (151936, 4096), (577, 576), (48, 40)):
            for gated in (False, True):
                config = sbl.default_config(m, n, k, gated)
                for value in (config.block_n, config.block_k, config.num_warps, config.split):
                    assert value & (value - 1) == 0 and value > 0
                assert m == 1 or config.block_k // config.split >= 16


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off CUDA, and for more than 16 rows, none or float32, the twins run."""
    monkeypatch.undo()
    weight = torch.randn(8, 32)
    for m in (0, 1, 17):
        x = torch.randn(m, 32)
        assert not sbl.runs_on_triton(x)
        assert torch.equal(sbl.linear(x, weight), sbl.linear_torch(x, weight))
        assert sbl.gate_up(x, weight).shape == (m, 4)
    if CUDA:
        for m, dtype, expected in ((1, torch.bfloat16, True), (16, torch.float16, True), (17, torch.bfloat16, False),
                                   (0, torch.bfloat16, False), (1, torch.float32, False)):  # fmt: skip
            assert sbl.runs_on_triton(torch.empty(m, 32, dtype=dtype, device="cuda")) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4])
def test_a_chain_with_pdl_in_a_graph_equals_the_chain_without(m: int) -> None:
    """Twelve dependent layers: a kernel that read before its predecessor had written would differ."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    e, inner, dtype = 1024, 3072, torch.bfloat16
    layers = [
        tuple(random(*shape, dtype=dtype, scale=e**-0.5) for shape in ((2 * inner, e), (e, inner))) for _ in range(12)
    ]
    gamma = random(e, dtype=dtype)
    x = random(m, e, dtype=dtype)

    def chain(pdl: bool) -> torch.Tensor:
        hidden = x
        for gate_up, down in layers:
            act, hidden = sbl.norm_gate_up(hidden, None, gamma, EPS, gate_up, pdl=pdl)
            hidden = sbl.linear(act, down, residual=hidden, pdl=pdl)
        return hidden

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(20):
        x.copy_(random(m, e, dtype=dtype))
        graph.replay()
        assert torch.equal(captured, chain(False))
