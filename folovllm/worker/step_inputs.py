"""StepInputs: what the host tells the GPU about a step, in one copy (vLLM: `v1/worker/gpu/buffer_utils.py`).

The host works out the flat batch with numpy and packs it into one pinned buffer of 32-bit numbers; one asynchronous
copy brings it over, and one kernel unpacks it into tensors whose addresses never change, so that CUDA graphs can read
them:

    packed   | input ids | source | positions | slots | sequence lengths | order | query starts | block table rows
               T           T        T           T       B                  B       B + 1          R x W, R row numbers

    unpack   input_ids[i] = source[i] >= 0 ? sampled[source[i]] : id[i]
             positions, slot_mapping, seq_lens, draw_positions

    order    of a recorded decode step that wants one: its requests, the longest contexts first

The host does not know every token: those that a step in flight samples stay on the GPU, in `sampled`.

Two packed buffers would do, as at most two steps are in flight: a third keeps the host from waiting for the copy.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are typed by Triton, from the arguments of each launch.

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from folovllm.utils.common import cdiv
from folovllm.utils.triton_launch import fast_launch

NUM_BUFFERS = 3
BLOCK = 256
EXTRA = 1 << 14
"""Room for what else a step packs: the query tiles of a prompt step."""


@fast_launch
@triton.jit(do_not_specialize=["num_tokens", "num_reqs"])
def _unpack_kernel(
    packed, sampled, input_ids, positions, slot_mapping, seq_lens, draw_positions, num_tokens, num_reqs,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    token = i < num_tokens
    known = tl.load(packed + i, mask=token, other=0)
    source = tl.load(packed + num_tokens + i, mask=token, other=-1)
    drawn = tl.load(sampled + source, mask=token & (source >= 0), other=0)
    tl.store(input_ids + i, tl.where(source >= 0, drawn, known.to(tl.int64)), mask=token)
    tl.store(positions + i, tl.load(packed + 2 * num_tokens + i, mask=token, other=0).to(tl.int64), mask=token)
    tl.store(slot_mapping + i, tl.load(packed + 3 * num_tokens + i, mask=token, other=0).to(tl.int64), mask=token)
    request = i < num_reqs
    length = tl.load(packed + 4 * num_tokens + i, mask=request, other=0)
    tl.store(seq_lens + i, length, mask=request)
    tl.store(draw_positions + i, length.to(tl.int64), mask=request)


@fast_launch
@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["rows", "values"])
def _write_rows_kernel(table, rows, values, width, stride_table, BLOCK_SIZE: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    i = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    value = tl.load(values + tl.program_id(0) * width + i, mask=i < width, other=0)
    tl.store(table + row * stride_table + i, value, mask=i < width)


class StepInputs:
    """The persistent device tensors of a step, and the way there. Rows beyond a step's own hold old values."""

    def __init__(self, max_num_tokens: int, max_num_reqs: int, max_num_blocks: int, device: torch.device) -> None:
        """Reserve room for steps of up to `max_num_tokens` tokens of `max_num_reqs` requests of `max_num_blocks`."""

        def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.device = device
        self.sampled = zeros(max_num_reqs, torch.int64)
        """Tokens of the last step that sampled, by its rows."""
        self.input_ids = zeros(max_num_tokens, torch.int64)
        self.positions = zeros(max_num_tokens, torch.int64)
        self.slot_mapping = zeros(max_num_tokens, torch.int64)
        self.seq_lens = zeros(max_num_reqs, torch.int32)
        self.draw_positions = zeros(max_num_reqs, torch.int64)
        """Index of the token that each request draws: its sequence length."""
        self.block_table = torch.zeros((max_num_reqs, max_num_blocks), dtype=torch.int32, device=device)
        size = 4 * max_num_tokens + 4 * max_num_reqs + 1 + max_num_reqs * (max_num_blocks + 1) + EXTRA
        self._packed = zeros(size, torch.int32)
        self._pinned = [torch.empty(size, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._next = 0
        self._host = self._pinned[0].numpy()
        self._used = 0

    def begin(self) -> None:
        """Start packing a step."""
        self._host = self._pinned[self._next].numpy()
        self._next = (self._next + 1) % NUM_BUFFERS
        self._used = 0

    def pack(self, values: npt.NDArray[np.integer], size: int | None = None, padding: int = 0) -> torch.Tensor:
        """Append `values` as int32, filled up to `size` with `padding`; return where they will be on the device."""
        start, end = self._used, self._used + values.size
        self._host[start:end] = values.reshape(-1)
        self._used = end if size is None else start + size
        self._host[end : self._used] = padding
        return self._packed[start : self._used]

    def send(self) -> None:
        """Start the copy of all that was packed."""
        pinned = self._pinned[self._next - 1]
        self._packed[: self._used].copy_(pinned[: self._used], non_blocking=True)

    def order(self, num_reqs: int) -> torch.Tensor:
        """Return where the order [num_reqs] of a decode step lies: behind as many ids, sources, and so on."""
        return self._packed[5 * num_reqs : 6 * num_reqs]

    def unpack(self, num_tokens: int, num_reqs: int) -> None:
        """Launch the kernel for a buffer that begins with ids, source, positions, slots and sequence lengths."""
        grid = (cdiv(max(num_tokens, num_reqs), BLOCK),)
        _unpack_kernel[grid](
            self._packed,
            self.sampled,
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.seq_lens,
            self.draw_positions,
            num_tokens,
            num_reqs,
            BLOCK_SIZE=BLOCK,
        )

    def write_block_table(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Launch the copy of packed `values` [R * W] into the first W columns of the packed row numbers `rows` [R]."""
        num_rows = rows.shape[0]
        width = values.shape[0] // num_rows
        grid = (num_rows, cdiv(width, BLOCK))
        _write_rows_kernel[grid](self.block_table, rows, values, width, self.block_table.stride(0), BLOCK_SIZE=BLOCK)
