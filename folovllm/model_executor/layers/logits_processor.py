"""LogitsProcessor: hidden states to float32 logits (vLLM: `model_executor/layers/logits_processor.py`)."""

from __future__ import annotations

import torch
from torch import nn

from folovllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class LogitsProcessor(nn.Module):
    """Applies the LM head. The caller picks the rows: only those that are sampled from need logits."""

    def forward(self, lm_head: ParallelLMHead, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V] float32 for hidden_states [n, E]."""
        return lm_head.compute(hidden_states).float()
