"""Repetition, frequency and presence penalties (vLLM: `v1/sample/ops/penalties.py`).

vLLM counts tokens in dense [B, V] tables. A sequence holds far fewer tokens than the vocabulary, so here only
the logits of tokens that occur are read and written: the cost follows the tokens, not B x V.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch


def apply_all_penalties(
    logits: torch.Tensor,
    prompt_token_ids: torch.Tensor,
    presence_penalties: torch.Tensor,
    frequency_penalties: torch.Tensor,
    repetition_penalties: torch.Tensor,
    output_token_ids: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Apply the three penalties to `logits` [B, V] in place and return it.

    Args:
        logits: float32.
        prompt_token_ids: [B, P] int64, padded with V.
        presence_penalties: [B], subtracted once from tokens of the output.
        frequency_penalties: [B], subtracted as often as the token is in the output.
        repetition_penalties: [B]; for tokens of prompt or output a positive logit is divided by it, a
            negative one multiplied. Applied before the other two.
        output_token_ids: B ragged lists; ids outside [0, V) (placeholders) do not count.
    """
    vocab_size = logits.shape[1]
    rows, tokens, counts = _count_tokens(output_token_ids, vocab_size, logits.device)
    prompt_rows, columns = (prompt_token_ids < vocab_size).nonzero(as_tuple=True)
    all_rows = torch.cat((prompt_rows, rows))
    all_tokens = torch.cat((prompt_token_ids[prompt_rows, columns], tokens))
    # A token that occurs several times is written several times with the same value: read first, then write.
    old = logits[all_rows, all_tokens]
    penalties = repetition_penalties[all_rows]
    logits[all_rows, all_tokens] = torch.where(old > 0, old / penalties, old * penalties)
    # These pairs are distinct.
    logits[rows, tokens] -= frequency_penalties[rows] * counts + presence_penalties[rows]
    return logits


def _count_tokens(
    token_lists: Sequence[Sequence[int]], vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row, token, count) of every distinct token of each list: int64, int64, float32 tensors."""
    lengths = np.fromiter(map(len, token_lists), dtype=np.int64, count=len(token_lists))
    tokens = np.fromiter(chain.from_iterable(token_lists), dtype=np.int64, count=int(lengths.sum()))
    rows = np.repeat(np.arange(len(token_lists)), lengths)
    valid = (tokens >= 0) & (tokens < vocab_size)
    pairs, counts = np.unique((rows * vocab_size + tokens)[valid], return_counts=True)
    return (
        torch.from_numpy(pairs // vocab_size).to(device),
        torch.from_numpy(pairs % vocab_size).to(device),
        torch.from_numpy(counts.astype(np.float32)).to(device),
    )
