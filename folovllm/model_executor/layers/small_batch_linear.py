"""Matrix products of a decode step with at most 16 rows, each fused with its neighbours: a layer becomes four products.

vLLM has no such file: it calls cuBLAS and leaves fusion to torch.compile. Here a decoder layer at M <= 16 rows is

    norm_linear (norm, qkv) -> attention -> linear (o_proj, + residual) -> norm_gate_up (norm, gate | up, SiLU-mul)
        -> linear (down, + residual)

so that the residual stream is one tensor, and no norm, sum or activation is a kernel of its own. On CUDA the kernels
of triton_gemv.py run, which explains them; elsewhere, and above 16 rows, the `..._torch` twin beside each function
does: the same computation unfused, with the same roundings.

With `pdl` a kernel starts while the one before it still runs, and waits before it reads any of its results
(Hopper and later; within CUDA graphs too). It never waits before reading a *weight*: those must not be written by a
kernel of the same stream that itself was launched with PDL.

Results of M = 1 and M > 1 differ in the last bits (two kernels), as do those of cuBLAS for other batch sizes: an engine
that promises the same bits in any batch must not call this module.

Legend: M rows, N outputs, K inputs, P programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from folovllm.utils.common import power_of_2_at_least

MAX_ROWS = 16
"""Rows of one tensor-core tile: more would be padded to 32, and cuBLAS is good there."""


@dataclass(frozen=True)
class SmallBatchConfig:
    """How a product is cut into programs and steps; see the drawings in triton_gemv.py. All are powers of two, but
    row_tiles and prefetch."""

    block_n: int
    """Outputs of a row tile; a gated product reads two weight rows for each."""
    block_k: int
    """Inputs of a step."""
    num_warps: int
    row_tiles: int = 1
    """Row tiles that one program computes one after another, normalising its input once."""
    prefetch: int = 4
    """Steps loaded ahead; capped at the program's number of steps."""
    split: int = 4
    """M > 1 only: parts of block_k multiplied side by side, best one per warp; at least 16 inputs each."""


MEASURED_GEMV: dict[tuple[int, int, bool], SmallBatchConfig] = {
    # (N, K, gated): the fastest tile of one row on an H100, tests/benchmark/gemv_kernels.py
    (4096, 1024, False): SmallBatchConfig(16, 1024, 8, prefetch=1),
    (1024, 2048, False): SmallBatchConfig(8, 256, 8, prefetch=8),
    (3072, 1024, True): SmallBatchConfig(4, 1024, 8, row_tiles=2, prefetch=2),
    (1024, 3072, False): SmallBatchConfig(4, 1024, 8, prefetch=3),
    (151936, 1024, False): SmallBatchConfig(16, 1024, 8, prefetch=1),
    (6144, 4096, False): SmallBatchConfig(4, 1024, 4, row_tiles=2, prefetch=4),
    (4096, 4096, False): SmallBatchConfig(4, 1024, 4, row_tiles=2, prefetch=4),
    (12288, 4096, True): SmallBatchConfig(2, 2048, 4, prefetch=2),
    (4096, 12288, False): SmallBatchConfig(4, 1024, 4, prefetch=6),
    (151936, 4096, False): SmallBatchConfig(4, 1024, 4, row_tiles=4, prefetch=4),
}


def default_config(m: int, n: int, k: int, gated: bool) -> SmallBatchConfig:
    """Return the tile for M rows, N outputs (of two weight rows each where gated) and K inputs.

    Measured where the shape was; else the aim is about 32 KB of weights in flight per SM at once, and a number of
    programs that fills 132 SMs evenly.
    """
    rows_per_output = 2 if gated else 1
    if m == 1:
        if (n, k, gated) in MEASURED_GEMV:
            return MEASURED_GEMV[n, k, gated]
        block_k = min(1024, power_of_2_at_least(k))
        block_n = 4 // rows_per_output
        return SmallBatchConfig(block_n, block_k, 4, row_tiles=4 if n > 100_000 else 1)
    if k > 2048:
        if n <= 2048 and k <= 4096:
            return SmallBatchConfig(8 // rows_per_output, 1024, 8, prefetch=3, split=8)
        return SmallBatchConfig(16 // rows_per_output, 512, 8, prefetch=4, split=8)
    block_k = min(1024, max(64, power_of_2_at_least(k)))
    block_n = (8 if n * rows_per_output <= 2048 else 16) // rows_per_output
    return SmallBatchConfig(block_n, block_k, 4, prefetch=3 if block_n * rows_per_output == 8 else 2)


def linear_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of `linear`."""
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def norm_linear_torch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `norm_linear`."""
    hidden = x if residual is None else x + residual
    return F.linear(F.rms_norm(hidden, norm_weight.shape, norm_weight, eps), weight, bias), hidden


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [M, N], for gate | up [M, 2 N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def greedy_ids_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The twin of `greedy_ids`."""
    return F.linear(x, weight).argmax(dim=-1)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    config: SmallBatchConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight^T + bias, rounded, then + residual where given: [M, N] in x's dtype.

    Args:
        x: [M, K], contiguous, of weight's dtype.
        weight: [N, K], contiguous. bias: [N].
        residual: [M, N], contiguous; only read.
        out: [M, N], contiguous, where the result goes, or None for a new tensor.
        pdl: start early; see the module.
        config: tiles; None: default_config.
    """
    if not runs_on_triton(x):
        result = linear_torch(x, weight, bias, residual)
        return result if out is None else out.copy_(result)
    return _launch(x, None, None, 0.0, weight, bias, residual, gated=False, pdl=pdl, config=config, out=out)[0]


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: SmallBatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(h) @ weight^T + bias [M, N], h [M, K]) for h = x + residual; h is x itself without a residual.

    Unlike RMSNorm.forward, the sum goes to a new tensor: programs still read the old residual while it is written.
    Other arguments: see `linear`.
    """
    if not runs_on_triton(x):
        return norm_linear_torch(x, residual, norm_weight, eps, weight, bias)
    return _launch(x, residual, norm_weight, eps, weight, bias, None, gated=False, pdl=pdl, config=config)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: SmallBatchConfig | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up, [M, N], for gate | up = x @ weight^T + bias and weight [2 N, K]; see `linear`."""
    if not runs_on_triton(x):
        return silu_mul_torch(F.linear(x, weight, bias))
    return _launch(x, None, None, 0.0, weight, bias, None, gated=True, pdl=pdl, config=config)[0]


def norm_gate_up(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: SmallBatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (silu(gate) * up [M, N], h [M, K]): `norm_linear` with the epilogue of `gate_up`."""
    if not runs_on_triton(x):
        out, hidden = norm_linear_torch(x, residual, norm_weight, eps, weight, bias)
        return silu_mul_torch(out), hidden
    return _launch(x, residual, norm_weight, eps, weight, bias, None, gated=True, pdl=pdl, config=config)


def greedy_ids(
    x: torch.Tensor, weight: torch.Tensor, *, pdl: bool = False, config: SmallBatchConfig | None = None
) -> torch.Tensor:
    """Return the column of each row's largest logit in x @ weight^T, [M] int64, the lowest column among equals.

    Logits are rounded to x's dtype before they are compared, as if they had been stored; they are not.
    """
    if not runs_on_triton(x):
        return greedy_ids_torch(x, weight)
    from folovllm.model_executor.layers.triton_gemv import argmax_partials_kernel

    values, ids = _launch(x, None, None, 0.0, weight, None, None, gated=False, argmax=True, pdl=pdl, config=config)
    out = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    num_programs = values.shape[1]
    block = power_of_2_at_least(num_programs)
    argmax_partials_kernel[(x.shape[0],)](
        values, ids, out, num_programs, block, pdl, num_warps=8, **({"launch_pdl": True} if pdl else {})
    )
    return out


def runs_on_triton(x: torch.Tensor) -> bool:
    """Return whether the kernels take x [M, K]: on CUDA, 1 to MAX_ROWS rows, a 16-bit dtype."""
    return x.is_cuda and 1 <= x.shape[0] <= MAX_ROWS and x.dtype in (torch.bfloat16, torch.float16)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    *,
    gated: bool,
    pdl: bool,
    config: SmallBatchConfig | None,
    argmax: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel for M rows; return (out, new residual or x), or with argmax (values, ids), both [M, P]."""
    from folovllm.model_executor.layers.triton_gemv import gemv_kernel, small_batch_kernel

    m, k = x.shape
    assert weight.shape[1] == k and x.is_contiguous() and weight.is_contiguous(), (x.shape, weight.shape)
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    tile = config or default_config(m, n, k, gated)
    num_programs = -(-n // (tile.block_n * tile.row_tiles))
    if argmax:
        out = torch.empty(m, num_programs, dtype=torch.float32, device=x.device)
        extra = torch.empty(m, num_programs, dtype=torch.int32, device=x.device)
    else:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
        extra = x if residual is None else torch.empty_like(x)
    steps = tile.row_tiles * -(-k // tile.block_k)
    pointers = (x, residual, norm_weight, weight, bias, addend, out, extra)
    options = {
        "N": n,
        "K": k,
        "NORM": norm_weight is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_BIAS": bias is not None,
        "HAS_ADD": addend is not None,
        "GATED": gated,
        "ARGMAX": argmax,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "ROW_TILES": tile.row_tiles,
        "PREFETCH": min(tile.prefetch, steps),
        "PDL": pdl,
        "num_warps": tile.num_warps,
    }
    if pdl:
        options["launch_pdl"] = True
    if m == 1:
        gemv_kernel[(num_programs,)](*pointers, eps, **options)
    else:
        small_batch_kernel[(num_programs,)](*pointers, eps, m, SPLIT=tile.split, **options)
    return out, extra
