"""Triton kernels for the matrix products of a decode step with few rows: read every weight once, wait for nothing else.

vLLM leaves these products to cuBLAS and fuses their neighbours with torch.compile; no file of its mirrors this one.

A product with M <= 16 rows does so little arithmetic that its time is the time to read the weight [N, K]: 8 MB in
2.8 us on an H100. What costs more than that is waiting: for the kernel to start, for memory to answer (0.6 us), for the
norm before it. So each program owns BLOCK_N rows of the weight, whole, and takes its steps in this order:

    1. load   issue the loads of its weight tile      weights depend on no other kernel: they may start early
    2. signal let the next kernel's programs start     they do their own step 1 while we do 3 to 5
    3. wait   until the previous kernel has finished   (2 and 3: programmatic dependent launch, "PDL")
    4. norm   read x, add the residual, normalise      every program for itself: x is 2 to 8 KB and sits in the L2 cache
    5. sum    x . weight rows, and the epilogue: bias, residual, SiLU-mul or argmax

            kernel i     |load....|signal|wait|norm|sum|store|
            kernel i + 1                 |load............|wait|norm|sum|store|
            DRAM         =========================================================  never idle

Without PDL step 1 of kernel i + 1 would begin after the last store of kernel i, some 2 us of silence per kernel.
`gdc_wait` returns once the previous kernel has ended and its writes are visible. As every program of every kernel here
waits, and waits before its first write, the end of a kernel implies the end of all before it: a program may read what
any earlier kernel wrote and write over what any earlier kernel read.

The weight tile lives in registers (an SM has 256 KB of them), cut into steps of [BLOCK_N, BLOCK_K]:

          K ->  BLOCK_K   BLOCK_K   BLOCK_K
        rows  | step 0  | step 1  | step 2  |   row tile 0        PREFETCH = 4: steps 0 to 3 are loaded before the
        rows  | step 3  | step 4  | step 5  |   row tile 1        wait; step s + 4 is issued before step s is summed

Legend: M rows of x, N outputs, K inputs; GATED weights have 2 N rows, first the gates, then the ups.
"""

# ruff: noqa: RUF005  (triton compiles a + (b,), but not (*a, b))

from __future__ import annotations

import triton
import triton.language as tl

from folovllm.utils.triton_launch import fast_launch

PADDED_ROWS = tl.constexpr(16)  # rows of x in one tensor-core tile


@triton.jit  # type: ignore[untyped-decorator]
def _weight_rows(
    program: tl.tensor,
    row_tile: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GATED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the outputs and the offsets of the weight rows of one row tile.

    A gated tile alternates gate and up rows, so that the two sums of one output end side by side:
    output n needs weight rows n and N + n.
    """
    first = (program * ROW_TILES + row_tile) * BLOCK_N
    if GATED:
        row = tl.arange(0, 2 * BLOCK_N)
        output = first + row // 2
        weight_row = output + (row % 2) * N
    else:
        output = first + tl.arange(0, BLOCK_N)
        weight_row = output
    return output, weight_row.to(tl.int64) * K


@triton.jit  # type: ignore[untyped-decorator]
def _load_step(
    weight_ptr: tl.tensor,
    program: tl.tensor,
    step: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GATED: tl.constexpr,
) -> tl.tensor:
    """Return step `step` of a program's weights, [BLOCK_N (twice if gated), BLOCK_K]; zeros outside the weight."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    output, row_offset = _weight_rows(program, step // CHUNKS, N, K, BLOCK_N, ROW_TILES, GATED)
    col = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    ptrs = weight_ptr + row_offset[:, None] + col[None, :]
    # evict_first: every weight is read once per step, so it must not push x out of the L1 cache.
    if N % (BLOCK_N * ROW_TILES) == 0 and K % BLOCK_K == 0:
        return tl.load(ptrs, eviction_policy="evict_first")
    mask = (output < N)[:, None] & (col < K)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit  # type: ignore[untyped-decorator]
def _finish_product(
    total: tl.tensor,
    offsets: tl.tensor,
    output: tl.tensor,
    mask: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
) -> tl.tensor:
    """Return float32 sums plus bias, rounded to dtype; then plus the residual, rounded again, as two kernels would."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    value = total.to(dtype)
    if HAS_ADD:
        value = (value.to(tl.float32) + tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(gate: tl.tensor, up: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return silu(gate) * up, each factor and the product rounded to dtype, as separate kernels would."""
    gate = gate.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up.to(tl.float32)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _load_rows(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    dtype: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> tl.tensor:
    """Return a tile of x, plus the residual where there is one, rounded to dtype."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    return x


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def gemv_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    extra_ptr: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    GATED: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row: out [N] = norm(x [K] + residual [K]) . weight rows, on the ordinary floating-point units.

    Program p computes outputs [p, p + 1) * BLOCK_N * ROW_TILES. `extra_ptr` takes x + residual [K] (program 0 writes
    it, to a buffer of its own: the others are still reading x and the residual) or, with ARGMAX, the id of the
    program's largest output, whose value goes to out_ptr [programs] in float32.
    """
    program = tl.program_id(0)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = ROW_TILES * CHUNKS
    TILE_N: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    # 1. Load: a tuple of register tiles, one per step. static_range unrolls, so the tuple exists only for the compiler.
    tiles: tl.tuple = ()
    for step in tl.static_range(PREFETCH):
        tiles = tiles + (_load_step(weight_ptr, program, step, N, K, BLOCK_N, BLOCK_K, ROW_TILES, GATED),)
    gammas: tl.tuple = ()
    if NORM:
        for chunk in tl.static_range(CHUNKS):
            col = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
            gammas = gammas + (tl.load(norm_weight_ptr + col, mask=col < K, other=0.0),)
    # 2. Signal, 3. wait.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # 4. Norm.
    xs: tl.tuple = ()
    square_sum = tl.zeros((BLOCK_K,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        col = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, residual_ptr, col, col < K, dtype, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(extra_ptr + col, x, mask=(col < K) & (program == 0))
        square_sum += x.to(tl.float32) * x.to(tl.float32)
        xs = xs + (x,)
    scale = tl.rsqrt(tl.sum(square_sum, axis=0) / K + eps) if NORM else 1.0
    # 5. Sum.
    best = float("-inf")
    best_id = 0
    for step in tl.static_range(STEPS):
        if step + PREFETCH < STEPS:
            tile = _load_step(weight_ptr, program, step + PREFETCH, N, K, BLOCK_N, BLOCK_K, ROW_TILES, GATED)
            tiles = tiles + (tile,)
        x = xs[step % CHUNKS].to(tl.float32)
        if NORM:
            x = (x * scale * gammas[step % CHUNKS].to(tl.float32)).to(dtype).to(tl.float32)
        if step % CHUNKS == 0:
            partial = tl.zeros((TILE_N, BLOCK_K), tl.float32)
        partial += tiles[step].to(tl.float32) * x[None, :]
        if step % CHUNKS == CHUNKS - 1:
            output, _ = _weight_rows(program, step // CHUNKS, N, K, BLOCK_N, ROW_TILES, GATED)
            total = tl.sum(partial, axis=1)
            bias_row = output
            if GATED:
                bias_row = output + (tl.arange(0, TILE_N) % 2) * N
            value = _finish_product(total, output, bias_row, output < N, bias_ptr, add_ptr, dtype, HAS_BIAS, HAS_ADD)
            if ARGMAX:
                candidates = tl.where(output < N, value.to(tl.float32), float("-inf"))
                value, index = tl.max(candidates, axis=0, return_indices=True)
                best_id = tl.where(value > best, (program * ROW_TILES + step // CHUNKS) * BLOCK_N + index, best_id)
                best = tl.maximum(value, best)
            elif GATED:
                gate, up = tl.split(tl.reshape(value, (BLOCK_N, 2)))
                first = (program * ROW_TILES + step // CHUNKS) * BLOCK_N
                output = first + tl.arange(0, BLOCK_N)
                tl.store(out_ptr + output, _silu_mul(gate, up, dtype), mask=output < N)
            else:
                tl.store(out_ptr + output, value, mask=output < N)
    if ARGMAX:
        tl.store(out_ptr + program, best)
        tl.store(extra_ptr + program, best_id)


@fast_launch
@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def small_batch_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    extra_ptr: tl.tensor,
    eps: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    GATED: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PREFETCH: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Up to 16 rows: out [M, N] = norm(x [M, K] + residual) . weight rows, on the tensor cores; see gemv_kernel.

    Sixteen rows are one tensor-core tile however few of them are real, and a product of 16 x BLOCK_N is too small for
    several warps. So the SPLIT parts of a step's BLOCK_K columns are a batch of products, one per warp, added at the
    end in a fixed order: a split of K inside the program, without atomics or a second kernel.

        x [16, BLOCK_K] = | part 0 | part 1 | ...      sums [SPLIT, 16, BLOCK_N] -> their sum [16, BLOCK_N]
    """
    program = tl.program_id(0)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = ROW_TILES * CHUNKS
    PART: tl.constexpr = BLOCK_K // SPLIT
    TILE_N: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    tiles: tl.tuple = ()
    for step in tl.static_range(PREFETCH):
        tiles = tiles + (_load_step(weight_ptr, program, step, N, K, BLOCK_N, BLOCK_K, ROW_TILES, GATED),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, PADDED_ROWS)
    col_in_step = tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]  # [SPLIT, 1, PART]
    row_offset = row[None, :, None] * K
    real_row = (row < M)[None, :, None]
    # Too many rows to keep in registers: once for the sum of squares, then again (from the cache) for the product.
    scale = tl.zeros((PADDED_ROWS,), tl.float32)
    if NORM:
        squares = tl.zeros((SPLIT, PADDED_ROWS, PART), tl.float32)
        for chunk in range(
            CHUNKS
        ):  # a real loop: unrolled, the compiler would keep all chunks for the product, and spill
            col = chunk * BLOCK_K + col_in_step
            mask = real_row & (col < K)
            x = _load_rows(x_ptr, residual_ptr, row_offset + col, mask, dtype, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(extra_ptr + row_offset + col, x, mask=mask & (program == 0))
            squares += x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=0) / K + eps)
    best = tl.full((PADDED_ROWS,), float("-inf"), tl.float32)
    best_id = tl.zeros((PADDED_ROWS,), tl.int32)
    for step in tl.static_range(STEPS):
        if step + PREFETCH < STEPS:
            tile = _load_step(weight_ptr, program, step + PREFETCH, N, K, BLOCK_N, BLOCK_K, ROW_TILES, GATED)
            tiles = tiles + (tile,)
        col = (step % CHUNKS) * BLOCK_K + col_in_step
        x = _load_rows(x_ptr, residual_ptr, row_offset + col, real_row & (col < K), dtype, HAS_RESIDUAL)
        if NORM:
            gamma = tl.load(norm_weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * scale[None, :, None] * gamma).to(dtype)
        parts = tl.permute(tl.reshape(tiles[step], (TILE_N, SPLIT, PART)), (1, 2, 0))  # [SPLIT, PART, TILE_N]
        if step % CHUNKS == 0:
            sums = tl.zeros((SPLIT, PADDED_ROWS, TILE_N), tl.float32)
        sums = tl.dot(x, parts, sums)
        if step % CHUNKS == CHUNKS - 1:
            output, _ = _weight_rows(program, step // CHUNKS, N, K, BLOCK_N, ROW_TILES, GATED)
            bias_row = output
            if GATED:
                bias_row = output + (tl.arange(0, TILE_N) % 2) * N
            first = (program * ROW_TILES + step // CHUNKS) * BLOCK_N
            mask = (row < M)[:, None] & (output < N)[None, :]
            value = _finish_product(
                tl.sum(sums, axis=0),
                row[:, None] * N + output[None, :],
                tl.broadcast_to(bias_row[None, :], (PADDED_ROWS, TILE_N)),
                mask,
                bias_ptr,
                add_ptr,
                dtype,
                HAS_BIAS,
                HAS_ADD,
            )
            if ARGMAX:
                candidates = tl.where((output < N)[None, :], value.to(tl.float32), float("-inf"))
                value, index = tl.max(candidates, axis=1, return_indices=True)
                best_id = tl.where(value > best, first + index, best_id)
                best = tl.maximum(value, best)
            elif GATED:
                gate, up = tl.split(tl.reshape(value, (PADDED_ROWS, BLOCK_N, 2)))
                output = first + tl.arange(0, BLOCK_N)
                mask = (row < M)[:, None] & (output < N)[None, :]
                tl.store(out_ptr + row[:, None] * N + output[None, :], _silu_mul(gate, up, dtype), mask=mask)
            else:
                tl.store(out_ptr + row[:, None] * N + output[None, :], value, mask=mask)
    if ARGMAX:
        partial = row * tl.num_programs(0) + program
        tl.store(out_ptr + partial, best, mask=row < M)
        tl.store(extra_ptr + partial, best_id, mask=row < M)


@triton.jit  # type: ignore[untyped-decorator]
def argmax_partials_kernel(
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    out_ptr: tl.tensor,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """out [M] = the id of each row's largest of P partial maxima [M, P]; the lowest id among equals."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    col = tl.arange(0, BLOCK_P)
    values = tl.load(value_ptr + row * P + col, mask=col < P, other=float("-inf"))
    _, best = tl.max(values, axis=0, return_indices=True)
    tl.store(out_ptr + row, tl.load(id_ptr + row * P + best).to(tl.int64))
