"""One decoder layer, run in stages: at each stage the inputs of a projection are known and it may be replaced.

    input  -> norm -> [qkv] -> rotate, attend -> [o] -> + -> norm -> [gate | up] -> silu, multiply -> [down] -> + ->

A projection in brackets is seen with inputs that come from the already replaced ones before it, so that each makes up
for what those before it lost, too. The modules are the model's own; only attention is plain causal attention over whole
sequences, since nothing here needs a KV cache. Each projection computes every token once.

Legend: S sequences, L tokens of each, E hidden size, H heads, Hkv KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer

CHUNK_TOKENS = 4096
"""Tokens that go through a module at once."""

Replace = Callable[[str, LinearBase, torch.Tensor], None]
"""Called with a projection's name ("self_attn.qkv_proj"), the projection and its Hessian [K, K] float32."""


class Hessian:
    """X X^T / tokens, gathered piece by piece in float32."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        """Nothing gathered yet."""
        self._sum = torch.zeros(num_channels, num_channels, device=device)
        self._num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in the inputs x [..., K]."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(x.t(), x)
        self._num_tokens += len(x)

    def mean(self) -> torch.Tensor:
        """Return the mean of x x^T, [K, K] float32."""
        return self._sum / self._num_tokens


def attend(attention: LlamaAttention, x: torch.Tensor) -> torch.Tensor:
    """Return what goes into o_proj, [S, L, H * D], for normed hidden states x [S, L, E] at positions 0 to L - 1."""
    num_sequences, length, _ = x.shape
    positions = torch.arange(length, device=x.device).repeat(num_sequences)
    heads = attention.qkv_proj(x.flatten(0, 1)).view(num_sequences * length, -1, attention.head_size)
    qk, v = heads.split_with_sizes((attention.num_heads + attention.num_kv_heads, attention.num_kv_heads), dim=1)
    qk = attention.rotary_emb(*attention.rotary_emb.gather(positions), attention.normalize_heads(qk))
    q, k = qk.split_with_sizes((attention.num_heads, attention.num_kv_heads), dim=1)
    q, k, v = (t.view(num_sequences, length, -1, attention.head_size).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=attention.num_heads != attention.num_kv_heads
    )
    return out.transpose(1, 2).flatten(2)


def _chunks(stream: torch.Tensor) -> Iterator[slice]:
    """Yield ranges of sequences of about CHUNK_TOKENS tokens."""
    step = max(1, CHUNK_TOKENS // stream.shape[1])
    for start in range(0, stream.shape[0], step):
        yield slice(start, min(start + step, stream.shape[0]))


@torch.no_grad()
def run_layer(layer: LlamaDecoderLayer, stream: torch.Tensor, replace: Replace) -> None:
    """Run `layer` on all sequences, calling `replace` for each projection before it multiplies.

    Args:
        layer: its projections' weights may be changed by `replace`, but not their shapes.
        stream: [S, L, E], the residual stream: the layer's input, overwritten with its output.
        replace: see Replace.
    """
    _run_attention(layer, stream, replace)
    _run_mlp(layer, stream, replace)


def _run_attention(layer: LlamaDecoderLayer, stream: torch.Tensor, replace: Replace) -> None:
    attention = layer.self_attn
    normed = _stage(
        "self_attn.qkv_proj", attention.qkv_proj, stream, replace, lambda part: layer.input_layernorm(stream[part])
    )
    attended = _stage(
        "self_attn.o_proj", attention.o_proj, stream, replace, lambda part: attend(attention, normed[part])
    )
    _add_output(attention.o_proj, attended, stream)


def _run_mlp(layer: LlamaDecoderLayer, stream: torch.Tensor, replace: Replace) -> None:
    mlp = layer.mlp
    normed = _stage(
        "mlp.gate_up_proj", mlp.gate_up_proj, stream, replace, lambda part: layer.post_attention_layernorm(stream[part])
    )

    def gated(part: slice) -> torch.Tensor:
        rows = normed[part]
        inner: torch.Tensor = mlp.act_fn(mlp.gate_up_proj(rows.flatten(0, 1)))
        return inner.view(*rows.shape[:2], -1)

    inner = _stage("mlp.down_proj", mlp.down_proj, stream, replace, gated)
    _add_output(mlp.down_proj, inner, stream)


def _stage(
    name: str,
    module: LinearBase,
    stream: torch.Tensor,
    replace: Replace,
    inputs: Callable[[slice], torch.Tensor],
) -> torch.Tensor:
    """Compute a projection's inputs [S, L, K] and their Hessian, have it replaced, and return the inputs."""
    hessian = Hessian(module.input_size, stream.device)
    kept = torch.empty(*stream.shape[:2], module.input_size, dtype=stream.dtype, device=stream.device)
    for part in _chunks(stream):
        kept[part] = inputs(part)
        hessian.add(kept[part])
    replace(name, module, hessian.mean())
    return kept


def _add_output(module: LinearBase, inputs: torch.Tensor, stream: torch.Tensor) -> None:
    """Add the projection of `inputs` [S, L, K] to `stream` [S, L, E]."""
    for part in _chunks(stream):
        stream[part] += module(inputs[part].flatten(0, 1)).view(stream[part].shape)
