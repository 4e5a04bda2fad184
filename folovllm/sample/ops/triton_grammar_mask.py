"""The mask of structured output on CUDA, in Triton; `grammar_mask.py` has the definition.

A program takes a block of one row: it loads a word for every 32 tokens, and stores -inf where a bit is 0. Logits that
stay are neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from folovllm.utils.triton_launch import fast_launch

BLOCK = 4096
"""Tokens of a program: 128 words."""


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _mask_kernel(logits, rows, bitmask, vocab_size, logits_stride, bitmask_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (G, ceil(V / BLOCK)); logits [B, V], rows [G], bitmask [G, W]."""
    grammar = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    words = tl.load(bitmask + grammar * bitmask_stride + tokens // 32, mask=inside, other=0)
    forbidden = ((words >> (tokens % 32)) & 1) == 0
    row = tl.load(rows + grammar)
    tl.store(logits + row * logits_stride + tokens, float("-inf"), mask=inside & forbidden)


def apply_grammar_mask_triton(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Set what the masks forbid to -inf, in place.

    Args:
        logits: [B, V] float, rows contiguous.
        rows: [G] int64.
        bitmask: [G, W] int32.
    """
    num_rows, vocab_size = len(rows), logits.shape[1]
    if num_rows == 0:
        return
    grid = (num_rows, triton.cdiv(vocab_size, BLOCK))
    _mask_kernel[grid](logits, rows, bitmask, vocab_size, logits.stride(0), bitmask.stride(0), BLOCK=BLOCK)
