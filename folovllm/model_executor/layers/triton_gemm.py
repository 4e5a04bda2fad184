"""Triton kernels for products of dozens to hundreds of rows: tiles on the tensor cores, weights on their way early.

vLLM leaves these products to cuBLAS; no file of its mirrors this one. out [M, N] = x [M, K] . weight [N, K]^T is cut
into tiles, a program each, that walk along K in steps of BLOCK_K:

                     K ->                                N ->  BLOCK_N
         x     | step | step | step | ...        out   |       |       |        a program: one tile of out,
       BLOCK_M |======|======|======|          BLOCK_M |       |#######|        = its x rows . its weight rows,
               |      |      |      |                  |       |       |        num_stages steps in shared memory

Both operands have K as their contiguous side, which is what wgmma, the Hopper tensor core's instruction, wants of both:
nothing is transposed. One operand must have a multiple of 64 rows. With 32 rows of x that side had better run along
outputs, of which there are plenty: SWAP computes the tile of out^T = weight . x^T, and turns it before it is stored.

What a short product waits for, and what is done about it:

    1. prefetch  ask for the weight tile in the L2 cache     no registers, no waiting: DRAM works from here on
    2. signal    let the next kernel's programs start        they do their own step 1 while we do 3 to 5
    3. wait      until the previous kernel has finished      x is its result; the weights are nobody's
    4. multiply  the pipelined loop over K
    5. finish    bias, residual or SiLU-mul on the float32 sums, and store

            kernel i     |prefetch|signal|wait|multiply..........|finish|
            kernel i + 1                 |prefetch|signal|......... wait|multiply....   (1 to 3 with PDL alone)

Few outputs make few tiles: N = 1024 has 16 for 132 SMs. Then K is cut, too: SPLITS programs share a tile, each stores
its float32 sums of a part of K, and the norm that follows every such product (sum_norm_kernel) reads them all and adds
them in order.

triton_gemv.py explains programmatic dependent launch (PDL), and why a program may overwrite what an earlier one reads.

Legend: M rows of x, N outputs, K inputs; GATED weights have 2 N rows, first the gates, then the ups.
"""

# ruff: noqa: RUF005  (triton compiles a + (b,), but not (*a, b))

from __future__ import annotations

import triton
import triton.language as tl

from folovllm.model_executor.layers.triton_gemv import _silu_mul
from folovllm.utils.triton_launch import fast_launch

GROUP = tl.constexpr(8)  # tiles of rows whose programs are neighbours
# Bytes of a weight row apart that are asked for in the L2 cache: its line, if an access to a part brings it all.
PREFETCH_LINE = tl.constexpr(128)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(program: tl.tensor, M: tl.tensor, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Return a program's tile along M and along N.

    Neighbours share weight rows: these come from DRAM once, and x stays in the L2 cache. Beyond GROUP tiles of rows
    x may be too large for that, so these walk along N together before the next GROUP starts.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP * tiles_n) * GROUP
    group_m = tl.minimum(tiles_m - first_m, GROUP)
    place = program % (GROUP * tiles_n)
    return first_m + place % group_m, place // group_m


@triton.jit  # type: ignore[untyped-decorator]
def prefetch_rows(row_ptrs: tl.tensor, COLUMNS: tl.constexpr, LINE: tl.constexpr) -> None:
    """Ask for the first COLUMNS of each 16-bit row [BLOCK_N] in the L2 cache, a lane for each LINE bytes."""
    CHUNK: tl.constexpr = LINE // 2
    CHUNKS: tl.constexpr = COLUMNS // CHUNK
    WIDTH: tl.constexpr = min(16, CHUNKS & -CHUNKS)  # chunks at a time: a power of two that divides their number
    for start in tl.static_range(0, CHUNKS, WIDTH):
        ptrs = row_ptrs[:, None] + ((start + tl.arange(0, WIDTH)) * CHUNK)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [ptrs.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _load_step(
    row_ptrs: tl.tensor,
    desc: tl.tensor_descriptor,
    first_row: tl.tensor,
    first_col: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Return BLOCK_K columns of the rows, zeros from column K on; through the copy engine where there is a `desc`."""
    col = first_col + tl.arange(0, BLOCK_K)
    ptrs = row_ptrs[:, None] + col[None, :]
    if desc is not None:
        tile = desc.load([first_row, first_col])
    elif MASKED:
        tile = tl.load(ptrs, mask=(col < K)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(x: tl.tensor, weight: tl.tensor, sums: tl.tensor, SWAP: tl.constexpr) -> tl.tensor:
    """Return sums + x . weight^T, or its transpose; "ieee": float32 is never rounded to TF32."""
    if SWAP:
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    else:
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _biased(
    sums: tl.tensor, bias_ptr: tl.tensor, output: tl.tensor, last: tl.constexpr, SWAP: tl.constexpr
) -> tl.tensor:
    """Return the sums as [rows, outputs], plus the bias where there is one."""
    if SWAP:
        sums = tl.trans(sums)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + tl.minimum(output, last)).to(tl.float32)[None, :]
    return sums


@fast_launch
@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def gemm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_desc: tl.tensor_descriptor,
    weight_desc: tl.tensor_descriptor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One tile of out [M, N], or of one split's sums in out [SPLITS, M, N] float32; program_id(1) is the split.

    Rows and outputs beyond M and N are computed from real ones, so that loads need no masks, and not stored. From
    different ones: a hundred rows that all read the last real one would queue at one place of the L2 cache, and the
    product would take four times as long.
    With descriptors of x and the weight, Hopper's copy engine (TMA) loads their tiles: one thread asks for a whole one.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K  # inputs of a split
    MASKED: tl.constexpr = PART * SPLITS != K
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    first = tl.program_id(1) * PART
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + (row % M).to(tl.int64) * K
    weight_rows = weight_ptr + tl.minimum(output, N - 1).to(tl.int64) * K
    # 1. Prefetch, by one of the programs that share the weight rows. 2. Signal. 3. Wait.
    COLUMNS: tl.constexpr = min(PREFETCH, PART) // 64 * 64
    if COLUMNS > 0 and not MASKED:  # noqa: SIM102  (this condition is the compiler's, the next the program's)
        if tile_m == 0:
            prefetch_rows(weight_rows + first, COLUMNS, PREFETCH_LINE)
            if GATED:
                prefetch_rows(weight_rows + N * K + first, COLUMNS, PREFETCH_LINE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # 4. Multiply.
    sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    up_sums = sums
    for start in range(0, PART, BLOCK_K):
        col = first + start
        x = _load_step(x_rows, x_desc, tile_m * BLOCK_M, col, K, BLOCK_K, MASKED)
        weight = _load_step(weight_rows, weight_desc, tile_n * BLOCK_N, col, K, BLOCK_K, MASKED)
        sums = _multiply(x, weight, sums, SWAP)
        if GATED:
            up = _load_step(weight_rows + N * K, weight_desc, N + tile_n * BLOCK_N, col, K, BLOCK_K, MASKED)
            up_sums = _multiply(x, up, up_sums, SWAP)
    # 5. Finish.
    value = _biased(sums, bias_ptr, output, N - 1, SWAP)
    offsets = row.to(tl.int64)[:, None] * N + output[None, :]
    mask = (row < M)[:, None] & (output < N)[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, value, mask=mask)
    else:
        value = value.to(dtype)
        if GATED:
            up_value = _biased(up_sums, bias_ptr, N + output, 2 * N - 1, SWAP).to(dtype)
            value = _silu_mul(value, up_value, dtype)
        if add_ptr is not None:
            addend = tl.load(add_ptr + offsets, mask=mask, other=0.0)
            value = (value.to(tl.float32) + addend.to(tl.float32)).to(dtype)
        tl.store(out_ptr + offsets, value, mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def sum_norm_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row: the product is the sum of parts [SPLITS, M, N]; residual += product; out = norm(residual)."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < N
    gamma = tl.load(norm_weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    residual = tl.load(residual_ptr + row * N + col, mask=mask, other=0.0)
    parts: tl.tuple = ()  # all loads first, so that they wait for memory together
    for split in tl.static_range(SPLITS):
        parts = parts + (tl.load(parts_ptr + (split * M + row) * N + col, mask=mask, other=0.0),)
    for split in tl.static_range(SPLITS):
        total += parts[split]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    hidden = (total.to(dtype).to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(residual_ptr + row * N + col, hidden, mask=mask)
    wide = hidden.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / N + eps)
    tl.store(out_ptr + row * N + col, (wide * scale * gamma).to(dtype), mask=mask)
