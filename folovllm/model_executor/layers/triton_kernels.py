"""The small operations between the matrix products, as Triton kernels (vLLM: `csrc/layernorm_kernels.cu`,
`activation_kernels.cu`, `pos_encoding_kernels.cu`, `fused_qknorm_rope_kernel.cu`, `cache_kernels.cu`).

Each of them does next to no arithmetic: its time is the bytes it moves, or, for a few tokens, the launch. So every
kernel reads its input once, keeps it in registers, and does all there is to do with it before writing:

    rms_norm               one program = one row:     x, residual -> sum -> mean of squares -> norm
    silu_and_mul           one program = a piece of a row:     gate, up -> silu(gate) * up
    qk_norm_rope_write_kv  one program = some heads of one token:

        qkv row of a token  [ q0 q1 ... | k0 k1 ... | v0 v1 ... ]
                              |           |           |
                              norm, turn  norm, turn  |
                              v           v           v
                              back in     cache[0,    cache[1,
                              place       slot]       slot]

`pdl` is programmatic dependent launch (Hopper and later): a kernel may start while the one before it still runs, and
waits (`gdc_wait`) just before it reads anything that a kernel has written. Only weights are read ahead of the wait.

Import this module only where Triton is installed; `fused_ops.py` holds the dispatch and the plain-torch twins.

Legend: T tokens in the step, E hidden size, N inner size of the MLP, H heads, Hkv KV heads, D head size, Nb blocks,
Bs block size.
"""

import torch
import triton
import triton.language as tl

from folovllm.utils.common import cdiv, power_of_2_at_least
from folovllm.utils.triton_launch import fast_launch

_FP8_MAX = 448.0
"""Largest float8_e4m3fn; larger values would become NaN."""


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Return the launch option for programmatic dependent launch; the interpreter knows no such option."""
    return {"launch_pdl": True} if pdl else {}


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise row `program_id(0)`; with a residual, add x to it first, in place."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < E
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + offs, mask=mask, other=0.0)
        # Rounded to the model's dtype before the norm: the next layer will read this sum, not the exact one.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * residual_stride + offs, x, mask=mask)
    x = x.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / E + eps)
    out = x * inverse_rms * weight.to(tl.float32)
    tl.store(out_ptr + row * out_stride + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    num_warps: int | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """See `fused_ops.rms_norm`. `num_warps` None: 16 bytes a thread and load for 2-byte elements, at most 8 warps."""
    num_tokens, hidden_size = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    assert residual is None or residual.stride(1) == 1
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block = power_of_2_at_least(hidden_size)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        E=hidden_size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        PDL=pdl,
        num_warps=num_warps or min(8, max(1, block // 256)),
        **pdl_options(pdl),
    )
    return out


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, gate_up_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Piece `program_id(1)`, BLOCK wide, of row `program_id(0)`."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(gate_up_ptr + row * gate_up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + N + offs, mask=mask, other=0.0)
    # Rounded before the product, as the twin's two operations do.
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * N + offs, (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=mask)


def silu_and_mul(
    gate_up: torch.Tensor, *, block: int | None = None, num_warps: int = 4, pdl: bool = False
) -> torch.Tensor:
    """See `fused_ops.silu_and_mul`. `block` None: small pieces, so many SMs, for few tokens."""
    num_tokens, twice = gate_up.shape
    assert gate_up.stride(1) == 1
    inner = twice // 2
    out = torch.empty((num_tokens, inner), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    block = min(block or 1024, power_of_2_at_least(inner))
    _silu_and_mul_kernel[(num_tokens, cdiv(inner, block))](
        gate_up, out, gate_up.stride(0), N=inner, BLOCK=block, PDL=pdl, num_warps=num_warps, **pdl_options(pdl)
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _normalize(first, second, weight_ptr, half_offs, half_mask, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm of heads [G, D] held as two halves [G, D / 2]; rounded to the heads' dtype, as between two operations."""
    dtype = first.dtype
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)
    weight_a = tl.load(weight_ptr + half_offs, mask=half_mask, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + D // 2 + half_offs, mask=half_mask, other=0.0).to(tl.float32)
    a = a * inverse_rms[:, None] * weight_a[None, :]
    b = b * inverse_rms[:, None] * weight_b[None, :]
    return a.to(dtype), b.to(dtype)


@triton.jit
def _rotate(first, second, cos_ptr, sin_ptr, half_offs, half_mask):  # type: ignore[no-untyped-def]
    """NeoX rotation: pair (i, i + D/2) turns by angle i. Products and sum in float32, rounded once."""
    dtype = first.dtype
    cos = tl.load(cos_ptr + half_offs, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + half_offs, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _to_cache(x, scale, FP8: tl.constexpr, FP8_MAX: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert to the cache's dtype; float8 holds x / scale, clamped because it has no infinity."""
    if FP8:
        scaled = tl.div_rn(x.to(tl.float32), scale)
        return tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX).to(DTYPE)
    return x.to(DTYPE)


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _qk_norm_rope_write_kv_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [T, (H + 2 Hkv) D]
    positions_ptr,  # [T]
    cos_sin_ptr,  # [2, max_position, D]
    q_weight_ptr,  # [D]
    k_weight_ptr,
    eps,
    kv_cache_ptr,  # [2, Nb, Bs, Hkv, D]
    slot_mapping_ptr,  # [T]
    k_scale,
    v_scale,
    qkv_stride,
    sin_offset,
    kv_stride,
    block_stride,
    token_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2 rounded up to a power of two
    G: tl.constexpr,  # heads of a program
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Heads of one token: programs 0 .. of axis 1 take the queries, G at a time, then the keys, then the values."""
    Q_GROUPS: tl.constexpr = (H + G - 1) // G
    KV_GROUPS: tl.constexpr = (HKV + G - 1) // G
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    half_offs = tl.arange(0, HALF)
    half_mask = half_offs < D // 2
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = qkv_ptr + token * qkv_stride
    if group < Q_GROUPS:
        heads = group * G + tl.arange(0, G)
        mask = (heads < H)[:, None] & half_mask[None, :]
        ptrs = row + heads[:, None] * D + half_offs[None, :]
        cos_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * D
        first = tl.load(ptrs, mask=mask, other=0.0)
        second = tl.load(ptrs + D // 2, mask=mask, other=0.0)
        if NORM:
            first, second = _normalize(first, second, q_weight_ptr, half_offs, half_mask, eps, D)
        # The table's second half of sines is the one that is not negated.
        first, second = _rotate(first, second, cos_ptr, cos_ptr + sin_offset + D // 2, half_offs, half_mask)
        tl.store(ptrs, first, mask=mask)
        tl.store(ptrs + D // 2, second, mask=mask)
    else:
        slot = tl.load(slot_mapping_ptr + token)
        if slot >= 0:  # negative: padding of a captured batch, nobody's token
            is_value = group >= Q_GROUPS + KV_GROUPS
            kv = is_value.to(tl.int32)
            heads = (group - Q_GROUPS - kv * KV_GROUPS) * G + tl.arange(0, G)
            mask = (heads < HKV)[:, None] & half_mask[None, :]
            ptrs = row + (H + kv * HKV + heads)[:, None] * D + half_offs[None, :]
            first = tl.load(ptrs, mask=mask, other=0.0)
            second = tl.load(ptrs + D // 2, mask=mask, other=0.0)
            scale = v_scale
            if group < Q_GROUPS + KV_GROUPS:
                scale = k_scale
                cos_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * D
                if NORM:
                    first, second = _normalize(first, second, k_weight_ptr, half_offs, half_mask, eps, D)
                first, second = _rotate(first, second, cos_ptr, cos_ptr + sin_offset + D // 2, half_offs, half_mask)
            page = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * token_stride
            to = kv_cache_ptr + kv.to(tl.int64) * kv_stride + page + heads[:, None] * head_stride + half_offs[None, :]
            dtype: tl.constexpr = kv_cache_ptr.dtype.element_ty
            tl.store(to, _to_cache(first, scale, FP8, FP8_MAX, dtype), mask=mask)
            tl.store(to + D // 2, _to_cache(second, scale, FP8, FP8_MAX, dtype), mask=mask)


def qk_norm_rope_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    heads_per_program: int = 8,
    num_warps: int = 4,
    pdl: bool = False,
) -> torch.Tensor:
    """See `fused_ops.qk_norm_rope_write_kv`: turns the queries in place in `qkv` and returns them as a view."""
    num_tokens = qkv.shape[0]
    head_size = kv_cache.shape[4]
    query = qkv[:, : num_heads * head_size].view(num_tokens, num_heads, head_size)
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_size and qkv.stride(1) == 1
    assert cos_sin_cache.is_contiguous() and cos_sin_cache.shape[2] == head_size and head_size % 2 == 0
    assert kv_cache.stride(4) == 1 and (q_weight is None) == (k_weight is None)
    if num_tokens == 0:
        return query
    heads = heads_per_program
    groups = cdiv(num_heads, heads) + 2 * cdiv(num_kv_heads, heads)
    _qk_norm_rope_write_kv_kernel[(num_tokens, groups)](
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        eps,
        kv_cache,
        slot_mapping,
        float(k_scale),
        float(v_scale),
        qkv.stride(0),
        cos_sin_cache.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        BLOCK_SIZE=kv_cache.shape[2],
        H=num_heads,
        HKV=num_kv_heads,
        D=head_size,
        HALF=power_of_2_at_least(head_size // 2),
        G=heads,
        NORM=q_weight is not None,
        FP8=kv_cache.dtype == torch.float8_e4m3fn,
        FP8_MAX=_FP8_MAX,
        PDL=pdl,
        num_warps=num_warps,
        **pdl_options(pdl),
    )
    return query
