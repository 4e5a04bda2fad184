"""Logprobs and ranks of chosen tokens (vLLM: `v1/sample/sampler.py`, `v1/sample/ops/logprobs.py`)."""

from __future__ import annotations

import torch

from folovllm.outputs import LogprobsTensors
from folovllm.sample.ops.topk_topp import best_tokens


def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Return log softmax of `logits` [n, V] over the vocabulary, float32, as a new tensor."""
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
    """Return the log probabilities of the given tokens and of the best `num_logprobs` ones.

    Args:
        logprobs: [n, V] float32.
        num_logprobs: k; 0 gives the chosen tokens alone, -1 (or more than there are) means k = V.
        token_ids: [n] integers, the sampled (or prompt) token of each row.

    Returns:
        Columns [n, k + 1]: the chosen token, then the best k in falling order (the chosen one may be among
        them). The rank of a token is the number of tokens at least as likely, itself included: 1 is the best.
    """
    chosen_ids = token_ids.to(torch.int64).unsqueeze(-1)
    chosen = logprobs.gather(-1, chosen_ids)
    ranks = (logprobs >= chosen).sum(-1)
    if num_logprobs == 0:
        return LogprobsTensors(chosen_ids, chosen, ranks)
    vocab_size = logprobs.shape[-1]
    k = vocab_size if num_logprobs == -1 else min(num_logprobs, vocab_size)
    best, best_ids = best_tokens(logprobs, k)
    return LogprobsTensors(torch.cat((chosen_ids, best_ids), dim=-1), torch.cat((chosen, best), dim=-1), ranks)
