"""Matrix products of a decode step with 17 to 512 rows, each fused with its neighbour; and products in one fixed tile.

vLLM has no such file: it calls cuBLAS. Between small_batch_linear.py, where reading the weights is all that counts,
and prefill, where arithmetic is, a decode step's products last 3 to 9 us each: what a kernel waits for before its first
multiplication is then a third of it. So on CUDA the kernels of triton_gemm.py start while the kernel before still runs
and have their weights brought into the L2 cache meanwhile, and each takes its neighbour in:

    norm -> linear (qkv) -> attention -> linear_norm (o, + residual, norm) -> gate_up (gate | up, SiLU-mul)
         -> linear_norm (down, + residual, next norm)

Elsewhere the `..._torch` twin beside each function runs: the same computation unfused, with the same roundings.

Whether that is faster than cuBLAS depends on the shape and is measured (MEASURED, `uses_batch_linear`). Results for
different M differ in the last bits, as those of cuBLAS do. `deterministic_linear` is for engines that promise the same
bits in any batch: it cuts every product alike, so that a row's sums are taken in one order whatever M is.

Legend: M rows, N outputs, K inputs, S splits of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from folovllm.model_executor.layers.fused_ops import rms_norm, rms_norm_torch
from folovllm.model_executor.layers.small_batch_linear import linear_torch, silu_mul_torch
from folovllm.utils.common import power_of_2_at_least

MIN_ROWS = 17
"""Below, small_batch_linear.py is faster."""
ROW_BUCKETS = (32, 64, 128, 256, 512)
"""A tile is chosen for the smallest of these that is at least M."""

Epilogue = Literal["none", "silu_mul", "norm"]
"""What follows the product: the functions `linear`, `gate_up` and `linear_norm`."""


@dataclass(frozen=True)
class GemmConfig:
    """How a product is cut into programs and steps; see the drawings in triton_gemm.py."""

    block_m: int
    """Rows of a tile; a power of two, at least 16."""
    block_n: int
    """Outputs of a tile; a gated product reads two weight rows for each. A power of two, at least 16."""
    block_k: int
    """Inputs of a step; a power of two, at least 16."""
    num_warps: int
    num_stages: int
    """Steps in shared memory at once."""
    swap: bool = False
    """Multiply W x^T instead of x W^T: the tensor core's 64-row side then runs along outputs, not along few rows."""
    splits: int = 1
    """Parts of K, each summed by programs of its own; more than one only in `linear_norm`, whose norm adds them."""
    prefetch: int = 0
    """Columns of each weight row brought into the L2 cache before the wait for the previous kernel (with `pdl`)."""
    tma: bool = False
    """Load tiles with Hopper's copy engine; needs rows of a multiple of 16 bytes, and is not done for others."""


MEASURED: dict[tuple[int, int, int, Epilogue], GemmConfig] = {
    # (row bucket, N, K, epilogue): the fastest tile on an H100 where a layer that uses it beats one with cuBLAS,
    # tests/benchmark/gemm_kernels.py (microseconds of both, with what follows the product)
    (32, 4096, 1024, "none"): GemmConfig(32, 64, 256, 4, 3, swap=True, prefetch=1024, tma=True),  # 4.6, cuBLAS 5.7
    (64, 4096, 1024, "none"): GemmConfig(64, 32, 256, 4, 3, prefetch=1024, tma=True),  # 4.5, cuBLAS 5.7
    (128, 4096, 1024, "none"): GemmConfig(128, 32, 128, 4, 4, prefetch=1024, tma=True),  # 5.7, cuBLAS 6.3
    (256, 4096, 1024, "none"): GemmConfig(128, 64, 64, 8, 5),  # 7.1, cuBLAS 6.5 to 7.2
    (32, 1024, 2048, "norm"): GemmConfig(32, 64, 128, 4, 4, swap=True, splits=4, prefetch=512),  # 4.3, cuBLAS 7.7
    (64, 1024, 2048, "norm"): GemmConfig(
        64, 64, 128, 4, 4, swap=True, splits=4, prefetch=512, tma=True
    ),  # 4.4, cuBLAS 7.8
    (128, 1024, 2048, "norm"): GemmConfig(64, 64, 64, 4, 5, splits=4, prefetch=512),  # 4.7, cuBLAS 8.1
    (256, 1024, 2048, "norm"): GemmConfig(64, 64, 64, 4, 5, splits=2, prefetch=1024),  # 5.6, cuBLAS 8.4
    (32, 3072, 1024, "silu_mul"): GemmConfig(32, 64, 64, 4, 6, swap=True),  # 6.9, cuBLAS 8.9
    (64, 3072, 1024, "silu_mul"): GemmConfig(64, 32, 128, 4, 4),  # 6.7, cuBLAS 9.1
    (128, 3072, 1024, "silu_mul"): GemmConfig(64, 32, 128, 4, 3, prefetch=1024, tma=True),  # 7.6, cuBLAS 9.6
    (256, 3072, 1024, "silu_mul"): GemmConfig(128, 64, 64, 8, 5),  # 10.0, cuBLAS 10.5
    (32, 1024, 3072, "norm"): GemmConfig(
        32, 64, 128, 4, 4, swap=True, splits=4, prefetch=768, tma=True
    ),  # 5.0, cuBLAS 8.6
    (64, 1024, 3072, "norm"): GemmConfig(
        64, 64, 128, 4, 4, swap=True, splits=4, prefetch=768, tma=True
    ),  # 5.1, cuBLAS 8.7
    (128, 1024, 3072, "norm"): GemmConfig(64, 64, 64, 4, 5, splits=4, prefetch=768),  # 5.8, cuBLAS 9.4
    (256, 1024, 3072, "norm"): GemmConfig(64, 64, 64, 4, 5, splits=2, prefetch=1024),  # 7.3, cuBLAS 9.7
    (32, 6144, 4096, "none"): GemmConfig(32, 64, 256, 4, 3, swap=True),  # 20.1, cuBLAS 22.1
    (32, 12288, 4096, "silu_mul"): GemmConfig(32, 32, 128, 4, 4, swap=True),  # 73.2, cuBLAS 76.8
    (64, 12288, 4096, "silu_mul"): GemmConfig(64, 32, 128, 4, 4),  # 74.6, cuBLAS 78.4
}

DETERMINISTIC = GemmConfig(64, 128, 64, 4, 4, tma=True)
DETERMINISTIC_FLOAT32 = GemmConfig(64, 64, 32, 4, 3)


def row_bucket(m: int) -> int | None:
    """Return the row bucket of M rows, or None: too few or too many."""
    if m < MIN_ROWS:
        return None
    return next((bucket for bucket in ROW_BUCKETS if m <= bucket), None)


def uses_batch_linear(m: int, n: int, k: int, epilogue: Epilogue) -> bool:
    """Return whether M rows, N outputs and K inputs, with what follows, were measured to be faster here than cuBLAS."""
    return (row_bucket(m), n, k, epilogue) in MEASURED


def default_config(m: int, n: int, k: int, epilogue: Epilogue) -> GemmConfig:
    """Return the tile for M rows, N outputs (of two weight rows each for silu_mul) and K inputs.

    Measured where the shape was; else tiles small enough that there are about as many programs as 132 SMs.
    """
    measured = MEASURED.get((row_bucket(m) or 0, n, k, epilogue))
    if measured is not None:
        return measured
    block_m = min(128, max(32, power_of_2_at_least(m)))
    block_n = 32 if epilogue == "silu_mul" or n <= 2048 else 64
    block_k = 128 if block_m <= 64 else 64
    splits = max(1, min(8, k // 512)) if epilogue == "norm" and n <= 2048 else 1
    return GemmConfig(block_m, block_n, block_k, 4, 4, swap=block_m < 64, splits=splits, prefetch=min(1024, k))


def gate_up_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `gate_up`."""
    return silu_mul_torch(F.linear(x, weight, bias))


def linear_norm_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The twin of `linear_norm`."""
    return rms_norm_torch(F.linear(x, weight, bias), norm_weight, eps, residual)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight^T + bias, rounded, then + residual where given: [M, N] in x's dtype.

    Args:
        x: [M, K], contiguous, of weight's dtype.
        weight: [N, K], contiguous. bias: [N].
        residual: [M, N], contiguous; only read.
        out: [M, N], contiguous, where the result goes, or None for a new tensor; it may be `residual`.
        pdl: start early; see small_batch_linear.py, also for what must not write weights.
        config: tiles, with one split; None: default_config.
    """
    if not runs_on_triton(x):
        result = linear_torch(x, weight, bias, residual)
        return result if out is None else out.copy_(result)
    tile = config or default_config(x.shape[0], weight.shape[0], x.shape[1], "none")
    return _launch(x, weight, bias, residual, out, tile, gated=False, pdl=pdl)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up, [M, N], for gate | up = x @ weight^T + bias and weight [2 N, K]; see `linear`.

    Gate, up, silu(gate) and the product are each rounded to x's dtype, as separate kernels would.
    """
    if not runs_on_triton(x):
        return gate_up_torch(x, weight, bias)
    tile = config or default_config(x.shape[0], weight.shape[0] // 2, x.shape[1], "silu_mul")
    return _launch(x, weight, bias, None, None, tile, gated=True, pdl=pdl)


def linear_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    *,
    pdl: bool = False,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return fused_ops.rms_norm(linear(x, weight, bias), norm_weight, eps, residual), [M, N].

    Two kernels, as unfused; but where the product is cut along K, the norm is what adds the parts, in their order:
    no kernel of its own for that, no atomics, and the same bits every time.

    Args:
        x: [M, K]. weight: [N, K]. bias: [N] or None. All as in `linear`.
        residual: [M, N], contiguous; overwritten with its sum with the product, rounded.
        norm_weight: [N].
        eps: added to the mean square.
        pdl: see `linear`.
        config: tiles; None: default_config.
    """
    if not runs_on_triton(x):
        return linear_norm_torch(x, weight, bias, residual, norm_weight, eps)
    (m, k), n = x.shape, weight.shape[0]
    tile = config or default_config(m, n, k, "norm")
    if tile.splits == 1:
        return rms_norm(linear(x, weight, bias, pdl=pdl, config=tile), norm_weight, eps, residual, pdl=pdl)
    from folovllm.model_executor.layers.triton_gemm import sum_norm_kernel

    assert residual.is_contiguous() and residual.shape == (m, n), residual.shape
    parts = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, None, parts, tile, gated=False, pdl=pdl)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block = power_of_2_at_least(n)
    options = {"launch_pdl": True} if pdl else {}
    sum_norm_kernel[(m,)](
        parts,
        bias,
        residual,
        norm_weight,
        out,
        eps,
        m,
        N=n,
        SPLITS=tile.splits,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(8, max(1, block // 128)),  # 16 bytes a thread and load
        **options,
    )
    return out


def deterministic_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight^T + bias, [M, N], where on CUDA a row's bits depend on that row and the weight alone.

    One tile for every M, from a single row to prefill: the same instructions add the same products in the same order.
    float32 is multiplied as such, never as TF32. Off CUDA the twin, F.linear, promises no more than its library does.

    Args:
        x: [M, K], contiguous, M >= 0; bfloat16, float16 or float32. weight: [N, K], contiguous. bias: [N].
        out: [M, N], contiguous, where the result goes, or None for a new tensor.
        pdl: see `linear`.
        config: tiles, for measurements; it must not depend on M.
    """
    if not takes_deterministic(x):
        result = F.linear(x, weight, bias)
        return result if out is None else out.copy_(result)
    tile = config or (DETERMINISTIC_FLOAT32 if x.dtype == torch.float32 else DETERMINISTIC)
    return _launch(x, weight, bias, None, out, tile, gated=False, pdl=pdl)


def runs_on_triton(x: torch.Tensor) -> bool:
    """Return whether the kernels take x [M, K]: on CUDA, at least a row, a 16-bit dtype."""
    return x.is_cuda and x.shape[0] > 0 and x.dtype in (torch.bfloat16, torch.float16)


def takes_deterministic(x: torch.Tensor) -> bool:
    """Return whether `deterministic_linear` runs its kernel for x [M, K]: on CUDA, a row or more, at most 32 bits."""
    return x.is_cuda and x.shape[0] > 0 and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor | None,
    tile: GemmConfig,
    *,
    gated: bool,
    pdl: bool,
) -> torch.Tensor:
    """Run the kernel; `out` is [M, N] or, with several splits, [S, M, N] in float32. Return it."""
    from folovllm.model_executor.layers.triton_gemm import gemm_kernel

    m, k = x.shape
    assert weight.shape[1] == k and x.is_contiguous() and weight.is_contiguous(), (x.shape, weight.shape)
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    assert out.is_contiguous() and out.dim() == (2 if tile.splits == 1 else 3), (out.shape, tile)
    programs = -(-m // tile.block_m) * -(-n // tile.block_n)
    options = {"launch_pdl": True} if pdl else {}
    descriptors: tuple[Any, Any] = (None, None)
    if tile.tma and k * x.element_size() % 16 == 0:
        from triton.tools.tensor_descriptor import TensorDescriptor

        descriptors = (
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        )
    gemm_kernel[(programs, tile.splits)](
        x,
        weight,
        bias,
        addend,
        out,
        *descriptors,
        m,
        N=n,
        K=k,
        GATED=gated,
        SWAP=tile.swap,
        SPLITS=tile.splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PREFETCH=tile.prefetch if pdl else 0,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    return out
