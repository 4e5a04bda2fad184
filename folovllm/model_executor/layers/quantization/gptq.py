"""GPTQ checkpoints: what their config says, how their tensors are loaded, and which kernel multiplies with them.

A quantized projection of K inputs and N outputs has four tensors (packing.py draws the words) instead of a weight:

    qweight [K * bits / 32, N]     the integers
    scales  [G, N]                 one for each group of input channels and output
    qzeros  [G, N * bits / 32]     the integers that stand for 0.0
    g_idx   [K]                    which group an input channel belongs to

Groups are `group_size` neighbours, unless the checkpoint was made with act-order (`desc_act`): then channels were
grouped by importance, and g_idx jumps about. So that kernels always meet whole groups, channels are put in the order
of their groups once, at load, and the input is gathered in the same order at each call:

    g_idx        0 1 0 2 1 2                       x @ W^T = x[:, order] @ W[:, order]^T
    order        0 2 | 1 4 | 3 5    (argsort)

The parts of a fused layer (query, key, value) may have been ordered differently. Neighbours of the same order are one
product; others keep one each.

vLLM: `layers/quantization/auto_gptq.py`.

Legend: K input channels, N output channels, G groups, T tokens in the step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from folovllm.model_executor.layers.quantization import gptq_cpu, packing
from folovllm.model_executor.layers.quantization.base import LinearMethodBase, QuantizationConfig
from folovllm.model_executor.model_loader.weight_utils import NOISE_LENGTH, InvalidTensor
from folovllm.utils import cpu_kernels

if TYPE_CHECKING:
    from folovllm.model_executor.layers.linear import LinearBase
    from folovllm.model_executor.layers.quantization import triton_gptq

SUPPORTED_BITS = (4, 8)
SUPPORTED_GROUP_SIZES = (-1, 32, 64, 128)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> what is added to a stored zero point: version 1 stores it minus one."""
FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused layer -> the checkpoint's layers that it is made of, as STACKED_PARAMS of models/llama.py has them."""

_FIELD = "quantization_config"


@dataclass(frozen=True)
class GPTQConfig(QuantizationConfig):
    """A checkpoint's `quantization_config`, checked."""

    bits: int
    """Of one weight: one of SUPPORTED_BITS."""
    group_size: int
    """Input channels that share a scale: one of SUPPORTED_GROUP_SIZES; -1: all of them."""
    checkpoint_format: str = "gptq"
    """A key of ZERO_OFFSETS."""
    modules: tuple[str, ...] | None = None
    """Ends of the names of quantized layers (`modules_in_block_to_quantize`); None: all of the decoder's."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GPTQConfig:
        """Return what `config`, in the words of config.json or quantize_config.json, says.

        `sym` and `desc_act` are not needed: zero points and g_idx are stored either way.

        Raises:
            ValueError: a field is missing or has a value that cannot be run; the message names both.
        """
        bits, group_size = config.get("bits"), config.get("group_size")
        if not _is_one_of(bits, SUPPORTED_BITS):
            hint = " (3-bit values cross the borders of words)" if bits == 3 else ""
            raise ValueError(
                f"{_FIELD}: bits={bits!r} is not supported{hint}; supported: {_listed(SUPPORTED_BITS)}. "
                "Use another quantization of the model."
            )
        if not _is_one_of(group_size, SUPPORTED_GROUP_SIZES):
            raise ValueError(
                f"{_FIELD}: group_size={group_size!r} is not supported; supported: {_listed(SUPPORTED_GROUP_SIZES)}."
            )
        checkpoint_format = config.get("checkpoint_format", config.get("format")) or "gptq"
        if checkpoint_format not in ZERO_OFFSETS:
            raise ValueError(
                f"{_FIELD}: checkpoint_format={checkpoint_format!r} is not supported; supported: "
                f"{_listed(ZERO_OFFSETS)}. Other formats are repacked for one kernel: use the original."
            )
        _refuse_unsupported(config)
        assert isinstance(bits, int) and isinstance(group_size, int)
        return cls(bits, group_size, checkpoint_format, _module_names(config.get("modules_in_block_to_quantize")))

    @property
    def zero_offset(self) -> int:
        """What is added to a stored zero point."""
        return ZERO_OFFSETS[self.checkpoint_format]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """See QuantizationConfig."""
        parent, _, name = prefix.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED_PARTS.get(name, (name,))]
        quantized = [part for part in parts if self._is_quantized(part)]
        if not quantized:
            return None
        if len(quantized) < len(parts):
            raise ValueError(
                f"{_FIELD}: modules_in_block_to_quantize has {', '.join(quantized)} but not "
                f"{', '.join(part for part in parts if part not in quantized)}, which is computed with it: list all "
                f"of {', '.join(parts)} or none."
            )
        return GPTQLinearMethod(self, prefix)

    def _is_quantized(self, name: str) -> bool:
        return self.modules is None or any(f".{name}".endswith(f".{module}") for module in self.modules)


def _is_one_of(value: object, choices: tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in choices


def _listed(choices: Any) -> str:
    return ", ".join(str(choice) for choice in choices)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    """Raise ValueError for fields that change what the tensors mean, or which layers are quantized."""
    for field, reason in (
        ("dynamic", "rules that give layers different settings"),
        ("lm_head", "a quantized LM head"),
        ("is_marlin_format", "weights repacked for Marlin"),
        ("adapter", "an adapter beside the quantized weights"),
        ("rotation", "weights rotated before they were quantized"),
    ):
        if config.get(field):
            raise ValueError(f"{_FIELD}: {field}={config[field]!r}: {reason} cannot be run; use a checkpoint without.")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"{_FIELD}: pack_dtype={config['pack_dtype']!r} is not supported; supported: int32.")


def _module_names(value: Any) -> tuple[str, ...] | None:
    """Return modules_in_block_to_quantize, a list of names or of lists of names, as one tuple; None without any."""
    if value is None:
        return None
    rows = value if isinstance(value, list) else [value]
    names = [name for row in rows for name in (row if isinstance(row, list) else [row])]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"{_FIELD}: modules_in_block_to_quantize={value!r} must be a list of names such as 'self_attn.q_proj', or "
            "of lists of them."
        )
    return tuple(names)


class PackedWeight(Protocol):
    """Weights [n, K] in some packed form, K in the order of the groups."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight^T [T, n] in x's dtype, for x [T, K]."""

    def tensors(self) -> list[torch.Tensor]:
        """Return all that is stored."""


@dataclass
class Piece:
    """Neighbouring outputs whose input channels have the same order."""

    order: torch.Tensor | None
    """[K] int64: the input channel that comes k-th; None: as they are."""
    weight: PackedWeight


class GPTQLinearMethod(LinearMethodBase):
    """Integers of 4 or 8 bits with a scale and zero point for each group of inputs."""

    def __init__(self, config: GPTQConfig, prefix: str) -> None:
        """`prefix`: the layer's name, for messages."""
        self.config = config
        self.prefix = prefix
        self._pieces: list[Piece] = []

    def create_weights(self, layer: nn.Module, input_size: int, output_size: int) -> None:
        """See LinearMethodBase; the parameters are the checkpoint's tensors, with a row of g_idx for each fused part.

        Raises:
            ValueError: the layer's shape does not divide into groups and words.
        """
        group_size, num_groups = self._check_shape(layer, input_size)
        per_word = packing.values_per_word(self.config.bits)
        num_parts = len(_parts_of(layer))
        groups = torch.arange(input_size, dtype=torch.int32) // group_size
        words = partial(torch.empty, dtype=torch.int32)
        self._add(layer, "qweight", words(input_size // per_word, output_size), _load_integers, per_word=1)
        self._add(layer, "qzeros", words(num_groups, output_size // per_word), _load_integers, per_word=per_word)
        self._add(layer, "scales", torch.empty(num_groups, output_size), _load_scales)
        self._add(layer, "g_idx", groups.repeat(num_parts, 1), _load_g_idx, group_size=group_size)
        layer.qweight.fill_dummy = _fill_with_random_bits  # type: ignore[union-attr]
        layer.qzeros.fill_dummy = partial(_fill_symmetric, config=self.config)  # type: ignore[union-attr]
        layer.g_idx.fill_dummy = _keep  # type: ignore[union-attr]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See LinearMethodBase: put channels in order, then pack them as the device's kernel wants them."""
        bits = self.config.bits
        qweight, qzeros, scales, g_idx = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
        assert isinstance(qweight, torch.Tensor) and isinstance(qzeros, torch.Tensor)
        assert isinstance(scales, torch.Tensor) and isinstance(g_idx, torch.Tensor)
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            delattr(layer, name)
        zeros = packing.unpack_columns(qzeros, bits).to(torch.int16) + self.config.zero_offset
        for start, stop, groups in _pieces_of(_parts_of(layer), g_idx):
            order: torch.Tensor | None = torch.argsort(groups, stable=True)
            if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
                order = None
            values = packing.unpack_rows(qweight[:, start:stop], bits)
            values = values if order is None else values[order]
            weight = pack(values, scales[:, start:stop].contiguous(), zeros[:, start:stop].contiguous(), bits)
            for i, tensor in enumerate(weight.tensors() if order is None else [order, *weight.tensors()]):
                layer.register_buffer(f"packed_{len(self._pieces)}_{i}", tensor)
            self._pieces.append(Piece(order, weight))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See LinearMethodBase."""
        outs = [p.weight.multiply(x if p.order is None else x.index_select(1, p.order)) for p in self._pieces]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out if bias is None else out.add_(bias)

    def cpu_weight(self, layer: nn.Module) -> cpu_kernels.CPUWeight | None:
        """See LinearMethodBase."""
        bias = layer.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        if len(self._pieces) != 1 or self._pieces[0].order is not None:
            return None
        weight = self._pieces[0].weight
        if not isinstance(weight, gptq_cpu.AMXInt4Weight):
            return None
        return cpu_kernels.CPUWeight(weight.packed, bias, weight.scales, weight.zeros)

    def packed_weight(self, layer: nn.Module) -> triton_gptq.PackedWeight | None:
        """See LinearMethodBase; a layer of several pieces, or of reordered input channels, is not fused."""
        from folovllm.model_executor.layers.quantization import triton_gptq

        if len(self._pieces) != 1 or self._pieces[0].order is not None:
            return None
        weight = self._pieces[0].weight
        return weight if isinstance(weight, triton_gptq.PackedWeight) else None

    def _check_shape(self, layer: nn.Module, input_size: int) -> tuple[int, int]:
        """Return the group size in channels, and the number of groups. Raises ValueError."""
        group_size = input_size if self.config.group_size == -1 else self.config.group_size
        if input_size % group_size:
            fitting = [size for size in SUPPORTED_GROUP_SIZES if size > 0 and input_size % size == 0]
            raise ValueError(
                f"{self.prefix}: group_size={group_size} does not divide its {input_size} input channels, and a group "
                f"that is only partly filled is not supported; group sizes that fit: {_listed([-1, *fitting])}."
            )
        per_word = packing.values_per_word(self.config.bits)
        for what, size in [("input", input_size), *(("output", rows) for _, rows in _parts_of(layer))]:
            if size % per_word:
                raise ValueError(
                    f"{self.prefix}: its {size} {what} channels of {self.config.bits} bits do not fill words of 32 "
                    f"bits: the number must be a multiple of {per_word}."
                )
        return group_size, input_size // group_size

    def _add(self, layer: nn.Module, name: str, data: torch.Tensor, load: Callable[..., None], **options: int) -> None:
        """Register a parameter that is filled by load(layer, param, tensor, shard_id, **options)."""
        param = nn.Parameter(data, requires_grad=False)

        def weight_loader(param: nn.Parameter, loaded: torch.Tensor, shard_id: int | str | None = None) -> None:
            load(layer, param, loaded, shard_id, **options)

        param.weight_loader = weight_loader  # type: ignore[attr-defined]
        layer.register_parameter(name, param)


def pack(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> PackedWeight:
    """Return the weight scales * (values - zeros) in the form that is multiplied fastest where it lies.

    Args:
        values: [K, n] uint8 in [0, 2**bits), K in the order of the groups.
        scales: [G, n], of the model's dtype.
        zeros: [G, n] int16 in [0, 2**bits].
        bits: of one value.
    """
    if values.is_cuda and scales.dtype != torch.float32 and importlib.util.find_spec("triton") is not None:
        from folovllm.model_executor.layers.quantization import triton_gptq

        group_size = values.shape[0] // scales.shape[0]
        qweight = packing.pack_rows(values, bits)
        return triton_gptq.repack_for_triton(qweight, scales, zeros, bits, group_size)
    return gptq_cpu.pack(values, scales, zeros, bits)


def _parts_of(layer: Any) -> list[tuple[int, int]]:
    """Return (first output, number of outputs) of each of the checkpoint's layers in `layer`."""
    fused: LinearBase = layer
    return [fused.shard_rows(shard_id) for shard_id in fused.shard_ids]


def _pieces_of(parts: list[tuple[int, int]], g_idx: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first output, one past the last, [K] groups) of neighbours in `parts` with equal rows of `g_idx`."""
    first = 0
    for i in range(1, len(parts) + 1):
        if i == len(parts) or not torch.equal(g_idx[i], g_idx[first]):
            start, rows = parts[i - 1]
            yield parts[first][0], start + rows, g_idx[first]
            first = i


def _load_integers(
    layer: Any, param: nn.Parameter, loaded: torch.Tensor, shard_id: int | str | None, per_word: int
) -> None:
    """Copy packed words [rows, outputs / per_word] into their columns."""
    start, rows = layer.shard_rows(shard_id)
    target = param.data.narrow(1, start // per_word, rows // per_word)
    _check_shape(target, loaded)
    if loaded.dtype not in (torch.int32, torch.uint32):
        raise InvalidTensor(f"expected dtype int32, got {_name_of(loaded.dtype)}")
    target.copy_(loaded.view(torch.int32))


def _load_scales(layer: Any, param: nn.Parameter, loaded: torch.Tensor, shard_id: int | str | None) -> None:
    """Copy scales [G, outputs] into their columns, in the model's dtype."""
    target = param.data.narrow(1, *layer.shard_rows(shard_id))
    _check_shape(target, loaded)
    if loaded.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InvalidTensor(f"expected dtype float16, bfloat16 or float32, got {_name_of(loaded.dtype)}")
    bad = int((~loaded.isfinite()).sum())
    if bad:
        raise InvalidTensor(f"{bad} of {loaded.numel()} scales are NaN or infinite")
    converted = loaded.to(target.dtype)
    if not converted.isfinite().all():
        raise InvalidTensor(
            f"scales up to {loaded.abs().max().item():.3g} overflow the model's {_name_of(target.dtype)}: use "
            "dtype='bfloat16'"
        )
    target.copy_(converted)


def _load_g_idx(
    layer: Any, param: nn.Parameter, loaded: torch.Tensor, shard_id: int | str | None, group_size: int
) -> None:
    """Copy the groups [K] of the input channels into the part's row; every group must have its full size."""
    ids = list(layer.shard_ids)
    target = param.data if shard_id is None else param.data[ids.index(shard_id)]
    if loaded.shape != param.shape[1:]:
        raise ValueError(f"expected shape {list(param.shape[1:])}, got {list(loaded.shape)}")
    if loaded.dtype not in (torch.int32, torch.int64):
        raise InvalidTensor(f"expected dtype int32, got {_name_of(loaded.dtype)}")
    num_groups = len(loaded) // group_size
    low, high = int(loaded.min()), int(loaded.max())
    if low < 0 or high >= num_groups:
        raise InvalidTensor(f"groups {low} to {high} are outside of 0 to {num_groups - 1}")
    sizes = torch.bincount(loaded.long(), minlength=num_groups)
    if not bool((sizes == group_size).all()):
        wrong = int((sizes != group_size).nonzero()[0])
        raise InvalidTensor(f"group {wrong} has {int(sizes[wrong])} input channels, not group_size={group_size}")
    target.copy_(loaded)


def _check_shape(target: torch.Tensor, loaded: torch.Tensor) -> None:
    if target.shape != loaded.shape:
        raise ValueError(f"expected shape {list(target.shape)}, got {list(loaded.shape)}")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill_with_random_bits(param: nn.Parameter, generator: torch.Generator) -> None:
    """Fill a parameter of packed integers for dummy weights, repeating noise as initialize_dummy_weights does."""
    info = torch.iinfo(torch.int32)
    flat = param.data.view(-1)
    noise = torch.randint(info.min, info.max, (min(len(flat), NOISE_LENGTH),), generator=generator, dtype=torch.int32)
    noise = noise.to(param.device)
    for part in flat.split(NOISE_LENGTH):
        part.copy_(noise[: len(part)])


def _fill_symmetric(param: nn.Parameter, generator: torch.Generator, config: GPTQConfig) -> None:
    """Fill a parameter of packed zero points for dummy weights with the middle, as in most checkpoints."""
    zero = (1 << (config.bits - 1)) - config.zero_offset
    word = sum(zero << shift for shift in range(0, 32, config.bits))
    param.data.fill_(word - (1 << 32) if word >> 31 else word)


def _keep(param: nn.Parameter, generator: torch.Generator) -> None:
    """Leave a parameter as it was made, for dummy weights."""
