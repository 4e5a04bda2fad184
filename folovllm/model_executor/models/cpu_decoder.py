"""A step's layers as one call into csrc/cpu_decoder_bf16.h: bfloat16, on CPUs with AMX.

What models/fused_decoder.py calls one by one on other CPUs, with the same results to the bit: 240 calls from Python are
2 ms of a decode step of 15. The addresses of weights and caches are collected once, those of a step's inputs per step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from folovllm.attention.backends.paged import PagedMetadata
from folovllm.utils import cpu_kernels

if TYPE_CHECKING:
    from folovllm.model_executor.models.fused_decoder import Layer
    from folovllm.model_executor.models.llama import LlamaModel

PTR, I64, INT, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
PROJECTIONS = ("qkv", "o", "gate_up", "down")


class _WeightArguments(ctypes.Structure):
    """weight_t."""

    _fields_ = [*[(name, PTR) for name in ("w", "bias", "scales", "zeros")], ("group", I64)]


class _LayerArguments(ctypes.Structure):
    """layer_t."""

    _fields_ = [
        *[(name, PTR) for name in NORMS],
        *[(name, _WeightArguments) for name in PROJECTIONS],
        *[(name, PTR) for name in ("cos_sin", "kv_cache")],
    ]


class _DecoderArguments(ctypes.Structure):
    """decoder_t."""

    _fields_ = [
        ("layers", ctypes.POINTER(_LayerArguments)),
        ("final_norm", PTR),
        *[(name, I64) for name in ("num_layers", "E", "I", "H", "Hkv", "D", "Bs", "block_stride", "value_offset")],
        ("max_position", I64),
        *[
            (name, PTR)
            for name in ("hidden", "out", "positions", "slots", "table", "seq_lens", "rows", "reqs", "chunks")
        ],
        ("output_rows", PTR),
        *[(name, I64) for name in ("T", "table_stride", "num_decodes", "num_chunks", "num_outputs")],
        *[(name, F32) for name in ("eps", "head_eps", "scale")],
        ("num_threads", INT),
    ]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CPUDecoder:
    """The layers of one model, whose weights and caches stay where they are."""

    def __init__(self, model: LlamaModel, layers: list[Layer]) -> None:
        """Only if `takes` says so."""
        self._caches = [layer.attn.kv_cache for layer in layers]
        self._kept = [_tensors_of(layer) for layer in layers]  # the structures hold bare addresses
        self._layers = (_LayerArguments * len(layers))()
        for arguments, layer, tensors in zip(self._layers, layers, self._kept, strict=True):
            for name, tensor in tensors.items():
                setattr(arguments, name, _address(tensor))
            for name in PROJECTIONS:
                setattr(arguments, name, _weight_arguments(layer.cpu_weights[name]))
        first, attention, cache = layers[0], layers[0].attn, layers[0].attn.kv_cache
        norm: Any = model.norm
        self._arguments = _DecoderArguments(
            layers=self._layers,
            final_norm=_address(norm.weight),
            num_layers=len(layers),
            E=norm.weight.numel(),
            I=first.cpu_weights["down"].num_inputs,
            H=attention.num_heads,
            Hkv=attention.num_kv_heads,
            D=attention.head_size,
            Bs=cache.shape[2],
            block_stride=cache.stride(1),
            value_offset=cache.stride(0),
            max_position=first.cos_sin_cache.shape[1],
            eps=norm.variance_epsilon,
            head_eps=first.head_norm_eps,
            scale=first.attn.impl.scale,
        )

    @staticmethod
    def takes(layers: list[Layer], metadata: PagedMetadata) -> bool:
        """Whether there is a kernel here, and it does these layers and all of the step's attention."""
        attention = layers[0].attn
        if metadata.decode_groups or metadata.prefill_chunks or not layers[0].cpu_weights:
            return False
        usable = cpu_kernels.prefill_usable(attention.kv_cache.dtype, attention.head_size)
        return usable and all(layer.cpu_weights for layer in layers)

    def is_stale(self, layers: list[Layer]) -> bool:
        """Whether the layers have been given other caches since."""
        return any(layer.attn.kv_cache is not cache for layer, cache in zip(layers, self._caches, strict=True))

    def run(self, hidden: torch.Tensor, positions: torch.Tensor, metadata: PagedMetadata) -> torch.Tensor:
        """Return LlamaModel.forward's states for `hidden` [T, E], which is overwritten, at positions [T] int64."""
        table, chunks, wanted = metadata.block_table, metadata.chunk_table, metadata.output_rows
        out = torch.empty_like(hidden) if wanted is None else hidden.new_empty(len(wanted), hidden.shape[1])
        assert wanted is None or (wanted.is_contiguous() and wanted.dtype == torch.int64)
        assert hidden.is_contiguous() and positions.is_contiguous() and metadata.slot_mapping.is_contiguous()
        assert positions.dtype == metadata.slot_mapping.dtype == torch.int64
        assert table.dtype == metadata.seq_lens.dtype == torch.int32 and table.stride(1) == 1
        a = self._arguments
        a.hidden, a.out, a.positions = hidden.data_ptr(), out.data_ptr(), positions.data_ptr()
        a.slots, a.table, a.seq_lens = metadata.slot_mapping.data_ptr(), table.data_ptr(), metadata.seq_lens.data_ptr()
        a.rows, a.reqs = _address(metadata.decode_rows), _address(metadata.decode_reqs)
        a.chunks = _address(chunks)
        a.T, a.table_stride, a.num_decodes = hidden.shape[0], table.stride(0), metadata.num_decodes
        a.num_chunks = 0 if chunks is None else chunks.shape[0]
        a.output_rows, a.num_outputs = _address(wanted), out.shape[0]
        a.num_threads = torch.get_num_threads()
        cpu_kernels.decoder(ctypes.addressof(a))
        return out


def _weight_arguments(weight: cpu_kernels.CPUWeight) -> _WeightArguments:
    tensors = [weight.weight, weight.bias, weight.scales, weight.zeros]
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    group = 0 if weight.scales is None else weight.num_inputs // weight.scales.shape[1]
    return _WeightArguments(*[_address(tensor) for tensor in tensors], group)


def _tensors_of(layer: Layer) -> dict[str, torch.Tensor | None]:
    tensors = {
        "input_norm": layer.input_norm.weight,
        "post_norm": layer.post_norm.weight,
        "q_norm": layer.query_norm_weight,
        "k_norm": layer.key_norm_weight,
        "cos_sin": layer.cos_sin_cache,
        "kv_cache": layer.attn.kv_cache,
    }
    for name, tensor in tensors.items():
        assert tensor is None or name == "kv_cache" or tensor.is_contiguous()
        assert tensor is None or tensor.dtype == torch.bfloat16
    return tensors
