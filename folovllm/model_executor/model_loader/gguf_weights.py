"""Expand one GGUF tensor to a torch tensor, a few rows at a time (vLLM: `model_loader/weight_utils.py`,
`gguf_quant_*`).

The bytes of a whole tensor, its float32 values and `gguf`'s temporaries are never in memory together: a chunk
of rows is read, dequantized by the `gguf` package and copied into the result, which alone is held whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from folovllm.model_executor.model_loader.gguf_reader import GGUFFile, GGUFTensor

_CHUNK_ELEMENTS = 1 << 21  # 8 MiB in float32, and a few times that in temporaries
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def expanded_dtype(tensor: GGUFTensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type of `expand_tensor`'s result: as stored if not quantized, else `dtype` or float32."""
    return _PLAIN.get(tensor.type) or dtype or torch.float32


def expand_tensor(
    file: GGUFFile, tensor: GGUFTensor, dtype: torch.dtype | None, permuted_head_size: int = 0
) -> torch.Tensor:
    """Return the tensor's numbers in `expanded_dtype`, in torch's shape, on the CPU.

    Args:
        file: the file it is in.
        tensor: [rows, row length], or [n] for a vector.
        dtype: what quantized numbers become.
        permuted_head_size: D if the first dimension consists of heads whose rows are to be put back in order,
            else 0.

    Raises:
        ValueError: the file ends early.
    """
    out = torch.empty(tensor.shape, dtype=expanded_dtype(tensor, dtype))
    flat = out.view(tensor.num_rows, -1)
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
    if permuted_head_size:
        # Whole heads in each chunk. A bias is a single row that holds all heads: view it as a column.
        rows_per_chunk = max(1, rows_per_chunk // permuted_head_size) * permuted_head_size
        flat = out.view(tensor.shape[0], -1)
    start = 0
    for raw in file.rows(tensor, rows_per_chunk):
        values = _numbers(raw, tensor)
        if permuted_head_size:
            values = _unpermute(values.view(-1, flat.shape[1]), permuted_head_size)
        flat[start : start + values.shape[0]] = values
        start += values.shape[0]
    return out


def _numbers(raw: npt.NDArray[np.uint8], tensor: GGUFTensor) -> torch.Tensor:
    """Turn the bytes of some rows, [R, row_nbytes], into numbers, [R, row length]."""
    if plain := _PLAIN.get(tensor.type):
        return torch.from_numpy(raw).view(plain)
    values: npt.NDArray[Any] = dequantize(raw, tensor.type)
    return torch.from_numpy(values)


def _unpermute(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Put the rows of whole heads, [k * D, n], from llama.cpp's order into Hugging Face's.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face the halves (i, i + D / 2); files of architecture
    "llama" have the rows of each head interleaved to make that the same rotation.
    """
    return rows.view(-1, head_size // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
