"""What a GGUF file's metadata says in the words of a Hugging Face config.json.

vLLM leaves this to transformers' GGUF conversion (`transformers_utils/gguf_utils.py`); ours refuses what it
cannot express (other architectures, YaRN, partial rotary embeddings, experts) instead of running a different
model.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from gguf import GGMLQuantizationType

from folovllm.model_executor.model_loader.gguf_reader import GGUFFile

# general.architecture -> (the config's `architectures`, `model_type`).
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}


class Metadata:
    """Typed access to the entries of one architecture, e.g. `integer("block_count")` for "llama.block_count".

    Without a default an entry must be there; one of another type or range is a ValueError.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._prefix = architecture

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """Return an entry that is an int of at least `low`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self._refuse(key, f"a single int of at least {low}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return an entry that is a number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(key, "a single number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """Return an entry that is a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self._refuse(key, "a string")
        return str(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._file.metadata.get(f"{self._prefix}.{key}", default)
        if value is None:
            raise ValueError(
                f"{self._file.path}: the metadata lacks '{self._prefix}.{key}', which this architecture needs."
            )
        return value

    def _refuse(self, key: str, expected: str) -> NoReturn:
        name = f"{self._prefix}.{key}"
        raise ValueError(f"{self._file.path}: {name}={self._file.metadata.get(name)!r} must be {expected}.")


def gguf_architecture(file: GGUFFile) -> str:
    """Return `general.architecture` if it is supported, else raise ValueError listing what is."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {name!r} is not supported in GGUF files; supported: {', '.join(ARCHITECTURES)}."
        )
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"{file.path} is one of {file.metadata['split.count']} parts of a model, and split GGUF files "
            "are not supported: join them with llama.cpp's `llama-gguf-split --merge`."
        )
    return name


def hf_config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that describes `file`. Raises ValueError for what it cannot describe.

    Beside the usual fields `rope_freq_factors` (list of D / 2 floats) is there when the file has a `rope_freqs`
    tensor: rotary frequency i is divided by factor i. That is how GGUF stores Llama 3's `rope_scaling`.
    """
    architecture = gguf_architecture(file)
    meta = Metadata(file, architecture)
    if meta.integer("expert_count", 0, low=0):
        raise ValueError(f"{file.path}: mixtures of experts are not supported.")
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise ValueError(f"{file.path}: there is no tensor 'token_embd.weight'.")
    heads = meta.integer("attention.head_count")
    hidden_size = meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden_size // heads)
    if meta.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file.path}: keys and values of different head size are not supported.")
    class_name, model_type = ARCHITECTURES[architecture]
    dtype = _main_dtype(file)
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embeddings.shape[0],
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        **_rope(file, meta, head_dim),
    }
    if window := meta.integer("attention.sliding_window", 0, low=0):
        config["sliding_window"] = window
    return config


def _rope(file: GGUFFile, meta: Metadata, head_dim: int) -> dict[str, Any]:
    """Return the fields about rotary embeddings."""
    rotary = meta.integer("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(f"{file.path}: rotary embeddings over {rotary} of {head_dim} dimensions are not supported.")
    theta = meta.number("rope.freq_base", 10000.0)
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0))
    kind = meta.text("rope.scaling.type", "linear" if factor else "none")
    config: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if kind == "linear" and factor:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise ValueError(
            f"{file.path}: rope.scaling.type={kind!r} (factor {factor}) is not supported; supported: none, "
            "linear, and Llama 3's factors in tensor 'rope_freqs.weight'."
        )
    if tensor := file.tensors.get("rope_freqs.weight"):
        if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
            raise ValueError(
                f"{file.path}: tensor 'rope_freqs.weight' must be F32 of shape ({head_dim // 2},), not "
                f"{tensor.type.name} of {tensor.shape}."
            )
        config["rope_freq_factors"] = next(file.rows(tensor, 1))[0].view(np.float32).tolist()
    return config


def _main_dtype(file: GGUFFile) -> str:
    """Return the type in which most weights are stored; bfloat16, in which most models are made, if
    quantized."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:  # norms are stored in F32 whatever the rest is
            dtype = _DTYPES.get(tensor.type, "bfloat16")
            sizes[dtype] = sizes.get(dtype, 0) + tensor.num_elements
    return max(sizes, key=lambda dtype: sizes[dtype])
