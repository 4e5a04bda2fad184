"""How GPTQ packs integers: against plain loops, and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from folovllm.model_executor.layers.quantization import packing
from tests.gptq_checkpoints import Settings, plain_pack, quantize_tensor

SETTINGS = [
    Settings(bits, 32, sym, desc_act, checkpoint_format)
    for bits in (4, 8)
    for sym in (True, False)
    for desc_act in (False, True)
    for checkpoint_format in ("gptq", "gptq_v2")
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(32, 8), (64, 40), (8, 72)])
def test_packing_is_what_plain_loops_make(bits: int, shape: tuple[int, int]) -> None:
    values = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    values[0], values[-1] = 0, 2**bits - 1  # the highest bits make words negative
    by_rows, by_columns = packing.pack_rows(values, bits), packing.pack_columns(values, bits)
    assert by_rows.dtype == by_columns.dtype == torch.int32 and by_columns.is_contiguous()
    assert torch.equal(by_rows, torch.from_numpy(plain_pack(values.numpy(), bits, 0)))
    assert torch.equal(by_columns, torch.from_numpy(plain_pack(values.numpy(), bits, 1)))
    assert torch.equal(packing.unpack_rows(by_rows, bits), values.to(torch.uint8))
    assert torch.equal(packing.unpack_columns(by_columns, bits), values.to(torch.uint8))


def test_words_by_hand() -> None:
    """Value k of a column lies in bits 4 k and up."""
    column = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]])
    assert packing.pack_rows(column, 4).tolist() == [[0xF7654321 - 2**32]]
    assert packing.pack_columns(column.t(), 4).tolist() == [[0xF7654321 - 2**32]]
    bytes_ = torch.tensor([[1], [2], [3], [200]])
    assert packing.pack_rows(bytes_, 8).tolist() == [[0xC8030201 - 2**32]]


def test_a_layer_by_hand() -> None:
    """Two outputs' worth of a layer with two groups, whose channels alternate (act-order), in the format that stores
    zero points minus one; every number was worked out on paper."""
    qweight = torch.tensor([[0x76543210, 0x11111111] + [0] * 6], dtype=torch.int32)  # 8 inputs, 8 outputs
    qzeros = torch.tensor([[0x00000027], [0x00000003]], dtype=torch.int32)  # output 0: 7 + 1, 3 + 1; output 1: 2 + 1, 1
    scales = torch.tensor([[0.5, 2.0] + [1.0] * 6, [0.25, 1.0] + [1.0] * 6])
    g_idx = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)
    weight = packing.dequantize(qweight, qzeros, scales, g_idx, 4, 1)
    # Output 0: inputs 0, 2, 4, 6 are 0.5 (k - 8), inputs 1, 3, 5, 7 are 0.25 (k - 4).
    assert weight[0].tolist() == [-4.0, -0.75, -3.0, -0.25, -2.0, 0.25, -1.0, 0.75]
    # Output 1: 2 (1 - 3) and 1 (1 - 1).
    assert weight[1].tolist() == [-4.0, 0.0] * 4
    second_format = packing.dequantize(qweight, qzeros, scales, g_idx, 4, 0)
    assert second_format[0].tolist() == [-3.5, -0.5, -2.5, 0.0, -1.5, 0.5, -0.5, 1.0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_dequantize_against_plain_loops(settings: Settings) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 96, generator=generator)
    tensors, expected = quantize_tensor(weight, settings, generator)
    offset = 1 if settings.checkpoint_format == "gptq" else 0
    got = packing.dequantize(bits=settings.bits, zero_offset=offset, **tensors)
    assert torch.equal(got, expected)
    # And the loops' own rounding is a rounding: within half a step of the weight.
    assert (got - weight).abs().max() <= 0.51 * tensors["scales"].float().max()


@pytest.mark.parametrize("bits", [0, 2.5, 3, 5, 32])
def test_bits_that_cross_words_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits}"):
        packing.values_per_word(bits)


def test_rows_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ValueError, match="12 rows of 4 bits"):
        packing.pack_rows(torch.zeros(12, 8, dtype=torch.int32), 4)
