"""The fused operations: every Triton kernel against its plain-torch twin, the twins against the layers they replace.

Without CUDA the kernels run through Triton's interpreter, on small problems. What is not to be read, and outputs before
they are written, hold NaN.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.attention.ops import write_kv_cache  # noqa: E402
from folovllm.model_executor.layers import fused_ops, triton_kernels  # noqa: E402
from folovllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding, compute_inv_freq  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
FP8 = torch.float8_e4m3fn
# The interpreter rounds to bfloat16 by cutting off.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])
# Two units in the last place: the order of a sum may move a rounding, and that a second one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
NAN = float("nan")
EPS = 1e-6


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# --- norm and activation ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(0, 64), (1, 1), (1, 100), (3, 1024), (5, 576)])
def test_rms_norm_equals_its_twin(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    x, weight = 3 * randn(num_tokens, hidden_size, dtype=dtype), randn(hidden_size, dtype=dtype)
    given = x.clone()
    out = torch.full_like(x, NAN)
    assert triton_kernels.rms_norm(x, weight, EPS, out=out) is out
    assert_near(out, fused_ops.rms_norm_torch(x, weight, EPS), dtype)
    assert torch.equal(x, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_residual_sums_in_place_and_norms_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = randn(4, 200, dtype=dtype), 9 * randn(4, 200, dtype=dtype), randn(200, dtype=dtype)
    expected_residual = residual + x
    expected = fused_ops.rms_norm_torch(expected_residual, weight, EPS)
    ours, twins = residual.clone(), residual.clone()
    assert_near(triton_kernels.rms_norm(x, weight, EPS, ours), expected, dtype)
    assert torch.equal(ours, expected_residual)
    assert torch.equal(fused_ops.rms_norm_torch(x, weight, EPS, twins), expected)
    assert torch.equal(twins, expected_residual)
    # The norm may take x's place.
    ours = residual.clone()
    assert_near(triton_kernels.rms_norm(x, weight, EPS, ours, out=x), expected, dtype)


def test_rms_norm_of_rows_inside_wider_rows() -> None:
    wide = torch.full((3, 300), NAN, device=DEVICE)
    wide[:, 100:200] = randn(3, 100)
    weight = randn(100)
    x = wide[:, 100:200]
    assert_near(triton_kernels.rms_norm(x, weight, EPS), fused_ops.rms_norm_torch(x, weight, EPS), torch.float32)


def test_rms_norm_is_the_layers() -> None:
    layer = RMSNorm(96, EPS).to(DEVICE)
    layer.weight.copy_(randn(96))
    x = randn(2, 96)
    assert_near(fused_ops.rms_norm(x, layer.weight, EPS), layer(x), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "inner"), [(0, 8), (1, 1), (1, 100), (3, 1536), (2, 257)])
def test_silu_and_mul_equals_its_twin(num_tokens: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = 4 * randn(num_tokens, 2 * inner, dtype=dtype)
    given = gate_up.clone()
    assert_near(triton_kernels.silu_and_mul(gate_up, block=128), fused_ops.silu_and_mul_torch(gate_up), dtype)
    assert torch.equal(gate_up, given)


def test_silu_of_very_negative_gates_is_zero() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 1e4, 2.0, 3.0, 4.0]], device=DEVICE)
    assert triton_kernels.silu_and_mul(gate_up).tolist() == [[0.0, 0.0, 4e4]]


# --- QK-norm, rotation, cache ---


class Problem:
    """A step's QKV rows with everything that goes into the fused kernel."""

    def __init__(
        self,
        slots: list[int],
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_size: int = 64,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        norm: bool = True,
        block_size: int = 8,
        num_blocks: int = 5,
    ) -> None:
        num_tokens = len(slots)
        self.qkv = 2 * randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size, dtype=dtype)
        self.positions = torch.randint(0, 90, (num_tokens,), device=DEVICE)
        self.rope = RotaryEmbedding(head_size, 90, compute_inv_freq(head_size, 1e4, None)).to(DEVICE, dtype)
        self.weights = [1 + randn(head_size, dtype=dtype) if norm else None for _ in range(2)]
        shape = (2, num_blocks, block_size, num_kv_heads, head_size)
        self.kv_cache = torch.full(shape, NAN, device=DEVICE).to(cache_dtype or dtype)
        self.slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
        self.heads = num_heads, num_kv_heads

    def run(self, function: Any, scales: tuple[float, float] = (1.0, 1.0), **kwargs: Any) -> list[torch.Tensor]:
        """Return (queries, qkv, cache) after `function` on copies."""
        qkv, cache = self.qkv.clone(), self.kv_cache.clone()
        args = (qkv, self.positions, self.rope.cos_sin_cache, *self.weights, EPS, cache, self.slots, *self.heads)
        return [function(*args, *scales, **kwargs), qkv, cache]


def assert_fp8_near(actual: torch.Tensor, expected: torch.Tensor, exact_share: float, atol: float = 2**-9) -> None:
    """At most a step of float8 apart, and equal in at least `exact_share` of all places."""
    a, b = actual.float(), expected.float()
    if not CUDA:
        # The interpreter loses the carry where rounding reaches the next power of two, and gives half of it.
        power_of_two = torch.frexp(b.abs()).mantissa == 0.5
        a = torch.where(power_of_two & (a * 2 == b), b, a)
    torch.testing.assert_close(a, b, rtol=0.126, atol=atol, equal_nan=True)
    assert ((a == b) | a.isnan()).float().mean() >= exact_share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False], ids=["qk-norm", "plain"])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_qk_norm_rope_write_kv_equals_its_twin(head_size: int, norm: bool, dtype: torch.dtype) -> None:
    problem = Problem([9, -1, 39, 0, -7], num_heads=6, num_kv_heads=3, head_size=head_size, dtype=dtype, norm=norm)
    query, qkv, cache = problem.run(triton_kernels.qk_norm_rope_write_kv)
    expected_query, _, expected_cache = problem.run(fused_ops.qk_norm_rope_write_kv_torch)
    assert query.shape == (5, 6, head_size) and query.data_ptr() == qkv.data_ptr()
    # Two bfloat16 roundings and a difference of products of size ten.
    torch.testing.assert_close(query, expected_query, rtol=2 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    assert torch.equal(qkv[:, 6 * head_size :], problem.qkv[:, 6 * head_size :])
    torch.testing.assert_close(
        cache, expected_cache, rtol=2 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype], equal_nan=True
    )
    written = (~cache[0, :, :, 0, 0].isnan()).flatten().nonzero().flatten().tolist()
    assert written == [0, 9, 39]
    # Values are copied, bit for bit.
    values = problem.qkv.view(5, -1, head_size)[:, -3:]
    assert torch.equal(cache[1].flatten(0, 1)[[9, 39, 0]], values[[0, 2, 3]])


@pytest.mark.parametrize("heads_per_program", [1, 2, 8])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3), (8, 1)])
def test_heads_may_be_grouped_in_any_way(num_heads: int, num_kv_heads: int, heads_per_program: int) -> None:
    problem = Problem([3, 4], num_heads, num_kv_heads)
    ours = problem.run(triton_kernels.qk_norm_rope_write_kv, heads_per_program=heads_per_program, num_warps=2)
    for actual, expected in zip(ours, problem.run(fused_ops.qk_norm_rope_write_kv_torch), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.0078125), (0.3, 2.7)])
def test_float8_cache_holds_scaled_and_clamped_values(scales: tuple[float, float], dtype: torch.dtype) -> None:
    problem = Problem([1, -1, 30, 12], dtype=dtype, cache_dtype=FP8)
    query, _, cache = problem.run(triton_kernels.qk_norm_rope_write_kv, scales)
    expected_query, _, expected_cache = problem.run(fused_ops.qk_norm_rope_write_kv_torch, scales)
    torch.testing.assert_close(query, expected_query, rtol=2 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    assert_fp8_near(cache, expected_cache, 0.98, atol=2**-4)
    if scales[1] < 0.01:
        assert cache.float().nan_to_num().abs().max() == 448.0


@pytest.mark.parametrize("slots", [[], [0], [-1], [-1, -1]], ids=["no token", "one", "one of padding", "only padding"])
def test_few_tokens(slots: list[int]) -> None:
    problem = Problem(slots)
    ours, expected = (
        problem.run(f) for f in (triton_kernels.qk_norm_rope_write_kv, fused_ops.qk_norm_rope_write_kv_torch)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_cache_may_be_part_of_a_larger_tensor() -> None:
    problem = Problem([11, 2])
    layers = torch.full((2, 5, 3, 8, 2, 64), NAN, device=DEVICE)
    problem.kv_cache = layers[:, :, 1]
    qkv = problem.qkv.clone()
    args = (problem.positions, problem.rope.cos_sin_cache, *problem.weights, EPS)
    triton_kernels.qk_norm_rope_write_kv(qkv, *args, problem.kv_cache, problem.slots, *problem.heads)
    assert layers[:, :, [0, 2]].isnan().all()
    cache = torch.full((2, 5, 8, 2, 64), NAN, device=DEVICE)
    fused_ops.qk_norm_rope_write_kv_torch(problem.qkv, *args, cache, problem.slots, *problem.heads)
    torch.testing.assert_close(layers[:, :, 1], cache, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("norm", [True, False])
def test_the_twin_does_what_the_layers_do(norm: bool) -> None:
    problem = Problem([7, 33, 8], norm=norm)
    query, _, cache = problem.run(fused_ops.qk_norm_rope_write_kv)
    heads = problem.qkv.view(3, 8, 64)
    cos, sin = problem.rope.gather(problem.positions)
    parts = []
    for part, weight in ((heads[:, :4], problem.weights[0]), (heads[:, 4:6], problem.weights[1])):
        if weight is not None:
            part = part / (part.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        parts.append(problem.rope(cos, sin, part))
    expected = torch.full((2, 5, 8, 2, 64), NAN, device=DEVICE)
    write_kv_cache(parts[1], heads[:, 6:], expected, problem.slots)
    torch.testing.assert_close(query, parts[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


# --- on the device, at models' sizes ---


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 33, 1000, 16384])
@pytest.mark.parametrize(("hidden_size", "inner", "num_heads"), [(1024, 3072, 16), (4096, 12288, 32)])
def test_model_shapes(hidden_size: int, inner: int, num_heads: int, num_tokens: int, pdl: bool) -> None:
    dtype = torch.bfloat16
    x, residual, weight = (randn(n, hidden_size, dtype=dtype) for n in (num_tokens, num_tokens, 1))
    twins = residual.clone()
    ours = fused_ops.rms_norm(x, weight[0], EPS, residual, pdl=pdl)
    assert_near(ours, fused_ops.rms_norm_torch(x, weight[0], EPS, twins), dtype)
    assert torch.equal(residual, twins)
    gate_up = randn(num_tokens, 2 * inner, dtype=dtype)
    assert_near(fused_ops.silu_and_mul(gate_up, pdl=pdl), fused_ops.silu_and_mul_torch(gate_up), dtype)
    for cache_dtype in (dtype, FP8):
        slots = torch.randperm(num_tokens + 100)[:num_tokens].tolist()
        problem = Problem(slots, num_heads, 8, 128, dtype, cache_dtype, True, 16, math.ceil((num_tokens + 100) / 16))
        query, _, cache = problem.run(fused_ops.qk_norm_rope_write_kv, pdl=pdl)
        expected_query, _, expected_cache = problem.run(fused_ops.qk_norm_rope_write_kv_torch)
        torch.testing.assert_close(query, expected_query, rtol=2**-6, atol=2**-4)
        if cache_dtype is FP8:
            assert_fp8_near(cache, expected_cache, 0.98, atol=2**-4)
        else:
            torch.testing.assert_close(cache, expected_cache, rtol=2**-6, atol=2**-4, equal_nan=True)
