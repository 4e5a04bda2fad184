"""Words that may not be generated (vLLM: `v1/sample/ops/bad_words.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def apply_bad_words(
    logits: torch.Tensor,
    bad_words_token_ids: Mapping[int, Sequence[Sequence[int]]],
    output_token_ids: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Set to -inf, in place, the logit of every token that would complete a bad word; return `logits`.

    Args:
        logits: [B, V].
        bad_words_token_ids: row -> words, each a list of token ids. A word of one token is always forbidden;
            a longer one forbids its last token where the output ends with all its others.
        output_token_ids: per row, the tokens generated so far.
    """
    rows: list[int] = []
    forbidden: list[int] = []
    for row, words in bad_words_token_ids.items():
        output = output_token_ids[row]
        for word in words:
            *prefix, last = word
            start = len(output) - len(prefix)
            if start >= 0 and list(output[start:]) == prefix:
                rows.append(row)
                forbidden.append(last)
    if rows:
        logits[rows, forbidden] = float("-inf")
    return logits
