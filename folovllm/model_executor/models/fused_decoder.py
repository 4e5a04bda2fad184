"""The decoder's layers in few kernels, on CUDA and on CPUs. models/llama.py says what is computed; here is how.

vLLM leaves this to torch.compile and custom operators. A step of a small model is made of hundreds of short operations,
so what counts is how many there are, and how soon each starts after the one before:

    CUDA          norm+residual | qkv | QK-norm, rotation, KV write | attention | o | norm+residual | gate, up
                  | SiLU-mul | down                                             9 kernels a layer
    CUDA, small   norm+qkv | QK-norm, rotation, KV write | attention | o+residual | norm+gate+up+SiLU-mul
                  | down+residual                                               6 kernels a layer
    CUDA, GPTQ    as the former at one row; at more norm+residual joins the product before it, SiLU-mul gate and up
    CPU           norm | qkv | QK-norm, rotation, KV write | attention | o+residual | norm | gate+up+SiLU-mul
                  | down+residual                                               8 calls a layer; with AMX, one a step

A small batch reads each weight once for a handful of multiplications. On CUDA our own products then beat cuBLAS, since
they take their neighbours in and start to read weights before the kernel before them has ended (small_batch_linear.py);
on CPUs they beat torch's, since they read weights at the speed of memory (csrc/cpu_kernels.c).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.backends.paged import PagedMetadata
from folovllm.model_executor.layers import batch_linear, small_batch_linear
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.fused_ops import qk_norm_rope_write_kv, rms_norm, silu_and_mul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_executor.models.cpu_decoder import PROJECTIONS, CPUDecoder
from folovllm.utils import cpu_kernels

if TYPE_CHECKING:
    from folovllm.model_executor.models.llama import LlamaModel

SMALL_BATCH_HIDDEN_SIZE = 2048
"""Above it only single rows take the small-batch path: with more, cuBLAS wins (docs/dev/milestone_4.md)."""

LONG_INPUTS = 8192
"""Inputs from which on cuBLASLt's choice of a kernel beats cuBLAS's by up to 14% for LONG_INPUTS_MAX_TOKENS or fewer
(12,288 inputs, 4,096 outputs; docs/dev/milestone_4.md). With fewer inputs both choose alike."""
LONG_INPUTS_MAX_TOKENS = 384

PDL_MAX_TOKENS = 256
"""Above it programmatic dependent launch slows the QK-norm kernel down."""


def can_fuse(model: LlamaModel, hidden: torch.Tensor) -> bool:
    """Return whether fused kernels can run this step: there are some, and attention takes keys written beforehand.

    On CUDA only backends in Triton take them, so Triton is there.
    """
    first: Any = model.layers[0]
    here = first.self_attn.attn.written_kv_device == hidden.device.type
    return model.fuse and here and (hidden.is_cuda or cpu_kernels.usable(hidden))


def run_layers(
    model: LlamaModel, hidden: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata
) -> torch.Tensor:
    """Return what LlamaModel.forward returns for embedded tokens `hidden` [T, E], which are overwritten."""
    if not hidden.is_cuda:
        return _run_on_cpu(model, hidden, positions, attn_metadata)
    # Kernels of many tokens have nothing to gain from starting early, and lose: they share the GPU while they wait.
    pdl = _starts_early(hidden)
    layers = _layers_of(model)
    if all(layer.packed_products for layer in layers):
        run = _run_packed_row if hidden.shape[0] == 1 else _run_packed
        return run(model, hidden, positions, attn_metadata, pdl)
    if takes_small_batch(model, hidden):
        return _run_small_batch(model, hidden, positions, attn_metadata, pdl)
    residual = hidden
    norms = _norms_after(model, layers)
    ours = pdl and not model.deterministic and _beats_cublas_somewhere(layers[0], hidden)
    if hidden.shape[0] >= batch_linear.MIN_ROWS:
        pdl = ours  # kernels between cuBLAS's cannot start early: nothing signals before it ends
    hidden = rms_norm(hidden, layers[0].input_norm.weight, layers[0].input_norm.eps, pdl=pdl)
    for layer, next_norm in zip(layers, norms, strict=True):
        if ours and _beats_cublas(hidden, layer.qkv_weights[0], "none"):
            qkv = batch_linear.linear(hidden, *layer.qkv_weights, pdl=pdl)
        else:
            qkv = layer.qkv_proj(hidden)
        hidden = _attend(layer, qkv, positions, attn_metadata, pdl)
        if layer is layers[-1]:
            hidden, residual = _output_rows(hidden, residual, attn_metadata)
        hidden = _linear_norm(layer.o_proj, layer.o_weights, hidden, layer.post_norm, residual, ours, pdl)
        if ours and _beats_cublas(hidden, layer.gate_up_weights[0], "silu_mul"):
            hidden = batch_linear.gate_up(hidden, *layer.gate_up_weights, pdl=pdl)
        else:
            hidden = silu_and_mul(layer.gate_up_proj(hidden), pdl=pdl)
        hidden = _linear_norm(layer.down_proj, layer.down_weights, hidden, next_norm, residual, ours, pdl)
    return hidden


def _linear_norm(
    product: Callable[[torch.Tensor], torch.Tensor],
    weights: tuple[Any, Any],
    x: torch.Tensor,
    norm: _Norm,
    residual: torch.Tensor,
    ours: bool,
    pdl: bool,
) -> torch.Tensor:
    """Return norm(residual + x @ weight^T + bias); `residual` is overwritten with the sum."""
    if ours and _beats_cublas(x, weights[0], "norm"):
        return batch_linear.linear_norm(x, *weights, residual, norm.weight, norm.eps, pdl=pdl)
    x = product(x)
    return rms_norm(x, norm.weight, norm.eps, residual, out=x, pdl=pdl)


def _beats_cublas(x: torch.Tensor, weight: torch.Tensor, epilogue: batch_linear.Epilogue) -> bool:
    """Return whether our product of x [T, K] and weight [N, K], with what follows it, measured faster than cuBLAS."""
    num_outputs, num_inputs = weight.shape
    if epilogue == "silu_mul":
        num_outputs //= 2
    return batch_linear.uses_batch_linear(x.shape[0], num_outputs, num_inputs, epilogue)


def _beats_cublas_somewhere(layer: Layer, x: torch.Tensor) -> bool:
    """Return whether some of a layer's products are faster as our own, which are for medium batches, than cuBLAS's."""
    if not layer.is_plain or not batch_linear.runs_on_triton(x):
        return False
    weights = (layer.qkv_weights[0], layer.gate_up_weights[0], layer.o_weights[0], layer.down_weights[0])
    epilogues: tuple[batch_linear.Epilogue, ...] = ("none", "silu_mul", "norm", "norm")
    return any(_beats_cublas(x, weight, epilogue) for weight, epilogue in zip(weights, epilogues, strict=True))


def _run_small_batch(
    model: LlamaModel, hidden: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata, pdl: bool
) -> torch.Tensor:
    linear, norm_linear, norm_gate_up = (
        small_batch_linear.linear,
        small_batch_linear.norm_linear,
        small_batch_linear.norm_gate_up,
    )
    layers = _layers_of(model)
    for layer in layers:
        norm = layer.input_norm
        qkv, _ = norm_linear(hidden, None, norm.weight, norm.eps, *layer.qkv_weights, pdl=pdl)
        attended = _attend(layer, qkv, positions, attn_metadata, pdl)
        if layer is layers[-1]:
            attended, hidden = _output_rows(attended, hidden, attn_metadata)
        hidden = linear(attended, *layer.o_weights, residual=hidden, pdl=pdl)
        norm = layer.post_norm
        activated, _ = norm_gate_up(hidden, None, norm.weight, norm.eps, *layer.gate_up_weights, pdl=pdl)
        hidden = linear(activated, *layer.down_weights, residual=hidden, pdl=pdl)
    return rms_norm(hidden, model.norm.weight, model.norm.variance_epsilon, pdl=pdl)


def _run_packed_row(
    model: LlamaModel, hidden: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata, pdl: bool
) -> torch.Tensor:
    for layer in _layers_of(model):
        qkv_proj, o_proj, gate_up_proj, down_proj = layer.packed_products
        norm = layer.input_norm
        qkv = triton_gptq.norm_linear(hidden, norm.weight, norm.eps, *qkv_proj, pdl=pdl)
        attended = _attend(layer, qkv, positions, attn_metadata, pdl)
        hidden = triton_gptq.linear(attended, *o_proj, hidden, pdl=pdl)
        norm = layer.post_norm
        activated = triton_gptq.norm_gate_up(hidden, norm.weight, norm.eps, *gate_up_proj, pdl=pdl)
        hidden = triton_gptq.linear(activated, *down_proj, hidden, pdl=pdl)
    return rms_norm(hidden, model.norm.weight, model.norm.variance_epsilon, pdl=pdl)


def _run_packed(
    model: LlamaModel, hidden: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata, pdl: bool
) -> torch.Tensor:
    layers = _layers_of(model)
    residual = hidden
    hidden = rms_norm(hidden, layers[0].input_norm.weight, layers[0].input_norm.eps, pdl=pdl)
    for layer, next_norm in zip(layers, _norms_after(model, layers), strict=True):
        qkv_proj, o_proj, gate_up_proj, down_proj = layer.packed_products
        qkv = triton_gptq.linear(hidden, *qkv_proj, pdl=pdl)
        attended = _attend(layer, qkv, positions, attn_metadata, pdl)
        if layer is layers[-1]:
            attended, residual = _output_rows(attended, residual, attn_metadata)
            pdl = _starts_early(attended)  # the kernels that decodes of as many rows have compiled
        norm = layer.post_norm
        hidden = triton_gptq.linear_norm(attended, *o_proj, residual, norm.weight, norm.eps, pdl=pdl)
        activated = triton_gptq.gate_up(hidden, *gate_up_proj, pdl=pdl)
        hidden = triton_gptq.linear_norm(activated, *down_proj, residual, next_norm.weight, next_norm.eps, pdl=pdl)
    return hidden


def _run_on_cpu(
    model: LlamaModel, hidden: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata
) -> torch.Tensor:
    layers = _layers_of(model)
    if isinstance(attn_metadata, PagedMetadata) and CPUDecoder.takes(layers, attn_metadata):
        if model.cpu_decoder is None or model.cpu_decoder.is_stale(layers):
            model.cpu_decoder = CPUDecoder(model, layers)
        decoder: CPUDecoder = model.cpu_decoder
        return decoder.run(hidden, positions, attn_metadata)
    for layer in layers:
        norm = layer.input_norm
        normed = cpu_kernels.rms_norm(hidden, norm.weight, norm.eps)
        attended = _attend(layer, layer.qkv_proj(normed), positions, attn_metadata, pdl=False)
        if layer is layers[-1]:
            attended, hidden = _output_rows(attended, hidden, attn_metadata)
        norm = layer.post_norm
        if layer.is_unquantized and layer.cpu_weights:
            cpu_kernels.linear(attended, *layer.o_weights, residual=hidden)  # adds to hidden in place
            normed = cpu_kernels.rms_norm(hidden, norm.weight, norm.eps)
            activated = cpu_kernels.linear_silu_and_mul(normed, *layer.gate_up_weights)
            cpu_kernels.linear(activated, *layer.down_weights, residual=hidden)
        else:
            normed = cpu_kernels.rms_norm(layer.o_proj(attended), norm.weight, norm.eps, hidden)
            hidden.add_(layer.down_proj(cpu_kernels.silu_and_mul(layer.gate_up_proj(normed))))
    return cpu_kernels.rms_norm(hidden, model.norm.weight, model.norm.variance_epsilon)


def _attend(
    layer: Layer, qkv: torch.Tensor, positions: torch.Tensor, attn_metadata: AttentionMetadata, pdl: bool
) -> torch.Tensor:
    """Return the attended values [T, H * D] for the projection's output [T, (H + 2 Hkv) * D], which is overwritten."""
    query = qk_norm_rope_write_kv(
        qkv,
        positions,
        layer.cos_sin_cache,
        layer.query_norm_weight,
        layer.key_norm_weight,
        layer.head_norm_eps,
        layer.attn.kv_cache,
        attn_metadata.slot_mapping,
        layer.attn.num_heads,
        layer.attn.num_kv_heads,
        layer.attn.k_scale,
        layer.attn.v_scale,
        pdl=pdl,
    )
    return layer.attn.forward(query, None, None, attn_metadata)


def _output_rows(
    attended: torch.Tensor, residual: torch.Tensor, attn_metadata: AttentionMetadata
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of both [T, .] that the last layer goes on with: of a prompt, its last token alone.

    With keys and values written and attention done, nothing reads the other tokens any more: 1.2 of the 50 ms that a
    prompt of 2,048 tokens takes in a model of 36 layers, and the dequantization of three of its weights.
    """
    rows = attn_metadata.output_rows
    return (attended, residual) if rows is None else (attended.index_select(0, rows), residual.index_select(0, rows))


def _norms_after(model: LlamaModel, layers: list[Layer]) -> list[_Norm]:
    """Return the norm that follows each layer: the next layer's first, or the model's last."""
    return [layer.input_norm for layer in layers[1:]] + [_Norm(model.norm)]


class _Norm:
    """What of an RMSNorm its kernels take."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight = norm.weight
        self.eps = norm.variance_epsilon


class Layer:
    """What of a decoder layer the kernels take, looked up once: nn.Module's look-ups cost 0.5 ms a step on a CPU."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attn: Attention = attention.attn
        self.input_norm, self.post_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.query_norm_weight = None if query_norm is None else query_norm.weight
        self.key_norm_weight = None if key_norm is None else key_norm.weight
        self.head_norm_eps: float = 0.0 if query_norm is None else query_norm.variance_epsilon
        self.cos_sin_cache: torch.Tensor = attention.rotary_emb.cos_sin_cache
        self.qkv_proj, self.qkv_weights = _product(attention.qkv_proj)
        self.o_proj, self.o_weights = _product(attention.o_proj)
        self.gate_up_proj, self.gate_up_weights = _product(mlp.gate_up_proj)
        self.down_proj, self.down_weights = _product(mlp.down_proj)
        projections = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        methods = [p.quant_method for p in projections]
        self.is_unquantized = all(type(method) is UnquantizedLinearMethod for method in methods)
        weights = (self.qkv_weights, self.o_weights, self.gate_up_weights, self.down_weights)
        # Without biases, as the shapes of batch_linear.MEASURED were.
        self.is_plain = self.is_unquantized and all(bias is None for _, bias in weights)
        self.cpu_weights = _cpu_weights(*projections)
        self.packed_products = _packed_products(*projections)


def _product(projection: LinearBase) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[Any, Any]]:
    """Return a projection as a function, and its weight and bias (None, None where it is quantized)."""
    weight, bias = getattr(projection, "weight", None), projection.bias
    is_plain = type(projection.quant_method) is UnquantizedLinearMethod and bias is None
    if is_plain and weight is not None and weight.is_cuda:
        # The product that the method comes to, without its way there: a prompt has 112 of them.
        product = partial(torch.mm, mat2=weight.t())
        if weight.shape[1] >= LONG_INPUTS:
            product = partial(_long_product, weight.t(), weight.new_zeros(weight.shape[0]))
        return product, (weight, bias)
    return projection.forward, (weight, bias)


def _long_product(weight: torch.Tensor, zeros: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x @ weight, [T, N]; for up to hundreds of rows by cuBLASLt, where torch goes with a bias."""
    if x.shape[0] <= LONG_INPUTS_MAX_TOKENS:
        return torch.addmm(zeros, x, weight)
    return torch.mm(x, weight)


def _cpu_weights(*projections: LinearBase) -> dict[str, cpu_kernels.CPUWeight]:
    """Return the weights of qkv, o, gate_up, down for models/cpu_decoder.py; none unless it can take all."""
    weights = [projection.quant_method.cpu_weight(projection) for projection in projections]
    named = {name: weight for name, weight in zip(PROJECTIONS, weights, strict=True) if weight is not None}
    return named if len(named) == len(PROJECTIONS) else {}


def _packed_products(*projections: LinearBase) -> list[tuple[triton_gptq.PackedWeight, torch.Tensor | None]]:
    """Return (weight, bias) of qkv, o, gate_up, down where triton_gptq.py multiplies with all of them; else nothing."""
    products = [(projection.quant_method.packed_weight(projection), projection.bias) for projection in projections]
    packed: list[tuple[triton_gptq.PackedWeight, torch.Tensor | None]] = [
        (weight, bias) for weight, bias in products if weight is not None
    ]
    return packed if len(packed) == len(products) else []


def _layers_of(model: LlamaModel) -> list[Layer]:
    if model.fused_layers is None:
        model.fused_layers = [Layer(layer) for layer in model.layers]
    layers: list[Layer] = model.fused_layers
    return layers


def takes_small_batch(model: LlamaModel, hidden: torch.Tensor) -> bool:
    """Return whether the small-batch kernels can run these rows and are the faster ones."""
    num_rows, hidden_size = hidden.shape
    if model.deterministic or not small_batch_linear.runs_on_triton(hidden):
        return False
    return (num_rows == 1 or hidden_size <= SMALL_BATCH_HIDDEN_SIZE) and _layers_of(model)[0].is_unquantized


def _starts_early(hidden: torch.Tensor) -> bool:
    return hidden.shape[0] <= PDL_MAX_TOKENS and supports_pdl(hidden.device)


_PDL: dict[torch.device, bool] = {}


def supports_pdl(device: torch.device) -> bool:
    """Return whether kernels may be launched before the one ahead of them has ended: Hopper and later."""
    if device not in _PDL:
        _PDL[device] = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return _PDL[device]
