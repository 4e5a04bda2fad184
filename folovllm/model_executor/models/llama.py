"""Llama and what is shaped like it: Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral (vLLM: `models/llama.py`).

A step's tokens come as one flat batch of T rows, whatever requests they belong to: only attention needs to know,
and AttentionMetadata tells it. `residual` runs beside `hidden` so that each norm can add and normalise at once.
Qwen models are this decoder with another attention block (models/qwen.py).

Legend: T tokens in the step, E hidden size, H heads, Hkv KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.config import ModelConfig
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from folovllm.model_executor.layers.logits_processor import LogitsProcessor
from folovllm.model_executor.layers.quantization import QuantizationConfig
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding, compute_inv_freq
from folovllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from folovllm.model_executor.models import fused_decoder
from folovllm.model_executor.models.config import DecoderConfig
from folovllm.model_executor.models.utils import load_named_weights

CosSin = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [T, 1, D] of the step's positions, looked up once for all layers."""

STACKED_PARAMS: list[tuple[str, str, int | str]] = [
    # (fused module, module in the checkpoint, shard)
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        """`prefix` is the block's name in the checkpoint."""
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [inner, inner], config.mlp_bias, quant_config, f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, config.hidden_size, config.mlp_bias, quant_config, f"{prefix}.down_proj"
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, E] for x [T, E]."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_up_proj(x)))
        return out


class LlamaAttention(nn.Module):
    """Project, rotate, attend, project back."""

    def __init__(
        self,
        config: DecoderConfig,
        attn_backend: type[AttentionBackend],
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """`rotary_emb` is shared by all layers."""
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_size = config.head_size
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_size,
            config.num_heads,
            config.num_kv_heads,
            config.qkv_bias,
            quant_config,
            f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_size, config.hidden_size, config.o_bias, quant_config, f"{prefix}.o_proj"
        )
        self.rotary_emb = rotary_emb
        self.attn = Attention(
            config.num_heads,
            config.head_size,
            config.head_size**-0.5,
            config.num_kv_heads,
            attn_backend,
            f"{prefix}.attn",
        )

    def normalize_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """Return query and key heads [T, H + Hkv, D] as they go into the rotation: unchanged here."""
        return heads

    def forward(self, hidden: torch.Tensor, cos_sin: CosSin, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """Return [T, E] for hidden [T, E]."""
        heads = self.qkv_proj(hidden).view(hidden.shape[0], -1, self.head_size)  # [T, H + 2 Hkv, D]
        qk, v = heads.split_with_sizes((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        # Queries and keys turn alike, so both are turned at once.
        qk = self.rotary_emb(*cos_sin, self.normalize_heads(qk))
        q, k = qk.split_with_sizes((self.num_heads, self.num_kv_heads), dim=1)
        out: torch.Tensor = self.o_proj(self.attn(q, k, v, attn_metadata))
        return out


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm, each added to the residual."""

    def __init__(
        self,
        config: DecoderConfig,
        attention: LlamaAttention,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """`attention` is the family's attention block."""
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(config, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: CosSin,
        attn_metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's output and the residual, both [T, E]; `residual` None means the first layer."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin, attn_metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        attn_backend: type[AttentionBackend],
        quant_config: QuantizationConfig | None,
        attention_cls: type[LlamaAttention],
        prefix: str = "model",
    ) -> None:
        """`attention_cls` is the family's attention block."""
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        inv_freq = compute_inv_freq(config.head_size, config.rope_theta, config.rope_scaling, config.rope_freq_factors)
        self.rotary_emb = RotaryEmbedding(config.head_size, config.max_model_len, inv_freq)
        layers = []
        for i in range(config.num_layers):
            name = f"{prefix}.layers.{i}"
            attention = attention_cls(config, attn_backend, self.rotary_emb, quant_config, f"{name}.self_attn")
            layers.append(LlamaDecoderLayer(config, attention, quant_config, name))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.deterministic = False
        """Only kernels whose results for a token do not depend on the other tokens of the step."""
        self.fuse = True
        """Run the layers through models/fused_decoder.py where it can; False: module by module, to watch or change."""
        self.fused_layers: Any = None
        """What models/fused_decoder.py has looked up of the layers, once they have run."""
        self.cpu_decoder: Any = None
        """Where models/cpu_decoder.py runs the layers, likewise."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Return hidden states [T, E] for input_ids and positions [T]; of attn_metadata.output_rows alone, if given."""
        hidden = self.embed_tokens(input_ids)
        if fused_decoder.can_fuse(self, hidden):
            return fused_decoder.run_layers(self, hidden, positions, attn_metadata)
        cos_sin = self.rotary_emb.gather(positions)
        residual: torch.Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos_sin, attn_metadata)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed if attn_metadata.output_rows is None else normed.index_select(0, attn_metadata.output_rows)


class LlamaForCausalLM(nn.Module):
    """The decoder with its LM head: what the worker holds."""

    attention_cls: type[LlamaAttention] = LlamaAttention
    qkv_bias: bool | None = None
    """None: the config's `attention_bias` decides."""

    def __init__(
        self,
        model_config: ModelConfig,
        attn_backend: type[AttentionBackend],
        quant_config: QuantizationConfig | None = None,
    ) -> None:
        """Parameters are created empty, in the current default dtype and device."""
        super().__init__()
        self.config = DecoderConfig.from_model_config(model_config, self.qkv_bias)
        self.model = LlamaModel(self.config, attn_backend, quant_config, self.attention_cls)
        self.model.deterministic = model_config.deterministic
        self.lm_head = ParallelLMHead(
            0 if self.config.tie_word_embeddings else self.config.vocab_size, self.config.hidden_size
        )
        if self.config.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor()

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Return hidden states as LlamaModel.forward does; logits are computed only for the rows that need them."""
        hidden: torch.Tensor = self.model(input_ids, positions, attn_metadata)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V] float32 for hidden_states [n, E]."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from (checkpoint name, tensor) pairs; return the parameter names filled.

        Raises:
            ValueError: tensors are missing, unexpected or wrongly shaped; the message lists them.
        """
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        return load_named_weights(self, weights, STACKED_PARAMS, tied=tied).loaded
