"""GPTQ weights on CUDA: packed for our kernels once, then multiplied as they are, fused with their neighbours.

vLLM: `layers/quantization/gptq_marlin.py` and its CUDA kernels. triton_gptq_kernels.py explains ours; here is which
runs, by the number of rows M:

    1               packed_gemv_kernel    K whole in one program, float32 sums; norm before, SiLU-mul or residual after
    2 to 256        packed_gemm_kernel    tensor cores, split along K where outputs are few (triton_gptq_tiles.py)
    more            dequantize_kernel, then cuBLAS, a part of the weight at a time that the L2 cache can hold

Beside each function is its twin `..._torch`: the plain computation, which runs where kernels do not (runs_on_triton).
Every grid depends on M and the weight's shape alone, so that steps can be recorded in CUDA graphs; sums are added in a
fixed order. `pdl` is explained in small_batch_linear.py: a kernel may read weights, never results, before it waits.

Legend: M rows, N outputs, K inputs, G groups, S splits of K; gated weights have 2 N rows, first the gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from folovllm.model_executor.layers.fused_ops import rms_norm, rms_norm_torch, silu_and_mul
from folovllm.model_executor.layers.quantization import packing
from folovllm.model_executor.layers.quantization.triton_gptq_tiles import (
    GemvConfig,
    PackedGemmConfig,
    default_config,
)
from folovllm.model_executor.layers.small_batch_linear import linear_torch, silu_mul_torch
from folovllm.utils.common import power_of_2_at_least

WORDS = 32
"""Words of an output in a block, which is WORDS * 32 / bits inputs; equals that of the kernels."""
WORKSPACE_BYTES = 48 << 20
"""Of dequantized weights at a time: most should still be in the L2 cache (50 MB) when cuBLAS reads them, and kernels be
long enough for the host to keep up."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' layout; made by repack_for_triton. Not changed afterwards."""

    words: torch.Tensor
    """[blocks, N, WORDS] int32; see the drawing in triton_gptq_kernels.py."""
    scales: torch.Tensor
    """[blocks, pairs, N] int32: the scales of two neighbouring groups of a block, 16 bits each, the first one lower."""
    zeros: torch.Tensor | None
    """The zero points in the same way; None where all are 2**(bits - 1)."""
    bits: int
    num_inputs: int
    groups: int
    """Per block; groups longer than a block are stored once for each of their blocks."""
    dtype: torch.dtype
    """Of scales and zero points, and of x: bfloat16 or float16."""

    @property
    def num_outputs(self) -> int:
        """N, or 2 N of a gated weight."""
        return self.words.shape[1]

    @property
    def asm(self) -> bool:
        """Whether weights are converted by PTX, two at a time: 4 bits, and a GPU that runs it."""
        return self.bits == 4 and _runs_ptx(self)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold it, for a module to own."""
        return [self.words, self.scales] if self.zeros is None else [self.words, self.scales, self.zeros]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight^T, [M, N], for x [M, K] of this dtype."""
        return linear(x.contiguous(), self)


def repack_for_triton(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group_size: int
) -> PackedWeight:
    """Return a checkpoint's weight, whose input channels lie in the order of their groups, in the kernels' layout.

    Args:
        qweight: [K * bits / 32, N] int32, as packing.pack_rows packs it.
        scales: [G, N], bfloat16 or float16.
        zeros: [G, N] zero points, any number type, with the format's offset added.
        bits: 4 or 8.
        group_size: input channels of a group: a multiple of 32 that divides a block or is a multiple of one, or any
            number if there is one group (-1 or K).

    Raises:
        ValueError: bits, group size or dtype are none of these; the message gives the value.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: the Triton kernels multiply weights of 4 and 8 bits.")
    if scales.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"scales of {scales.dtype}: the Triton kernels take bfloat16 and float16; set dtype to one.")
    num_inputs, num_outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    slots = 32 // bits
    block = slots * WORDS
    blocks = -(-num_inputs // block)
    num_groups = scales.shape[0]
    group_size = blocks * block if num_groups == 1 else group_size
    if group_size % WORDS or (block % group_size and group_size % block):
        raise ValueError(f"group_size={group_size}: the Triton kernels take 32, 64, 128, multiples of {block}, and -1.")
    values = packing.unpack_rows(qweight, bits)  # [K, N]
    values = F.pad(values, (0, 0, 0, blocks * block - num_inputs))
    values = values.view(blocks, slots, WORDS, num_outputs).permute(0, 3, 2, 1)  # [blocks, N, WORDS, slots]
    words = torch.zeros(blocks, num_outputs, WORDS, dtype=torch.int32, device=qweight.device)
    for slot in range(slots):
        words |= values[..., slot].to(torch.int32) << (slot * bits)
    groups = max(1, block // group_size)
    starts = torch.arange(blocks * groups, device=scales.device) * (block // groups)
    index = (starts // group_size).clamp(max=num_groups - 1)
    middle = 1 << (bits - 1)
    return PackedWeight(
        words,
        _pair(scales[index], blocks, groups),
        None if bool((zeros == middle).all()) else _pair(zeros.to(scales.dtype)[index], blocks, groups),
        bits,
        num_inputs,
        groups,
        scales.dtype,
    )


def _pair(values: torch.Tensor, blocks: int, groups: int) -> torch.Tensor:
    """Return values [blocks * groups, N], of 16 bits, as [blocks, pairs, N] int32; an odd last one is paired with 0."""
    values = values.view(blocks, groups, -1)
    if groups % 2:
        values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
    values = values.view(blocks, values.shape[1] // 2, 2, -1).transpose(2, 3).contiguous()  # [blocks, pairs, N, 2]
    return values.view(torch.int32).squeeze(-1)


def _unpair(pairs: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [blocks, groups, N] of 16-bit values; the inverse of _pair."""
    blocks, num_pairs, num_outputs = pairs.shape
    values = pairs.unsqueeze(-1).view(dtype).transpose(2, 3)  # [blocks, pairs, 2, N]
    return values.reshape(blocks, 2 * num_pairs, num_outputs)[:, :groups]


def dequantize_torch(weight: PackedWeight) -> torch.Tensor:
    """The twin of `dequantize_packed`: the whole weight, [N, K]."""
    slots = 32 // weight.bits
    shifts = torch.arange(slots, dtype=torch.int32, device=weight.words.device) * weight.bits
    values = weight.words.unsqueeze(1) >> shifts.view(1, slots, 1, 1)  # [blocks, slots, N, WORDS]
    values &= 2**weight.bits - 1
    per_group = slots // weight.groups
    scales = _unpair(weight.scales, weight.groups, weight.dtype).repeat_interleave(per_group, dim=1).unsqueeze(-1)
    if weight.zeros is None:
        zeros = torch.full_like(scales, 1 << (weight.bits - 1))
    else:
        zeros = _unpair(weight.zeros, weight.groups, weight.dtype).repeat_interleave(per_group, dim=1).unsqueeze(-1)
    dequantized: torch.Tensor = ((values.float() - zeros.float()) * scales.float()).to(weight.dtype)
    return dequantized.permute(2, 0, 1, 3).reshape(weight.num_outputs, -1)[:, : weight.num_inputs].contiguous()


def packed_linear_torch(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of `linear`."""
    return linear_torch(x, dequantize_torch(weight), bias, residual)


def gate_up_torch(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `gate_up`."""
    return silu_mul_torch(packed_linear_torch(x, weight, bias))


def norm_torch(x: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What `norm_linear` and `norm_gate_up` do to x first; their twins are the other twins of its result."""
    return F.rms_norm(x, norm_weight.shape, norm_weight, eps)


def linear_norm_torch(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The twin of `linear_norm`."""
    return rms_norm_torch(packed_linear_torch(x, weight, bias), norm_weight, eps, residual)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemvConfig | PackedGemmConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight^T + bias, rounded, then + residual where given: [M, N] in x's dtype.

    Args:
        x: [M, K], contiguous, of weight's dtype.
        weight: [N, K], packed. bias: [N].
        residual: [M, N], contiguous; only read.
        pdl: start early; see small_batch_linear.py.
        config: tiles, of the kind that M asks for or, at M = 1, either; None: the defaults.
    """
    if not runs_on_triton(x):
        return packed_linear_torch(x, weight, bias, residual)
    m, n = x.shape[0], weight.num_outputs
    tile = config or default_config(m, n, weight.num_inputs, False)
    if tile is None:
        out = _multiply_dequantized(x, weight)
        out = out if bias is None else out.add_(bias)
        return out if residual is None else out.add_(residual)
    if isinstance(tile, GemvConfig):
        return _launch_gemv(x, None, 0.0, weight, bias, residual, tile, gated=False, pdl=pdl)
    if tile.splits == 1:
        return _launch_gemm(x, weight, bias, residual, tile, gated=False, pdl=pdl)
    from folovllm.model_executor.layers.quantization.triton_gptq_kernels import sum_parts_kernel

    parts = _launch_gemm(x, weight, None, None, tile, gated=False, pdl=pdl)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    options = {"launch_pdl": True} if pdl else {}
    sum_parts_kernel[(-(-m * n // 512),)](
        parts, bias, residual, out, m, N=n, SPLITS=tile.splits, BLOCK=512, PDL=pdl, num_warps=4, **options
    )
    return out


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """Return linear(rms_norm(x), weight, bias) [M, N]: at M = 1 one kernel, at more two. Arguments: see `linear`."""
    return _norm_product(x, norm_weight, eps, weight, bias, gated=False, pdl=pdl, config=config)


def gate_up(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemvConfig | PackedGemmConfig | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up, [M, N], for gate | up = linear(x, weight, bias) and weight [2 N, K]; see `linear`.

    Gate, up, silu(gate) and the product are each rounded to x's dtype, as separate kernels would.
    """
    if not runs_on_triton(x):
        return gate_up_torch(x, weight, bias)
    tile = config or default_config(x.shape[0], weight.num_outputs // 2, weight.num_inputs, True)
    if tile is None:
        return silu_and_mul(linear(x, weight, bias), pdl=pdl)
    if isinstance(tile, GemvConfig):
        return _launch_gemv(x, None, 0.0, weight, bias, None, tile, gated=True, pdl=pdl)
    if not tile.fuses_silu:
        return silu_and_mul(linear(x, weight, bias, pdl=pdl, config=tile), pdl=pdl)
    return _launch_gemm(x, weight, bias, None, tile, gated=True, pdl=pdl)


def norm_gate_up(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """Return gate_up(rms_norm(x), weight, bias) [M, N]: `norm_linear` with the epilogue of `gate_up`."""
    return _norm_product(x, norm_weight, eps, weight, bias, gated=True, pdl=pdl, config=config)


def linear_norm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    *,
    pdl: bool = False,
    config: PackedGemmConfig | None = None,
) -> torch.Tensor:
    """Return fused_ops.rms_norm(linear(x, weight, bias), norm_weight, eps, residual), [M, N]; residual is overwritten.

    As batch_linear.linear_norm: where the product is cut along K, the norm is what adds the parts.
    """
    if not runs_on_triton(x):
        return linear_norm_torch(x, weight, bias, residual, norm_weight, eps)
    m, n = x.shape[0], weight.num_outputs
    tile = config or default_config(m, n, weight.num_inputs, False)
    if not isinstance(tile, PackedGemmConfig) or tile.splits == 1:
        return rms_norm(linear(x, weight, bias, pdl=pdl, config=tile), norm_weight, eps, residual, pdl=pdl)
    from folovllm.model_executor.layers.triton_gemm import sum_norm_kernel

    assert residual.is_contiguous() and residual.shape == (m, n), residual.shape
    parts = _launch_gemm(x, weight, None, None, tile, gated=False, pdl=pdl)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block = power_of_2_at_least(n)
    options: dict[str, Any] = {"N": n, "SPLITS": tile.splits, "BLOCK": block, "PDL": pdl}
    options |= {"launch_pdl": True} if pdl else {}
    warps = min(8, max(1, block // 128))
    sum_norm_kernel[(m,)](parts, bias, residual, norm_weight, out, eps, m, **options, num_warps=warps)
    return out


def dequantize_packed(
    weight: PackedWeight, first: int = 0, last: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return weight rows `first` to `last` (default: all), [last - first, K], rounded to the weight's dtype.

    Args:
        weight: the packed weight.
        first: a row.
        last: one past the last row.
        out: [last - first or more, K], contiguous: where they go; None: a new tensor.
    """
    last = weight.num_outputs if last is None else last
    rows, k = last - first, weight.num_inputs
    if out is None:
        out = torch.empty(rows, k, dtype=weight.dtype, device=weight.words.device)
    if not runs_on_triton(out):
        return out[:rows].copy_(dequantize_torch(weight)[first:last])
    from folovllm.model_executor.layers.quantization.triton_gptq_kernels import dequantize_kernel

    assert out.is_contiguous() and out.shape[1] == k and out.dtype == weight.dtype, (out.shape, out.dtype)
    block_n = 32
    dequantize_kernel[(-(-rows // block_n), weight.words.shape[0])](
        *_pointers(weight),
        out,
        first,
        rows,
        N=weight.num_outputs,
        K=k,
        GROUPS=weight.groups,
        BITS=weight.bits,
        BLOCK_N=block_n,
        ASM=weight.asm,
        num_warps=4,
    )
    return out[:rows]


def runs_on_triton(x: torch.Tensor) -> bool:
    """Return whether the kernels take x [M, K]: on CUDA, at least a row, a 16-bit dtype."""
    return x.is_cuda and x.shape[0] > 0 and x.dtype in (torch.bfloat16, torch.float16)


def _norm_product(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    gated: bool,
    pdl: bool,
    config: GemvConfig | None,
) -> torch.Tensor:
    """Do the work of norm_linear and norm_gate_up."""
    if not runs_on_triton(x):
        normed = norm_torch(x, norm_weight, eps)
        return (gate_up_torch if gated else packed_linear_torch)(normed, weight, bias)
    outputs = weight.num_outputs // (2 if gated else 1)
    tile = config or default_config(x.shape[0], outputs, weight.num_inputs, gated)
    if isinstance(tile, GemvConfig):
        return _launch_gemv(x, norm_weight, eps, weight, bias, None, tile, gated=gated, pdl=pdl)
    normed = rms_norm(x, norm_weight, eps, pdl=pdl)
    return (gate_up if gated else linear)(normed, weight, bias, pdl=pdl, config=tile)


def _multiply_dequantized(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x @ weight^T, dequantizing WORKSPACE_BYTES of the weight at a time."""
    n, k = weight.num_outputs, weight.num_inputs
    parts = -(-n * k * 2 // WORKSPACE_BYTES)
    rows = min(n, -(-n // (parts * 256)) * 256)
    workspace = torch.empty(rows, k, dtype=weight.dtype, device=x.device)
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        last = min(n, first + rows)
        torch.mm(x, dequantize_packed(weight, first, last, workspace).t(), out=out[:, first:last])
    return out


def _runs_ptx(weight: PackedWeight) -> bool:
    """Return whether kernels may hold PTX: not in the interpreter, nor on AMD's GPUs."""
    return weight.words.is_cuda and torch.version.cuda is not None


def _pointers(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return weight.words, weight.scales, weight.zeros


def _check(x: torch.Tensor, weight: PackedWeight) -> None:
    assert x.is_contiguous() and x.shape[1] == weight.num_inputs, (x.shape, weight.num_inputs)
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)


def _launch_gemv(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    tile: GemvConfig,
    *,
    gated: bool,
    pdl: bool,
) -> torch.Tensor:
    """Run the kernel of one row; return [1, N]."""
    from folovllm.model_executor.layers.quantization.triton_gptq_kernels import packed_gemv_kernel

    _check(x, weight)
    n = weight.num_outputs // (2 if gated else 1)
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    chunks = -(-weight.words.shape[0] // tile.step_blocks)
    options = {"launch_pdl": True} if pdl else {}
    packed_gemv_kernel[(-(-n // (tile.block_n * tile.row_tiles)),)](
        x,
        norm_weight,
        *_pointers(weight),
        bias,
        addend,
        out,
        eps,
        N=n,
        K=weight.num_inputs,
        GROUPS=weight.groups,
        BITS=weight.bits,
        GATED=gated,
        BLOCK_N=tile.block_n,
        STEP_BLOCKS=tile.step_blocks,
        ROW_TILES=tile.row_tiles,
        PREFETCH=min(tile.prefetch, tile.row_tiles * chunks * (2 if gated else 1)),
        ASM=_runs_ptx(weight),
        PDL=pdl,
        num_warps=tile.num_warps,
        **options,
    )
    return out


def _launch_gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    tile: PackedGemmConfig,
    *,
    gated: bool,
    pdl: bool,
) -> torch.Tensor:
    """Run the kernel of several rows; return [M, N] or, with several splits, the parts [S, M, N] in float32."""
    from folovllm.model_executor.layers.quantization.triton_gptq_kernels import packed_gemm_kernel

    _check(x, weight)
    assert tile.splits == 1 or not (gated or bias is not None or addend is not None), tile
    m, k = x.shape
    n = weight.num_outputs // (2 if gated else 1)
    if tile.splits == 1:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device)
    x_desc = None
    if tile.tma and k * x.element_size() % 16 == 0:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_desc = TensorDescriptor.from_tensor(x, [tile.block_m, 1024 // weight.bits])
    options = {"launch_pdl": True} if pdl else {}
    packed_gemm_kernel[(-(-m // tile.block_m) * -(-n // tile.block_n), tile.splits)](
        x,
        *_pointers(weight),
        bias,
        addend,
        out,
        x_desc,
        m,
        N=n,
        K=k,
        GROUPS=weight.groups,
        BITS=weight.bits,
        GATED=gated,
        SPLITS=tile.splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PREFETCH=tile.prefetch if pdl else 0,
        ASM=weight.asm,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    return out
