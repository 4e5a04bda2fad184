"""Triton kernels that multiply with GPTQ weights as they are, 4 or 8 bits wide: dequantized in registers only.

vLLM calls Marlin and Machete (CUDA and CUTLASS) for this; no file of its mirrors this one.

    w[n, k] = scale[group of k, n] * (q[n, k] - zero[group of k, n])             q: 4 or 8 bits, packed

A step of one row takes as long as reading the weights does, so a quarter of the bytes is a quarter of the time, if the
arithmetic can follow: 132 SMs at 3 TB/s get 27 4-bit weights a clock each, and issue 128 lanes' instructions. That is
5 instructions a weight, of which a shift, a mask, a conversion (four times as slow as others), a subtraction and
two multiplications would take them all. What follows is there to need half of it.

Packing. A checkpoint's word holds 8 neighbours of one column. Here a word holds 8 inputs that lie 32 apart, so that
slot j (bits 4 j to 4 j + 3) of 32 neighbouring words is 32 neighbouring inputs, all in one group:

    block of 256 inputs (4 bits; 128 with 8 bits, four slots) of output n = 32 words = 128 bytes, one line of the cache

                      word 0        word 1      ...   word 31
        slot 0         k = 0         k = 1            k = 31       a piece [outputs, 32] of the block, by one
        slot 1         k = 32        k = 33           k = 63       shift and mask of the tile of words, in the
        ...                                                        registers where that was loaded to; the pieces
        slot 7         k = 224       k = 225          k = 255      side by side are the block [outputs, 256]

    memory: [blocks, N, 32] int32, so that the tile of neighbouring outputs is one contiguous piece

Conversion. The bits of a small integer, put into the low end of a float's fraction, are that integer plus a constant:

    bfloat16   0 10000110 000qqqq  = 128 + q       float32   0 10010110 000...0qqqq  = 2^23 + q
    float16    0 11001 000000qqqq  = 1024 + q

One `and`-`or` instruction makes two of them, halves of a register; one subtracts 128 + zero from both, exactly; one
multiplies both by the scale. `_dequantize_slot` is that, for tensor cores. One row needs no tensor core: there float32
numbers 2^e + q are multiplied with x as they are, and what the 2^e and the zero point add, which depends on x and the
group alone, is subtracted (`_gemv_step`).

triton_gemv.py explains programmatic dependent launch (PDL: 1 load weights or ask for them, 2 signal, 3 wait, 4 norm,
5 multiply), triton_gemm.py the split of K: program_id(1) sums its part of K, the parts are added in order afterwards.

Legend: M rows of x, N outputs, K inputs, G groups, S splits of K; GATED weights have 2 N rows, gates first, then ups.
"""

# ruff: noqa: RUF005  (triton compiles a + (b,), but not (*a, b))

from __future__ import annotations

import triton
import triton.language as tl

from folovllm.model_executor.layers.triton_gemv import _silu_mul
from folovllm.utils.triton_launch import fast_launch

WORDS = tl.constexpr(32)  # words of an output and block; and inputs of a slot


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _slot_asm(slot: int, is_bfloat16: bool) -> str:
    """Return PTX for two weights: $1, $2 words, $3 minus (2^e + zero) twice, $4 scale twice -> $0 weights.

    prmt puts the halves that hold the slot side by side; lop3 0xEA is (a and b) or c; the first fma subtracts, exactly.
    """
    halves = "0x5410" if slot < 4 else "0x7632"
    kind, magic, one, minus_zero = (
        ("bf16x2", "0x43004300", "0x3F803F80", "0x80008000")
        if is_bfloat16
        else ("f16x2", "0x64006400", "0x3C003C00", "0x80008000")
    )
    return f"""{{
        .reg .b32 t, one, none;
        mov.b32 one, {one};
        mov.b32 none, {minus_zero};
        prmt.b32 t, $1, $2, {halves};
        shr.u32 t, t, {slot % 4 * 4};
        lop3.b32 t, t, 0x000f000f, {magic}, 0xEA;
        fma.rn.{kind} t, t, one, $3;
        fma.rn.{kind} $0, t, $4, none;
    }}"""


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_slot(
    words: tl.tensor,
    zero: tl.tensor,
    scale: tl.tensor,
    slot: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Return (q - zero) * scale, rounded to scale's dtype, for the q in one slot of `words` [BLOCK_N, WORDS].

    zero, scale: [BLOCK_N]. With ASM two weights at a time (4 bits, 16-bit dtypes); else in float32, one at a time.
    """
    dtype: tl.constexpr = scale.dtype
    if ASM:
        BASE: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        return tl.inline_asm_elementwise(
            _slot_asm(slot, dtype == tl.bfloat16),
            "=r,r,r,r,r",
            [words, (-BASE - zero.to(tl.float32)).to(dtype)[:, None], scale[:, None]],
            dtype=scale.dtype,
            is_pure=True,
            pack=2,
        )
    bits = ((words >> (BITS * slot)) & ((1 << BITS) - 1)) | 0x4B000000
    value = bits.to(tl.float32, bitcast=True) - (8388608.0 + zero.to(tl.float32))[:, None]
    return (value * scale.to(tl.float32)[:, None]).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _load_groups(
    pair_ptr: tl.tensor,
    block: tl.tensor,
    weight_row: tl.tensor,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tuple:
    """Return the scales (or zero points) of the GROUPS groups of a block, a tuple of tensors like `weight_row`.

    Two groups share a word, pairs [blocks, (GROUPS + 1) / 2, N]: the copies of a pipelined loop are 4 bytes or more.
    """
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    values: tl.tuple = ()
    for pair in tl.static_range(PAIRS):
        bits = tl.load(pair_ptr + (block * PAIRS + pair) * N + weight_row)
        values = values + (bits.to(tl.int16).to(dtype, bitcast=True),)
        if 2 * pair + 1 < GROUPS:
            values = values + ((bits >> 16).to(tl.int16).to(dtype, bitcast=True),)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _side_by_side(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Return [N, 2 K] of left and right [N, K]; each thread keeps its numbers, in other registers at most."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_block(
    words: tl.tensor,
    x: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    block: tl.tensor,
    weight_row: tl.tensor,
    sums: tl.tensor,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Return sums [BLOCK_N, BLOCK_M] + a block of the weights . x^T, for words [BLOCK_N, WORDS], x [BLOCK_M, INPUTS].

    All slots are one product: the compiler waits for a product before it prepares the registers of the next one in the
    same step. And it loads `words` to the registers where the product wants the weights, as long as only elementwise
    operations with constants and loaded numbers lie between, or pieces put side by side: no shift by a computed number.
    """
    dtype: tl.constexpr = x.dtype
    SLOTS: tl.constexpr = 32 // BITS
    scales = _load_groups(scale_ptr, block, weight_row, N, GROUPS, dtype)
    if zero_ptr is not None:
        zeros = _load_groups(zero_ptr, block, weight_row, N, GROUPS, dtype)
    parts: tl.tuple = ()
    for slot in tl.static_range(SLOTS):
        scale = scales[slot * GROUPS // SLOTS]
        zero = tl.full(scale.shape, 1 << (BITS - 1), dtype)
        if zero_ptr is not None:
            zero = zeros[slot * GROUPS // SLOTS]
        parts = parts + (_dequantize_slot(words, zero, scale, slot, BITS, ASM),)
    weight = _side_by_side(_side_by_side(parts[0], parts[1]), _side_by_side(parts[2], parts[3]))
    if SLOTS == 8:
        last = _side_by_side(_side_by_side(parts[4], parts[5]), _side_by_side(parts[6], parts[7]))
        weight = _side_by_side(weight, last)
    return tl.dot(weight, tl.trans(x), sums)


@triton.jit  # type: ignore[untyped-decorator]
def _prefetch_lines(word_ptrs: tl.tensor) -> None:
    """Ask for the 128-byte lines at `word_ptrs` in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [word_ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@fast_launch
@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def packed_gemm_kernel(
    x_ptr: tl.tensor,
    word_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_desc: tl.tensor_descriptor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One tile of out [M, N], or of one split's sums in out [SPLITS, M, N] float32; program_id(1) is the split.

    The tile is computed as its transpose, weight . x^T: the tensor core takes its first operand from registers, where
    dequantization leaves it, and its second from shared memory, where x is loaded to without passing registers.
    Programs of all row tiles of the same outputs are neighbours: a weight comes from DRAM once.
    Rows and outputs beyond M and N are computed from real ones and not stored, as in gemm_kernel.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    INPUTS: tl.constexpr = 1024 // BITS  # of a block: 32 words of an output are 1024 bits
    BLOCKS: tl.constexpr = (K + INPUTS - 1) // INPUTS
    PART: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS  # blocks of a split
    MASKED: tl.constexpr = PART * SPLITS * INPUTS != K  # some blocks are partly or wholly beyond K: x is zero there
    ROWS: tl.constexpr = 2 * N if GATED else N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    first = tl.program_id(1) * PART
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(output, N - 1)
    word, col = tl.arange(0, WORDS), tl.arange(0, INPUTS)
    x_ptrs = x_ptr + (row % M).to(tl.int64)[:, None] * K + col[None, :]
    word_ptrs = word_ptr + weight_row[:, None] * WORDS + word[None, :]
    # 1. Prefetch, by one of the programs that share the weights. 2. Signal. 3. Wait.
    if PREFETCH > 0:  # noqa: SIM102  (this condition is the compiler's, the next the program's)
        if tile_m == 0:
            block = tl.minimum(first + tl.arange(0, PREFETCH), BLOCKS - 1).to(tl.int64)
            lines = word_ptr + (block[:, None] * ROWS + weight_row[None, :]) * WORDS
            _prefetch_lines(lines)
            if GATED:
                _prefetch_lines(lines + N * WORDS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # 4. Multiply.
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_sums = sums
    for step in range(PART):
        k = (first + step) * INPUTS
        block = first + step
        if PART * SPLITS != BLOCKS:
            block = tl.minimum(block, BLOCKS - 1)
        block_ptrs = word_ptrs + block.to(tl.int64) * (ROWS * WORDS)
        words = tl.load(block_ptrs)
        if x_desc is not None:
            x = x_desc.load([tile_m * BLOCK_M, k])
        elif MASKED:
            x = tl.load(x_ptrs + k, mask=(k + col < K)[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs + k)
        sums = _multiply_block(words, x, scale_ptr, zero_ptr, block, weight_row, sums, ROWS, GROUPS, BITS, ASM)
        if GATED:
            words = tl.load(block_ptrs + N * WORDS)
            up_row = N + weight_row
            up_sums = _multiply_block(words, x, scale_ptr, zero_ptr, block, up_row, up_sums, ROWS, GROUPS, BITS, ASM)
    # 5. Finish.
    value = tl.trans(sums)
    offsets = row.to(tl.int64)[:, None] * N + output[None, :]
    mask = (row < M)[:, None] & (output < N)[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, value, mask=mask)
    else:
        if bias_ptr is not None:
            value += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
        value = value.to(dtype)
        if GATED:
            up = tl.trans(up_sums)
            if bias_ptr is not None:
                up += tl.load(bias_ptr + N + weight_row).to(tl.float32)[None, :]
            value = _silu_mul(value, up.to(dtype), dtype)
        if add_ptr is not None:
            addend = tl.load(add_ptr + offsets, mask=mask, other=0.0)
            value = (value.to(tl.float32) + addend.to(tl.float32)).to(dtype)
        tl.store(out_ptr + offsets, value, mask=mask)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _float_place(slot: int, bits: int) -> int:
    """Return the bit of a float32 where one row's product puts the lowest bit of a slot: high, for precision."""
    return 15 if bits == 8 else (15, 19, 11, 15, 19, 11, 15, 19)[slot]


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _and_or_asm(mask: int, bits: int) -> str:
    """Return PTX for $0 = $1 & mask | bits in one instruction; the compiler's own choice are two."""
    return f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;"


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_float(words: tl.tensor, slot: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Return 2^(23 - place) + q in float32 for the q in one slot; slots share shifts: it is little over one `and`."""
    PLACE: tl.constexpr = _float_place(slot, BITS)
    SHIFT: tl.constexpr = PLACE - slot * BITS
    moved = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    EXPONENT: tl.constexpr = (150 - PLACE) << 23
    if ASM:
        bits = tl.inline_asm_elementwise(
            _and_or_asm(MASK, EXPONENT), "=r,r", [moved], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = (moved & MASK) | EXPONENT
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_step(
    words: tl.tensor,
    xs: tl.tuple,
    scales: tl.tuple,
    zeros: tl.tuple,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Return what each word [STEP_BLOCKS, BLOCK_N, WORDS] adds to its output: the sum over its slots, in float32.

    xs: x of each slot, [STEP_BLOCKS, WORDS] float32; scales, zeros: of each group, [STEP_BLOCKS, BLOCK_N]; no zeros:
    the middle. For the slots of a group, with b = 2^(23 - place),

        sum of x (q - zero)  =  sum of x (b + q)  -  sum of x (b + zero)         the latter is the same for all outputs
    """
    SLOTS: tl.constexpr = 32 // BITS
    PER_GROUP: tl.constexpr = SLOTS // GROUPS
    MIDDLE: tl.constexpr = 0 if len(zeros) > 0 else 1 << (BITS - 1)
    total = tl.zeros(words.shape, tl.float32)
    for group in tl.static_range(GROUPS):
        base = tl.zeros(xs[0].shape, tl.float32)
        x_sum = base
        for slot in tl.static_range(group * PER_GROUP, (group + 1) * PER_GROUP):
            base += xs[slot] * ((1 << (23 - _float_place(slot, BITS))) + MIDDLE)
            x_sum += xs[slot]
        part = tl.broadcast_to(-base[:, None, :], words.shape)
        if len(zeros) > 0:
            part -= zeros[group].to(tl.float32)[:, :, None] * x_sum[:, None, :]
        for slot in tl.static_range(group * PER_GROUP, (group + 1) * PER_GROUP):
            part += _unpack_float(words, slot, BITS, ASM) * xs[slot][:, None, :]
        total += part * scales[group].to(tl.float32)[:, :, None]
    return total


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def packed_gemv_kernel(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    word_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PREFETCH: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row: out [N] = norm(x [K]) . weight rows, in float32 on the ordinary units; see gemv_kernel for the steps.

    Program p computes outputs [p, p + 1) * BLOCK_N * ROW_TILES, in tiles of BLOCK_N outputs by STEP_BLOCKS blocks.
    Outputs beyond N and blocks beyond the last are computed from real ones; the former are not stored, and x is zero
    for the latter. Without a norm, norm_weight_ptr is None.
    """
    program = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    SLOTS: tl.constexpr = 32 // BITS
    BLOCKS: tl.constexpr = (K + 1024 // BITS - 1) // (1024 // BITS)  # a block of 32 words is 1024 bits of an output
    CHUNKS: tl.constexpr = (BLOCKS + STEP_BLOCKS - 1) // STEP_BLOCKS
    HALVES: tl.constexpr = 2 if GATED else 1
    STEPS: tl.constexpr = ROW_TILES * HALVES * CHUNKS
    NORM: tl.constexpr = norm_weight_ptr is not None
    NUM_ZEROS: tl.constexpr = 0 if zero_ptr is None else GROUPS  # zero points of a step
    word = tl.arange(0, WORDS)
    block_in_step = tl.arange(0, STEP_BLOCKS)
    col = block_in_step[:, None] * (SLOTS * WORDS) + word[None, :]  # of slot 0 of chunk 0
    # 1. Load: see gemv_kernel. A step's tile, scales and zero points are members of three tuples.
    tiles: tl.tuple = ()
    scales: tl.tuple = ()
    zeros: tl.tuple = ()
    for step in tl.static_range(PREFETCH):
        tile, scale, zero = _load_gemv_step(
            word_ptr,
            scale_ptr,
            zero_ptr,
            program,
            step,
            N,
            BLOCKS,
            GROUPS,
            BLOCK_N,
            STEP_BLOCKS,
            ROW_TILES,
            HALVES,
            dtype,
        )
        tiles, scales, zeros = tiles + (tile,), scales + scale, zeros + zero
    gammas: tl.tuple = ()
    if NORM:
        for part in tl.static_range(CHUNKS * SLOTS):
            at = col + (part // SLOTS * STEP_BLOCKS * SLOTS + part % SLOTS) * WORDS
            gammas = gammas + (tl.load(norm_weight_ptr + at, mask=at < K, other=0.0),)
    # 2. Signal, 3. wait.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # 4. Norm.
    xs: tl.tuple = ()
    if NORM:
        squares = tl.zeros((STEP_BLOCKS, WORDS), tl.float32)
        for part in tl.static_range(CHUNKS * SLOTS):
            at = col + (part // SLOTS * STEP_BLOCKS * SLOTS + part % SLOTS) * WORDS
            x = tl.load(x_ptr + at, mask=at < K, other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
            xs = xs + (x,)
        factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / K + eps)
    # 5. Sum.
    for step in tl.static_range(STEPS):
        if step + PREFETCH < STEPS:
            tile, scale, zero = _load_gemv_step(
                word_ptr, scale_ptr, zero_ptr, program, step + PREFETCH,
                N, BLOCKS, GROUPS, BLOCK_N, STEP_BLOCKS, ROW_TILES, HALVES, dtype,
            )  # fmt: skip
            tiles, scales, zeros = tiles + (tile,), scales + scale, zeros + zero
        chunk_xs: tl.tuple = ()
        for slot in tl.static_range(SLOTS):
            if NORM:
                gamma = gammas[step % CHUNKS * SLOTS + slot].to(tl.float32)
                x = (xs[step % CHUNKS * SLOTS + slot].to(tl.float32) * factor * gamma).to(dtype)
            else:
                at = col + (step % CHUNKS * STEP_BLOCKS * SLOTS + slot) * WORDS
                x = tl.load(x_ptr + at, mask=at < K, other=0.0)
            chunk_xs = chunk_xs + (x.to(tl.float32),)
        if step % CHUNKS == 0:
            sums = tl.zeros((STEP_BLOCKS, BLOCK_N, WORDS), tl.float32)
        step_scales = scales[step * GROUPS : (step + 1) * GROUPS]
        step_zeros = zeros[step * NUM_ZEROS : (step + 1) * NUM_ZEROS]
        sums += _gemv_step(tiles[step], chunk_xs, step_scales, step_zeros, BITS, GROUPS, ASM)
        if step % CHUNKS == CHUNKS - 1:
            output = (program * ROW_TILES + step // (CHUNKS * HALVES)) * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = output < N
            total = tl.sum(tl.sum(sums, axis=2), axis=0)
            if bias_ptr is not None:
                total += tl.load(bias_ptr + step // CHUNKS % HALVES * N + output, mask=mask, other=0.0).to(tl.float32)
            value = total.to(dtype)
            if GATED and step // CHUNKS % HALVES == 0:
                gate = value
            elif GATED:
                tl.store(out_ptr + output, _silu_mul(gate, value, dtype), mask=mask)
            else:
                if add_ptr is not None:
                    addend = tl.load(add_ptr + output, mask=mask, other=0.0)
                    value = (value.to(tl.float32) + addend.to(tl.float32)).to(dtype)
                tl.store(out_ptr + output, value, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load_gemv_step(
    word_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    program: tl.tensor,
    step: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HALVES: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tuple, tl.tuple]:
    """Return words [STEP_BLOCKS, BLOCK_N, WORDS], scales and zero points of a step; steps: row tile, half, chunk.

    Blocks come first, so that the compiler shares them out among threads: each then needs x of few inputs only.
    """
    CHUNKS: tl.constexpr = (BLOCKS + STEP_BLOCKS - 1) // STEP_BLOCKS
    ROWS: tl.constexpr = HALVES * N
    output = (program * ROW_TILES + step // (CHUNKS * HALVES)) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(output, N - 1) + step // CHUNKS % HALVES * N
    block = step % CHUNKS * STEP_BLOCKS + tl.arange(0, STEP_BLOCKS)
    if BLOCKS % STEP_BLOCKS != 0:
        block = tl.minimum(block, BLOCKS - 1)
    lines = block.to(tl.int64)[:, None] * ROWS + row[None, :]
    words = tl.load(
        word_ptr + lines[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :], eviction_policy="evict_first"
    )
    scales = _load_groups(scale_ptr, block[:, None], row[None, :], ROWS, GROUPS, dtype)
    zeros: tl.tuple = ()
    if zero_ptr is not None:
        zeros = _load_groups(zero_ptr, block[:, None], row[None, :], ROWS, GROUPS, dtype)
    return words, scales, zeros


@fast_launch
@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def sum_parts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Out [M, N] = the sum of parts [SPLITS, M, N], in their order, plus bias [N], rounded; plus add [M, N]."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * M.to(tl.int64) * N + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    value = total.to(dtype)
    if add_ptr is not None:
        value = (value.to(tl.float32) + tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(out_ptr + at, value, mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["first", "rows"])  # type: ignore[untyped-decorator]
def dequantize_kernel(
    word_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Out [rows, K] = weight rows `first` to `first` + rows; program_id: (rows / BLOCK_N, block)."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    SLOTS: tl.constexpr = 32 // BITS
    block = tl.program_id(1)
    out_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + tl.minimum(out_row, rows - 1)
    word = tl.arange(0, WORDS)
    words = tl.load(word_ptr + (block.to(tl.int64) * N + row)[:, None] * WORDS + word[None, :])
    scales = _load_groups(scale_ptr, block, row, N, GROUPS, dtype)
    if zero_ptr is not None:
        zeros = _load_groups(zero_ptr, block, row, N, GROUPS, dtype)
    for slot in tl.static_range(SLOTS):
        scale = scales[slot * GROUPS // SLOTS]
        zero = tl.full(scale.shape, 1 << (BITS - 1), dtype)
        if zero_ptr is not None:
            zero = zeros[slot * GROUPS // SLOTS]
        col = (block * SLOTS + slot) * WORDS + word
        weight = _dequantize_slot(words, zero, scale, slot, BITS, ASM)
        mask = (out_row < rows)[:, None] & (col < K)[None, :]
        tl.store(out_ptr + out_row.to(tl.int64)[:, None] * K + col[None, :], weight, mask=mask)
