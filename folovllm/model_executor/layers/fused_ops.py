"""The fused operations of a decoder layer: one function each, Triton on CUDA, our C on CPUs, else torch.

vLLM spreads them over `model_executor/layers/layernorm.py`, `activation.py`, `rotary_embedding/` and `csrc/`. Here a
name has three bodies: `rms_norm_torch` says what is computed, `triton_kernels.rms_norm` and `cpu_kernels.rms_norm`
compute it in one kernel, and `rms_norm` picks. All round at the same places, so they differ in the last bits of a sum's
order alone.

`pdl` (programmatic dependent launch) may be set where the GPU is a Hopper or later; it changes no result.

Legend: T tokens in the step, E hidden size, N inner size of the MLP, H heads, Hkv KV heads, D head size, Nb blocks,
Bs block size.
"""

from __future__ import annotations

import functools
import types

import torch
from torch.nn import functional as F

from folovllm.utils import cpu_kernels

FP8_MAX = 448.0
"""Largest float8_e4m3fn."""


@functools.cache
def _load_kernels() -> types.ModuleType | None:
    """Return the Triton kernels, or None where Triton is not installed."""
    try:
        from folovllm.model_executor.layers import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, statistics in float32.

    Args:
        x: [T, E], rows contiguous; not changed unless `out` is x.
        weight: [E].
        eps: added to the mean square.
        residual: [T, E] or None. It is overwritten with residual + x, rounded to its dtype, and that is normalised.
        out: [T, E], where the result goes, or None for a new tensor; it may be x.
        pdl: see the module.

    Returns:
        [T, E] of x's dtype.
    """
    if out is None and cpu_kernels.usable(x):
        return cpu_kernels.rms_norm(x, weight, eps, residual)
    kernels = _load_kernels() if x.is_cuda else None
    if kernels is None:
        return rms_norm_torch(x, weight, eps, residual, out)
    result: torch.Tensor = kernels.rms_norm(x, weight, eps, residual, out, pdl=pdl)
    return result


def rms_norm_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain-torch twin of `rms_norm`."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = (wide * inverse_rms * weight.float()).to(x.dtype)
    return normed if out is None else out.copy_(normed)


def silu_and_mul(gate_up: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """Return silu(gate) * up [T, N] for gate_up [T, 2 N] = gate | up; silu is rounded to the dtype first."""
    if cpu_kernels.usable(gate_up):
        return cpu_kernels.silu_and_mul(gate_up)
    kernels = _load_kernels() if gate_up.is_cuda else None
    if kernels is None:
        return silu_and_mul_torch(gate_up)
    result: torch.Tensor = kernels.silu_and_mul(gate_up, pdl=pdl)
    return result


def silu_and_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """The plain-torch twin of `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


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
    pdl: bool = False,
) -> torch.Tensor:
    """Do all that lies between the QKV projection and attention; return the queries [T, H, D].

    Args:
        qkv: [T, (H + 2 Hkv) D], rows contiguous: queries, keys, values. The queries are overwritten with the result;
            keys and values stay as they are.
        positions: [T] int64, rows of the table; also of padding tokens.
        cos_sin_cache: [2, max_position, D], RotaryEmbedding's table: cosines twice, then sines negated and plain.
        q_weight: [D], the norm's weight for each query head, or None: no QK-norm (then `k_weight` is None too).
        k_weight: [D], likewise for key heads.
        eps: of the QK-norm.
        kv_cache: [2, Nb, Bs, Hkv, D], changed at the slots; of qkv's dtype, or float8_e4m3fn: then it holds
            key / k_scale and value / v_scale, clamped to +-448.
        slot_mapping: [T] int64, block id * Bs + offset; negative: the token is padding, its key and value are dropped.
        num_heads: H.
        num_kv_heads: Hkv.
        k_scale: see kv_cache.
        v_scale: see kv_cache.
        pdl: see the module.

    Returns:
        A view of `qkv`, normalised and turned: strides ((H + 2 Hkv) D, D, 1).
    """
    if k_scale == v_scale == 1.0 and kv_cache.dtype == qkv.dtype and cpu_kernels.usable(qkv):
        return cpu_kernels.qk_norm_rope_write_kv(
            qkv,
            positions,
            cos_sin_cache,
            q_weight,
            k_weight,
            eps,
            kv_cache,
            slot_mapping,
            num_heads,
            num_kv_heads,
        )
    kernels = _load_kernels() if qkv.is_cuda else None
    if kernels is None:
        return qk_norm_rope_write_kv_torch(
            qkv,
            positions,
            cos_sin_cache,
            q_weight,
            k_weight,
            eps,
            kv_cache,
            slot_mapping,
            num_heads,
            num_kv_heads,
            k_scale,
            v_scale,
        )
    query: torch.Tensor = kernels.qk_norm_rope_write_kv(
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        eps,
        kv_cache,
        slot_mapping,
        num_heads,
        num_kv_heads,
        k_scale,
        v_scale,
        pdl=pdl,
    )
    return query


def qk_norm_rope_write_kv_torch(
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
) -> torch.Tensor:
    """The plain-torch twin of `qk_norm_rope_write_kv`; it looks at the slots, so on CUDA it makes the host wait."""
    head_size = kv_cache.shape[4]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_size)
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin_cache[:, positions].unsqueeze(2).float()
    turned = []
    for part, weight in ((query, q_weight), (key, k_weight)):
        x = (part if weight is None else rms_norm_torch(part, weight, eps)).float()
        first, second = x.chunk(2, dim=-1)
        turned.append((x * cos + torch.cat((second, first), dim=-1) * sin).to(qkv.dtype))
    query.copy_(turned[0])
    written = slot_mapping >= 0
    slots, block_size = slot_mapping[written], kv_cache.shape[2]
    for i, (part, scale) in enumerate(((turned[1], k_scale), (value, v_scale))):
        rows = part[written]
        if kv_cache.dtype == torch.float8_e4m3fn:
            rows = (rows.float() / scale).clamp_(-FP8_MAX, FP8_MAX)
        kv_cache[i, slots // block_size, slots % block_size] = rows.to(kv_cache.dtype)
    return query
