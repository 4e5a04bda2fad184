"""Token embedding and LM head (vLLM: `layers/vocab_parallel_embedding.py`).

Simplified (vLLM: vocabulary split over ranks, LoRA rows, padding): one rank holds all V rows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from folovllm.model_executor.layers.linear import cpu_can_pack, linear_packed, pack_linear_weight


class VocabParallelEmbedding(nn.Module):
    """A table of V rows of E numbers."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        """The table is created empty in the current default dtype and device."""
        super().__init__()
        self.num_embeddings = num_embeddings
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, E] for input_ids [T] (int32 or int64)."""
        return F.embedding(input_ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    """The output projection; with tied embeddings it shares the embedding's table."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        """See VocabParallelEmbedding."""
        super().__init__(num_embeddings, embedding_dim)
        self._packed: torch.Tensor | None = None
        self._tied = False

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Use the embedding's table instead of an own one; return self."""
        self.weight = embedding.weight
        self._tied = True
        return self

    def process_weights_after_loading(self) -> None:
        """Prepack for oneDNN where that pays. A tied table stays for look-ups, so this copies it once more."""
        if cpu_can_pack(self.weight):
            self._packed = pack_linear_weight(self.weight.data)
            if not self._tied:
                self.weight = nn.Parameter(torch.empty(0, dtype=self._packed.dtype), requires_grad=False)

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V] in the model's dtype for hidden_states [n, E]."""
        if self._packed is not None:
            return linear_packed(hidden_states, self._packed, None)
        return F.linear(hidden_states, self.weight)
