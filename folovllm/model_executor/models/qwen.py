"""Qwen2, Qwen2.5 and dense Qwen3: the Llama decoder with another attention block (vLLM: `models/qwen2.py`, `qwen3.py`).

Qwen2 and 2.5 put biases on q, k and v. Qwen3 drops them and normalises every query and key head before the rotation.
"""

from __future__ import annotations

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.quantization import QuantizationConfig
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from folovllm.model_executor.models.config import DecoderConfig
from folovllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 and Qwen2.5."""

    qkv_bias = True


class Qwen3Attention(LlamaAttention):
    """Attention with QK-norm."""

    def __init__(
        self,
        config: DecoderConfig,
        attn_backend: type[AttentionBackend],
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """See LlamaAttention."""
        super().__init__(config, attn_backend, rotary_emb, quant_config, prefix)
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def normalize_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """Return [T, H + Hkv, D] with each head normalised over D, queries and keys with their own weights."""
        queries, keys = heads.split_with_sizes((self.num_heads, self.num_kv_heads), dim=1)
        return torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=1)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Dense Qwen3."""

    attention_cls = Qwen3Attention
