"""Products with packed weights on a CPU, against the dequantized weight in float64; and the bytes they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from folovllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from folovllm.model_executor.layers.quantization import gptq, gptq_cpu, packing
from folovllm.model_executor.layers.quantization.gptq import GPTQConfig, GPTQLinearMethod
from folovllm.model_executor.model_loader.build import default_dtype, process_weights_after_loading
from folovllm.utils import cpu_kernels
from tests.gptq_checkpoints import Settings, quantize_tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ROWS = (0, 1, 2, 3, 5, 17, 31, 63, 64, 65, 130)


def random_weight(
    num_inputs: int, num_outputs: int, num_groups: int, bits: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [K, n], scales [G, n], zeros [G, n] and the weight [n, K] in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (num_inputs, num_outputs), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits + 1, (num_groups, num_outputs), generator=generator).to(torch.int16)
    scales = (torch.rand(num_groups, num_outputs, generator=generator) * 0.02 + 0.001).to(dtype)
    groups = torch.arange(num_inputs) // (num_inputs // num_groups)
    weight = (values.double() - zeros.double()[groups]) * scales.double()[groups]
    return values, scales, zeros, weight.t()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("kind", ["amx", "kernel", "blocked"])
def test_products(dtype: torch.dtype, bits: int, group_size: int, kind: str) -> None:
    """Outputs: whole tiles of torch's layout and a rest."""
    num_inputs, num_outputs = 384, 208
    num_groups = 1 if group_size == -1 else num_inputs // group_size
    values, scales, zeros, weight = random_weight(num_inputs, num_outputs, num_groups, bits, dtype)
    if kind == "kernel" and not gptq_cpu.kernel_fits(values, scales):
        pytest.skip("torch has no int4 kernel for CPUs here")
    if kind == "amx":
        if bits != 4 or not cpu_kernels.multiplies_int4(dtype, num_inputs, num_outputs, num_inputs // num_groups):
            pytest.skip("bfloat16 in 4 bits, on AMX")
        packed: gptq.PackedWeight = gptq_cpu.pack(values, scales, zeros, bits)
        assert isinstance(packed, gptq_cpu.AMXInt4Weight), "the first choice"
    else:
        packed_class = gptq_cpu.Int4KernelWeight if kind == "kernel" else gptq_cpu.BlockedWeight
        packed = packed_class(values, scales, zeros, bits)
    for rows in ROWS:
        # Rows of a wider tensor: what a caller hands over need not be contiguous.
        x = torch.randn(rows, num_inputs + 8, generator=torch.Generator().manual_seed(rows)).to(dtype)[:, 3:-5]
        out = packed.multiply(x)
        assert out.shape == (rows, num_outputs) and out.dtype == dtype
        if rows:
            assert relative_error(out, x.double() @ weight.t()) < TOLERANCE[dtype], rows


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(40, 24), (64, 40), (72, 8), (8, 16)])
def test_shapes_that_the_kernel_does_not_take(num_inputs: int, num_outputs: int) -> None:
    values, scales, zeros, weight = random_weight(num_inputs, num_outputs, 1, 4, torch.float32)
    packed = gptq_cpu.pack(values, scales, zeros, 4)
    assert isinstance(packed, gptq_cpu.BlockedWeight)
    x = torch.randn(3, num_inputs)
    assert relative_error(packed.multiply(x), x.double() @ weight.t()) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numbers", [1, 1 << 13, 1 << 30])
def test_blocks_of_any_size(bits: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output is made plain exactly once, whatever the size of a block; and a block is never larger than that."""
    monkeypatch.setattr(gptq_cpu, "BLOCK_NUMBERS", numbers)
    values, scales, zeros, weight = random_weight(64, 336, 2, bits, torch.float32)
    x = torch.randn(70, 64)
    for packed in (
        gptq_cpu.BlockedWeight(values, scales, zeros, bits),
        gptq_cpu.Int4KernelWeight(values, scales, zeros, bits),
    ):
        assert relative_error(packed.multiply(x), x.double() @ weight.t()) < 1e-6
    blocks = [(start, block.shape[1]) for start, block in packed.blocks()]
    assert [start for start, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
    assert sum(n for _, n in blocks) == 336
    assert all(n * 64 <= max(numbers, 64 * 64) for _, n in blocks)


def test_symmetric_weights_are_plain_without_a_second_rounding() -> None:
    """In bfloat16, a block holds each weight rounded once."""
    for bits in (4, 8):
        values, scales, zeros, _ = random_weight(128, 64, 4, bits, torch.bfloat16)
        zeros.fill_(2 ** (bits - 1))
        exact = (values.double() - zeros[0, 0]) * scales.double().repeat_interleave(32, 0)
        ((_, block),) = gptq_cpu.Int4KernelWeight(values, scales, zeros, bits).blocks()
        assert torch.equal(block, exact.to(torch.bfloat16))


def test_float16_scales_that_the_kernel_would_overflow() -> None:
    values, scales, zeros, _ = random_weight(64, 32, 2, 8, torch.float16)
    scales[0, 0] = 5000.0
    values[:32, 0] = zeros[0, 0].clamp(max=254).to(torch.uint8) + 1  # weights of at most 5000
    packed = gptq_cpu.pack(values, scales, zeros, 8)
    assert isinstance(packed, gptq_cpu.BlockedWeight)
    x = torch.full((1, 64), 1e-3, dtype=torch.float16)
    assert packed.multiply(x).isfinite().all()


# Layers.


def load_layer(layer: LinearBase, parts: dict[int | str | None, dict[str, torch.Tensor]]) -> None:
    """Fill the layer's parameters through their loaders, as a checkpoint would, and repack them."""
    params = dict(layer.named_parameters())
    for shard_id, tensors in parts.items():
        for name, tensor in tensors.items():
            params[name].weight_loader(params[name], tensor, shard_id)  # type: ignore[attr-defined]
    process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("same", ["all", "first two", "none"])
def test_fused_parts_with_their_own_orders(dtype: torch.dtype, same: str) -> None:
    """Query, key and value with equal g_idx become one product, others one each; the result is theirs, side by side."""
    settings = Settings(desc_act=True, sym=False)
    seeds = {"all": (1, 1, 1), "first two": (1, 1, 2), "none": (1, 2, 3)}[same]
    with default_dtype(dtype):
        layer = QKVParallelLinear(64, 16, 4, 2, bias=True, quant_config=GPTQConfig(4, 32), prefix="a.qkv_proj")
    assert layer.bias is not None
    layer.bias.data.copy_(torch.randn(128))
    parts: dict[int | str | None, dict[str, torch.Tensor]] = {}
    weights = []
    for shard_id, rows, seed in zip(("q", "k", "v"), (64, 32, 32), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        # g_idx is drawn first, so that equal seeds mean equal orders.
        parts[shard_id], weight = quantize_tensor(torch.randn(rows, 64), settings, generator)
        weights.append(weight)
    load_layer(layer, parts)
    method = layer.quant_method
    assert isinstance(method, GPTQLinearMethod)
    assert len(method._pieces) == {"all": 1, "first two": 2, "none": 3}[same]
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ torch.cat(weights).double().t() + layer.bias.double()
    assert relative_error(layer(x), expected) < TOLERANCE[dtype]


def test_channels_in_order_are_not_gathered() -> None:
    layer = MergedColumnParallelLinear(64, [32, 32], quant_config=GPTQConfig(4, 32), prefix="a.gate_up_proj")
    parts: dict[int | str | None, dict[str, torch.Tensor]] = {
        i: quantize_tensor(torch.randn(32, 64), Settings(), torch.Generator())[0] for i in range(2)
    }
    load_layer(layer, parts)
    assert isinstance(layer.quant_method, GPTQLinearMethod)
    assert [piece.order for piece in layer.quant_method._pieces] == [None]


@pytest.mark.parametrize(("bits", "group_size", "limit"), [(4, 128, 0.30), (4, 64, 0.30), (8, 128, 0.56)])
def test_memory(bits: int, group_size: int, limit: float) -> None:
    """All that a layer keeps allocated, beside the bytes of the same layer in bfloat16."""
    with default_dtype(torch.bfloat16):
        config = GPTQConfig(bits, group_size)
        layer = MergedColumnParallelLinear(512, [512, 512], quant_config=config, prefix="a.gate_up_proj")
    settings = Settings(bits, group_size)
    tensors = quantize_tensor(torch.randn(512, 512), settings, torch.Generator())[0]
    load_layer(layer, {0: tensors, 1: tensors})
    assert not list(layer.parameters())
    method = layer.quant_method
    assert isinstance(method, GPTQLinearMethod)
    storages = {}
    for tensor in [*layer.buffers(), *(t for piece in method._pieces for t in piece.weight.tensors())]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # What the product reads is what is registered, so that the engine counts it.
    assert sum(storages.values()) == sum(b.untyped_storage().nbytes() for b in layer.buffers())
    assert sum(storages.values()) <= limit * 2 * 512 * 1024


def test_layers_left_plain() -> None:
    """Only the listed modules are quantized."""
    config = GPTQConfig.from_config(
        {"bits": 4, "group_size": 32, "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]}
    )
    prefix = "model.layers.0.mlp"
    fused = MergedColumnParallelLinear(64, [32, 32], quant_config=config, prefix=f"{prefix}.gate_up_proj")
    assert isinstance(fused.quant_method, GPTQLinearMethod)
    down = LinearBase(32, 64, quant_config=config, prefix=f"{prefix}.down_proj")
    assert isinstance(down.quant_method, UnquantizedLinearMethod)
    other = LinearBase(32, 64, quant_config=config, prefix="model.layers.0.other_mlp.up_proj")
    assert isinstance(other.quant_method, UnquantizedLinearMethod)


@pytest.mark.parametrize(
    ("bits", "group_size", "num_inputs", "num_outputs", "message"),
    [
        (4, 128, 192, 64, r"a\.o_proj: group_size=128 does not divide its 192 input .* fit: -1, 32, 64"),
        (4, 32, 64, 60, r"a\.o_proj: its 60 output channels of 4 bits .* multiple of 8"),
        (8, -1, 66, 64, r"a\.o_proj: its 66 input channels of 8 bits .* multiple of 4"),
    ],
)
def test_shapes_that_do_not_divide(bits: int, group_size: int, num_inputs: int, num_outputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearBase(num_inputs, num_outputs, quant_config=GPTQConfig(bits, group_size), prefix="a.o_proj")


def test_each_part_must_fill_words() -> None:
    """24 + 36 outputs fill words together, but the second part alone does not."""
    with pytest.raises(ValueError, match="its 36 output channels"):
        MergedColumnParallelLinear(64, [24, 36], quant_config=GPTQConfig(4, 32), prefix="a.gate_up_proj")


def test_weights_come_back_from_what_is_stored() -> None:
    """The golden layer of test_m7_packing, through a layer: eight outputs take the fallback."""
    layer = LinearBase(8, 8, quant_config=GPTQConfig(4, -1), prefix="a.o_proj")
    assert isinstance(layer, nn.Module)
    tensors = {
        "qweight": torch.tensor([[0x76543210, 0x11111111] + [0] * 6], dtype=torch.int32),
        "qzeros": torch.tensor([[0x00000027]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 2.0] + [1.0] * 6]),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    expected = packing.dequantize(bits=4, zero_offset=1, **tensors)
    load_layer(layer, {None: tensors})
    out = layer(torch.eye(8))
    assert out[:, 0].tolist() == [0.5 * (k - 8) for k in range(8)]
    assert torch.equal(out, expected.t())
