"""Products with packed weights on a CPU: our kernels, else torch's int4 kernel for few rows and plain blocks for many.

A weight stays packed, at a quarter (4 bits) or half (8 bits) of bfloat16's bytes. In bfloat16 on processors with AMX
our own kernels multiply with 4 bits (csrc/cpu_int4_bf16.h). Elsewhere a product is made in one of two ways:

    few rows    torch's kernel takes the integers apart in registers, while it multiplies. What counts is how few bytes
                come from memory. Its work grows with the rows.
    many rows   a block of outputs at a time becomes plain numbers, in a buffer that fits the cache, and a plain product
                takes it from there. Taking apart costs the same for any number of rows.

Eight bits are two planes of four, q = 16 high + low, so the same kernel serves both:

    s (q - z)  =  16 s (high - 8)  +  s (low - 8)  +  s (136 - z)

Where torch's kernel does not take the shape, the second way serves all rows.

vLLM: `model_executor/kernels/linear/mixed_precision/cpu.py`, with kernels of its own.

Legend: K input channels, n output channels, G groups, M rows of x.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from folovllm.utils import cpu_kernels

KERNEL_GROUP_SIZES = (256, 128, 64, 32)
"""What torch's int4 kernel takes; a larger group is cut into equal ones."""
KERNEL_MAX_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 64}
"""Up to this many rows torch's kernel is faster than blocks, with one plane (measured: tests/benchmark/gptq_cpu.py)."""
BLOCK_NUMBERS = 1 << 20
"""Numbers in a block of plain weights: 2 MB of bfloat16."""


def pack(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> AMXInt4Weight | Int4KernelWeight | BlockedWeight:
    """Return scales * (values - zeros) packed: see gptq.pack for the arguments."""
    (num_inputs, num_outputs), num_groups = values.shape, scales.shape[0]
    on_amx = values.device.type == "cpu" and bits == 4
    if on_amx and cpu_kernels.multiplies_int4(scales.dtype, num_inputs, num_outputs, num_inputs // num_groups):
        return AMXInt4Weight(values, scales, zeros)
    if kernel_fits(values, scales):
        return Int4KernelWeight(values, scales, zeros, bits)
    return BlockedWeight(values, scales, zeros, bits)


def kernel_fits(values: torch.Tensor, scales: torch.Tensor) -> bool:
    """Return whether torch's int4 kernel takes `values` [K, n] with `scales` [G, n]."""
    num_inputs, num_outputs = values.shape
    # The largest number that packing makes of a scale; float16 might not hold it.
    in_range = bool((scales.float().abs() * 256 < torch.finfo(scales.dtype).max).all())
    return (
        in_range
        and values.device.type == "cpu"
        and scales.dtype in KERNEL_MAX_ROWS
        and num_outputs % 16 == 0
        and _kernel_group_size(num_inputs // scales.shape[0]) is not None
        and _layout() is not None
    )


class AMXInt4Weight:
    """Four bits for our own kernels, at any number of rows (csrc/cpu_int4_bf16.h)."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Arguments as for gptq.pack."""
        self.packed = cpu_kernels.pack_int4(values.t().contiguous())
        self.scales, self.zeros = scales.t().contiguous(), zeros.t().to(torch.uint8).contiguous()

    def tensors(self) -> list[torch.Tensor]:
        """Return all that is stored."""
        return [self.packed, self.scales, self.zeros]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight^T [M, n] in x's dtype, for x [M, K]."""
        return cpu_kernels.linear_int4(x if x.stride(1) == 1 else x.contiguous(), self.packed, self.scales, self.zeros)


class Int4KernelWeight:
    """One or two planes of four bits in the layout of torch's int4 kernel.

    The kernel computes (nibble - 8) * scale + offset, so offsets, not zero points, are stored beside the scales.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> None:
        """Arguments as for gptq.pack."""
        self.num_inputs, self.num_outputs = values.shape
        group_size = self.num_inputs // scales.shape[0]
        kernel_group_size = _kernel_group_size(group_size)
        assert kernel_group_size is not None
        self.group_size = kernel_group_size
        scales = scales.repeat_interleave(group_size // kernel_group_size, 0)
        zeros = zeros.repeat_interleave(group_size // kernel_group_size, 0)
        rows = values.t().int().contiguous()
        if bits == 4:
            self.planes = [_pack_plane(rows, scales, (8 - zeros) * scales)]
        else:
            # Of a symmetric weight, zero point 128, both offsets are exact.
            self.planes = [
                _pack_plane(rows >> 4, 16 * scales, (128 - zeros) * scales),
                _pack_plane(rows & 15, scales, 8 * scales),
            ]
        self.max_kernel_rows = KERNEL_MAX_ROWS[scales.dtype] // len(self.planes)

    def tensors(self) -> list[torch.Tensor]:
        """Return all that is stored."""
        return [tensor for plane in self.planes for tensor in plane]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight^T [M, n] in x's dtype, for x [M, K]."""
        if x.shape[0] > self.max_kernel_rows:
            return self._multiply_by_blocks(x)
        x = x.contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        packed, scales_and_offsets = self.planes[0]
        out: torch.Tensor = multiply(x, packed, self.group_size, scales_and_offsets)
        for packed, scales_and_offsets in self.planes[1:]:
            out += multiply(x, packed, self.group_size, scales_and_offsets)
        return out

    def _multiply_by_blocks(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self.num_outputs)
        for start, weight in self.blocks():
            out[:, start : start + weight.shape[1]] = x @ weight
        return out

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first output, plain weights [K, outputs]); each is overwritten when the next is made."""
        block_size, _ = _checked_layout()
        whole = self.num_outputs - self.num_outputs % block_size
        step = max(1, BLOCK_NUMBERS // (self.num_inputs * block_size)) * block_size
        for start in range(0, whole, step):
            yield start, self._block(start, min(whole, start + step), block_size)
        if whole < self.num_outputs:
            yield whole, self._block(whole, self.num_outputs, self.num_outputs - whole)

    def _block(self, start: int, stop: int, tile: int) -> torch.Tensor:
        """Return plain weights [K, stop - start], whose outputs lie in tiles of `tile`."""
        (packed, scales_and_offsets), *others = self.planes
        offsets = scales_and_offsets[:, None, start:stop, 1]
        if others:
            high = self._nibbles(packed, start, stop, tile, torch.uint8)
            integers = (high << 4) | self._nibbles(others[0][0], start, stop, tile, torch.uint8)
            numbers, middle = integers.to(offsets.dtype), 128
            # The low plane's scale is the weight's own; its offset only undoes what the kernel subtracts from it.
            scales = others[0][1][:, None, start:stop, 0]
        else:
            numbers, middle = self._nibbles(packed, start, stop, tile, offsets.dtype), 8
            scales = scales_and_offsets[:, None, start:stop, 0]
        grouped = numbers.view(-1, self.group_size, stop - start)
        # One rounding, as the sum is taken in float32; and a symmetric weight's offset, 8 or 128 scales, is exact.
        return torch.addcmul(offsets - middle * scales, grouped, scales.contiguous()).view(numbers.shape)

    def _nibbles(self, packed: torch.Tensor, start: int, stop: int, tile: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the integers [K, stop - start] of a plane, in `dtype`; the outputs lie in tiles of `tile`."""
        tiles = packed[start:stop].view(-1, self.num_inputs, tile // 2).transpose(0, 1)
        return _take_apart(tiles, tile, tile == _checked_layout()[0] and _checked_layout()[1], dtype)


class BlockedWeight:
    """Integers packed into bytes [n, K * bits / 8], made plain a block of outputs at a time; any device."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> None:
        """Arguments as for gptq.pack."""
        rows = values.t().contiguous()
        self.bits = bits
        half = rows.shape[1] // 2
        # The byte of input channel k < K / 2 holds channel k + K / 2, too: both halves come out as neighbours.
        self.packed = rows[:, :half] | (rows[:, half:] << 4) if bits == 4 else rows
        self.scales = scales.t().contiguous()
        self.zeros = zeros.t().contiguous().to(torch.uint8 if bits == 4 else torch.int16)

    def tensors(self) -> list[torch.Tensor]:
        """Return all that is stored."""
        return [self.packed, self.scales, self.zeros]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight^T [M, n] in x's dtype, for x [M, K]."""
        x = x.contiguous()
        num_outputs, num_inputs = self.packed.shape[0], x.shape[1]
        step = max(16, BLOCK_NUMBERS // num_inputs)
        out = x.new_empty(x.shape[0], num_outputs)
        for start in range(0, num_outputs, step):
            weight = self.plain(start, min(num_outputs, start + step))
            product = cpu_kernels.linear if cpu_kernels.multiplies(weight) else F.linear
            out[:, start : start + step] = product(x, weight)
        return out

    def plain(self, start: int, stop: int) -> torch.Tensor:
        """Return the weights [stop - start, K] of some outputs, as plain numbers."""
        scales, zeros = self.scales[start:stop, :, None], self.zeros[start:stop, :, None]
        packed = self.packed[start:stop]
        integers = torch.cat((packed & 15, packed >> 4), dim=1) if self.bits == 4 else packed
        grouped = integers.view(*scales.shape[:2], -1).to(scales.dtype)
        return (grouped.sub_(zeros).mul_(scales)).view(integers.shape)


def _kernel_group_size(group_size: int) -> int | None:
    """Return the largest group size of torch's kernel that divides `group_size`."""
    return next((size for size in KERNEL_GROUP_SIZES if group_size % size == 0), None)


def _pack_plane(rows: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nibbles [n, K] int32 in the kernel's layout, [n, K / 2] uint8, and [G, n, 2] of what they are worth."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 1)
    return packed, torch.stack((scales, offsets.to(scales.dtype)), dim=-1)


# Torch's layout is its own affair and depends on the processor: outputs lie in tiles, and a tile is [K, tile / 2]
# bytes. A byte of a whole tile holds outputs i and i + tile / 2, one of a rest of fewer outputs i and i + 1.


def _take_apart(tiles: torch.Tensor, tile: int, by_halves: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return the nibbles [K, tiles * tile] of bytes [K, tiles, tile / 2], converted to `dtype`."""
    num_inputs, num_tiles, half = tiles.shape
    out = torch.empty((num_inputs, num_tiles, 2, half) if by_halves else (num_inputs, num_tiles, half, 2), dtype=dtype)
    low, high = out.unbind(2 if by_halves else 3)
    low.copy_(tiles & 15)
    high.copy_(tiles >> 4)
    return out.view(num_inputs, num_tiles * tile)


def _checked_layout() -> tuple[int, bool]:
    layout = _layout()
    assert layout is not None, "kernel_fits was not asked"
    return layout


@functools.cache
def _layout() -> tuple[int, bool] | None:
    """Return (outputs in a tile, whether its bytes hold outputs half a tile apart), found by packing a sample.

    None: torch has no such kernel, or a layout that is none of those known.
    """
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    generator = torch.Generator().manual_seed(0)
    for tile in (64, 32, 16):
        rows = torch.randint(0, 16, (2 * tile, 32), generator=generator, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 1).view(2, 32, tile // 2)
        for by_halves in (True, False):
            if torch.equal(_take_apart(packed.transpose(0, 1), tile, by_halves, torch.int32), rows.t()):
                return tile, by_halves
    return None
