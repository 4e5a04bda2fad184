"""GPTQ checkpoints of tiny models, packed by plain loops that share nothing with the package, and what they mean.

Weights are rounded to nearest: how well they were chosen does not matter to a loader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 199
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is quantized."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    scale_dtype: torch.dtype = torch.float16

    def config(self) -> dict[str, Any]:
        """The checkpoint's quantization_config."""
        fields = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
        return {"quant_method": "gptq", **{name: getattr(self, name) for name in fields}, "lm_head": False}


def plain_pack(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Pack integers along `axis`, one by one, in Python's integers; returns int32."""
    per_word = 32 // bits
    values = np.moveaxis(values, axis, 0)
    words = np.zeros((values.shape[0] // per_word, values.shape[1]), dtype=np.int64)
    for k in range(values.shape[0]):
        for n in range(values.shape[1]):
            words[k // per_word, n] += int(values[k, n]) * 2 ** (bits * (k % per_word))
    words = np.where(words >= 2**31, words - 2**32, words).astype(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, 0, axis))


def quantize_tensor(
    weight: torch.Tensor, settings: Settings, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a checkpoint's tensors for `weight` [N, K], and the float32 weight [N, K] that they mean."""
    num_outputs, num_inputs = weight.shape
    group_size = num_inputs if settings.group_size == -1 else settings.group_size
    g_idx = torch.arange(num_inputs) // group_size
    if settings.desc_act:
        g_idx = g_idx[torch.randperm(num_inputs, generator=generator)]
    top = 2**settings.bits - 1
    num_groups = num_inputs // group_size
    scales = torch.empty(num_groups, num_outputs)
    zeros = torch.empty(num_groups, num_outputs, dtype=torch.int64)
    values = torch.empty(num_inputs, num_outputs, dtype=torch.int64)
    for g in range(num_groups):
        part = weight[:, g_idx == g]
        if settings.sym:
            scales[g] = (2 * part.abs().amax(1) / top).to(settings.scale_dtype)
            zeros[g] = (top + 1) // 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[g] = ((high - low) / top).to(settings.scale_dtype)
            zeros[g] = (-low / scales[g]).round().clamp(1, top).long()  # format 1 cannot store zero
        values[g_idx == g] = ((part / scales[g][:, None]).round() + zeros[g][:, None]).clamp(0, top).long().t()
    dequantized = torch.empty(num_outputs, num_inputs)
    for k in range(num_inputs):
        g = int(g_idx[k])
        dequantized[:, k] = (values[k] - zeros[g]) * scales[g]
    stored_zeros = zeros - (1 if settings.checkpoint_format == "gptq" else 0)
    tensors = {
        "qweight": torch.from_numpy(plain_pack(values.numpy(), settings.bits, 0)),
        "qzeros": torch.from_numpy(plain_pack(stored_zeros.numpy(), settings.bits, 1)),
        "scales": scales.to(settings.scale_dtype),
        "g_idx": g_idx.int(),
    }
    return tensors, dequantized


def save_checkpoints(folder: Path, name: str, settings: Settings, same_order: bool = False, seed: int = 0) -> None:
    """Write the model called `name` to folder/quantized and, dequantized in float32, to folder/plain.

    `same_order`: with desc_act, projections of the same input share g_idx, as in checkpoints made by GPTQ.
    """
    config_cls, model_cls, overrides = MODELS[name]
    torch.manual_seed(seed)
    model = model_cls(config_cls(**(_COMMON | overrides))).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _ = parameter.uniform_(0.5, 1.5) if "norm" in parameter_name else parameter.normal_(0.0, 0.12)
    model.generation_config.eos_token_id = 2
    plain, quantized = folder / "plain", folder / "quantized"
    model.save_pretrained(plain)
    model.config.save_pretrained(quantized)
    stored = load_file(plain / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for i, (tensor_name, tensor) in enumerate(sorted(stored.items())):
        module, _, last = tensor_name.rpartition(".")
        if last != "weight" or module.rpartition(".")[2] not in PROJECTIONS:
            packed[tensor_name] = tensor
            continue
        generator = torch.Generator().manual_seed(seed if same_order else i)
        tensors, stored[tensor_name] = quantize_tensor(tensor, settings, generator)
        packed |= {f"{module}.{key}": value for key, value in tensors.items()}
    save_file(stored, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, quantized / "model.safetensors", {"format": "pt"})
    edit_json(quantized / "config.json", quantization_config=settings.config())


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of the JSON object in `path`; a value None removes one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace or add tensors of folder/model.safetensors; None removes one. Names have "__" for "."."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path, {"format": "pt"})
