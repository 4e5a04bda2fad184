"""Masks of structured output: what a grammar forbids becomes -inf (vLLM: `v1/structured_output/utils.py`).

A mask has one bit per token, 32 to a word: 6 KB a row for V = 49152, so that it travels to the device quickly. There
Triton unpacks it; on CPUs numpy does, in 20 us a row.

Legend: B requests, G of them with a grammar, V vocabulary, W = ceil(V / 32).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

NO_TOKEN = -1
"""In place of a token, where a grammar's row has none left to draw."""


class GrammarMask(NamedTuple):
    """The masks of a step's rows that have a grammar, on the device of the logits."""

    rows: torch.Tensor
    """[G] int64, rows of the logits, all different."""
    bitmask: torch.Tensor
    """[G, W] int32: bit i % 32 of word i // 32 is 1 where token i may come."""


def apply_grammar_mask(logits: torch.Tensor, mask: GrammarMask) -> None:
    """Set what the masks forbid to -inf, in place; other rows are not touched. `logits` [B, V], rows contiguous."""
    if logits.is_cuda:
        from folovllm.sample.ops.triton_grammar_mask import apply_grammar_mask_triton

        apply_grammar_mask_triton(logits, mask.rows, mask.bitmask)
    elif logits.dtype == torch.float32:
        _apply_numpy(logits, mask)
    else:
        apply_grammar_mask_torch(logits, mask)


def _apply_numpy(logits: torch.Tensor, mask: GrammarMask) -> None:
    rows = logits.numpy()
    for row, words in zip(mask.rows.tolist(), mask.bitmask.numpy(), strict=True):
        bits = np.unpackbits(~words.astype("<i4", copy=False).view(np.uint8), bitorder="little")
        np.copyto(rows[row], np.float32("-inf"), where=bits[: rows.shape[1]].view(bool))


def apply_grammar_mask_torch(logits: torch.Tensor, mask: GrammarMask) -> None:
    """The definition of `apply_grammar_mask`, in torch."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((mask.bitmask.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[mask.rows] = logits[mask.rows].masked_fill(~allowed, float("-inf"))


def mark_dead_rows(tokens: torch.Tensor, logits: torch.Tensor, mask: GrammarMask) -> torch.Tensor:
    """Return tokens [B] with NO_TOKEN in the rows with a grammar that had no token left; nothing waits for the device.

    `logits` [B, V] are what the tokens were drawn from: a token that was forbidden was drawn for want of another.
    """
    drawn = tokens[mask.rows]
    marked = tokens.clone()
    marked[mask.rows] = torch.where(logits[mask.rows, drawn] == float("-inf"), NO_TOKEN, drawn)
    return marked
