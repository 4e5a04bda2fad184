"""Token embedding and LM head (vLLM: `layers/vocab_parallel_embedding.py`).

Simplified (vLLM: vocabulary split over ranks, LoRA rows, padding): one rank holds all V rows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from folovllm.model_executor.layers import batch_linear, small_batch_linear
from folovllm.model_executor.layers.linear import cpu_can_pack, linear_packed, pack_linear_weight
from folovllm.utils import cpu_kernels


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
        self._uses_cpu_kernel = False
        self._tied = False
        self.deterministic = False
        """One tile for every number of rows, on CUDA."""

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Use the embedding's table instead of an own one; return self."""
        self.weight = embedding.weight
        self._tied = True
        return self

    def process_weights_after_loading(self) -> None:
        """Choose our CPU kernel, which takes the table as it is, or prepack for oneDNN where that pays.

        A tied table stays for look-ups, so packing copies it once more.
        """
        self._uses_cpu_kernel = cpu_kernels.multiplies(self.weight)
        if not self._uses_cpu_kernel and cpu_can_pack(self.weight):
            self._packed = pack_linear_weight(self.weight.data)
            if not self._tied:
                self.weight = nn.Parameter(torch.empty(0, dtype=self._packed.dtype), requires_grad=False)

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V], in the model's dtype or float32, for hidden_states [n, E]."""
        if self.deterministic:
            return batch_linear.deterministic_linear(hidden_states, self.weight)
        if self._uses_cpu_kernel:
            return cpu_kernels.linear(hidden_states, self.weight, float_output=True)
        if self._packed is not None:
            return linear_packed(hidden_states, self._packed, None)
        return F.linear(hidden_states, self.weight)

    def compute_into(self, out: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Write the logits of hidden_states [n, E] into `out` [n, V], of the model's dtype; on CUDA."""
        if self.deterministic:
            batch_linear.deterministic_linear(hidden_states, self.weight, out=out)
        elif small_batch_linear.runs_on_triton(hidden_states) and hidden_states.shape[0] == 1:
            small_batch_linear.linear(hidden_states, self.weight, out=out)
        else:
            torch.mm(hidden_states, self.weight.t(), out=out)
