"""A GGUF file as a ModelSource: tensors are renamed, expanded to plain numbers and put back in row order.

vLLM: `model_loader/gguf_loader.py`, which keeps tensors quantized and needs CUDA kernels; ours become ordinary
weights while they stream in, so that every backend runs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.model_executor.model_loader.gguf_config import gguf_architecture, hf_config_from_gguf
from folovllm.model_executor.model_loader.gguf_reader import GGUFFile, GGUFTensor
from folovllm.model_executor.model_loader.source import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Not parameters: `rope_freqs` is part of the config, `attn_rot_embd` a table that old files carry along.
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


def hf_tensor_name(name: str) -> str | None:
    """Return the Hugging Face name of a GGUF tensor, None if it is unknown."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


class GGUFSource(ModelSource):
    """A .gguf file: a path, or the file that a built-in name stands for (fetched on first use)."""

    def __init__(
        self,
        name: str,
        path: Path | None,
        tokenizer_source: ModelSource | None = None,
        download_dir: str | None = None,
    ) -> None:
        super().__init__(name, tokenizer_source)
        self._path = path
        self._download_dir = download_dir

    def hf_config(self) -> dict[str, Any]:
        """Return the config.json that describes the file. Raises ValueError; see `hf_config_from_gguf`."""
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        """Return `{"eos_token_id": [...]}`: the ids after which llama.cpp stops; `{}` if the file names
        none."""
        from folovllm.model_executor.model_loader.gguf_tokenizer import end_of_generation_ids

        ids = end_of_generation_ids(self._file.metadata)
        return {"eos_token_id": ids} if ids else {}

    def load_own_tokenizer(self) -> PreTrainedTokenizerBase:
        """Build the tokenizer from the file's metadata. Raises ValueError; see `build_gguf_tokenizer`."""
        from folovllm.model_executor.model_loader.gguf_tokenizer import build_gguf_tokenizer

        return build_gguf_tokenizer(self._file.metadata, self._file.path)

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in file order: quantized ones in `dtype` (None: float32), others as stored."""
        from folovllm.model_executor.model_loader.gguf_weights import expand_tensor

        for name, tensor in self._named_tensors.items():
            yield name, expand_tensor(self._file, tensor, dtype, self._permuted_head_size(tensor))

    def num_weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors as `weights(dtype)` yields them."""
        from folovllm.model_executor.model_loader.gguf_weights import expanded_dtype

        return sum(
            tensor.num_elements * expanded_dtype(tensor, dtype).itemsize for tensor in self._named_tensors.values()
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        return hf_config_from_gguf(self._file)

    @cached_property
    def _file(self) -> GGUFFile:
        from folovllm.model_executor.model_loader.named import fetch_named_model

        path = fetch_named_model(self.name, self._download_dir) if self._path is None else self._path
        return GGUFFile(path)

    @cached_property
    def _named_tensors(self) -> dict[str, GGUFTensor]:
        """Hugging Face name -> tensor. Raises ValueError listing tensors that have none."""
        gguf_architecture(self._file)
        tensors = {n: t for n, t in self._file.tensors.items() if not _NOT_WEIGHTS.fullmatch(n)}
        unknown = [name for name in tensors if hf_tensor_name(name) is None]
        if unknown:
            raise ValueError(
                f"{self._file.path}: {len(unknown)} tensors are not part of the supported architectures: "
                f"{', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}."
            )
        return {str(hf_tensor_name(name)): tensor for name, tensor in tensors.items()}

    def _permuted_head_size(self, tensor: GGUFTensor) -> int:
        """Return D if the tensor's rows are in llama.cpp's order for rotary embeddings, else 0."""
        if gguf_architecture(self._file) != "llama":
            return 0
        match = _LAYER_NAME.fullmatch(tensor.name)
        if match is None or match[2] not in ("attn_q", "attn_k"):
            return 0
        heads = self._config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise ValueError(f"{self._file.path}: {tensor.name} has {rows} rows, which {heads} heads cannot share.")
        return int(rows // heads)
