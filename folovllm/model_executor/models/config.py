"""DecoderConfig: what a Hugging Face config.json says about a dense decoder, normalised and checked in one place.

Config files differ in age and family (`rope_theta` beside or inside `rope_parameters`, `head_dim` given or implied);
models read only this. Whatever a config asks for that we would not compute is refused here, not ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from folovllm.config import ModelConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a Llama-like model."""

    vocab_size: int
    """V."""
    hidden_size: int
    """E."""
    intermediate_size: int
    """Rows of gate and of up."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """Hkv."""
    head_size: int
    """D."""
    rms_norm_eps: float
    """Added to the mean square."""
    max_model_len: int
    """Positions the rotary tables must cover."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None
    """Scaling of the rotary frequencies."""
    rope_freq_factors: list[float] | None
    """The same as plain divisors, from GGUF files."""
    tie_word_embeddings: bool
    """The LM head is the embedding table."""
    qkv_bias: bool
    """Biases on q, k and v."""
    o_bias: bool
    """Bias on the attention output."""
    mlp_bias: bool
    """Biases in the MLP."""

    @classmethod
    def from_model_config(cls, model_config: ModelConfig, qkv_bias: bool | None = None) -> DecoderConfig:
        """Read `model_config.hf_config`; `qkv_bias` overrides `attention_bias` for families that fix it.

        Raises:
            ValueError: a field is missing, or asks for something that is not built (named in the message).
        """
        hf = model_config.hf_config
        assert hf is not None and model_config.max_model_len is not None
        _refuse_unsupported(hf, model_config.max_model_len)
        rope = hf.get("rope_parameters") or hf.get("rope_scaling")
        num_heads, num_kv_heads = model_config.get_num_attention_heads(), model_config.get_num_kv_heads()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}.")
        bias = bool(hf.get("attention_bias", False))
        return cls(
            vocab_size=model_config.get_vocab_size(),
            hidden_size=model_config.get_hidden_size(),
            intermediate_size=_positive_int(hf, "intermediate_size"),
            num_layers=model_config.get_num_layers(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=model_config.get_head_size(),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_model_len=model_config.max_model_len,
            rope_theta=float((rope or {}).get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope_scaling=rope,
            rope_freq_factors=hf.get("rope_freq_factors"),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            o_bias=bias if qkv_bias is None else False,
            mlp_bias=bool(hf.get("mlp_bias", False)),
        )


def _positive_int(hf: dict[str, Any], name: str) -> int:
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} in the model's config must be a positive int.")
    return value


def _refuse_unsupported(hf: dict[str, Any], max_model_len: int) -> None:
    """Raise ValueError for settings whose result would silently differ from the reference model's."""
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported; supported: 'silu'.")
    rotary_share = hf.get("partial_rotary_factor", (hf.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
    if rotary_share not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={rotary_share!r} is not supported; supported: 1.0.")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if window is not None and window < max_model_len:
        raise ValueError(
            f"sliding_window={window} is below max_model_len={max_model_len}, and sliding-window attention is not "
            f"supported. Set max_model_len={window} or less: up to there it equals full attention."
        )
    if (
        hf.get("layer_types")
        and window is not None
        and set(hf["layer_types"]) - {"full_attention", "sliding_attention"}
    ):
        raise ValueError(f"layer_types={sorted(set(hf['layer_types']))!r}: only 'full_attention' is supported.")
