"""How GPTQ checkpoints lay small integers into 32-bit words, and what the integers mean.

Weights are packed along the input channels, zero points along the output channels; the first value of a word lies in
its lowest bits. 4 bits, one column of qweight:

    word 0, bits   31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    input channel    7       6       5       4       3       2       1       0

8 bits are the same with four values to a word. The functions here are the plain definition: the repacking for speed is
in gptq.py. vLLM: `layers/quantization/utils/quant_utils.py` (`pack_rows`, `unpack_cols`, ...).

Legend: K input channels, N output channels, G groups of input channels that share a scale and a zero point.
"""

from __future__ import annotations

import torch

WORD_BITS = 32


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return qweight [K * bits // 32, N] int32 for integers [K, N] in [0, 2**bits); K is whole words.

    Value k of a column lies in bits (k % (32 // bits)) * bits and up of the column's word k // (32 // bits).

    Raises:
        ValueError: K is not a multiple of the values in a word, or `bits` is not 1, 2, 4, 8 or 16.
    """
    per_word = values_per_word(bits)
    if values.shape[0] % per_word:
        raise ValueError(
            f"{values.shape[0]} rows of {bits} bits do not fill whole words: make them a multiple of {per_word}."
        )
    packed = torch.zeros(values.shape[0] // per_word, values.shape[1], dtype=torch.int32, device=values.device)
    for i in range(per_word):
        packed |= values[i::per_word].to(torch.int32) << (i * bits)
    return packed


def unpack_rows(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers [K, N] uint8 that pack_rows packed into `qweight` [K * bits // 32, N] int32."""
    per_word = values_per_word(bits)
    num_words, num_columns = qweight.shape
    values = torch.empty(num_words, per_word, num_columns, dtype=torch.uint8, device=qweight.device)
    for i in range(per_word):
        values[:, i] = (qweight >> (i * bits)) & (2**bits - 1)
    return values.view(num_words * per_word, num_columns)


def pack_columns(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return qzeros [G, N * bits // 32] int32 for integers [G, N] in [0, 2**bits): pack_rows along the other axis.

    Raises:
        ValueError: N is not a multiple of the values in a word.
    """
    return pack_rows(values.t(), bits).t().contiguous()


def unpack_columns(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers [G, N] uint8 that pack_columns packed into `qzeros` [G, N * bits // 32] int32."""
    return unpack_rows(qzeros.t(), bits).t().contiguous()


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """Return the weight [N, K] float32 that a checkpoint's tensors mean.

        w[n, k] = scales[g_idx[k], n] * (q[k, n] - (z[g_idx[k], n] + zero_offset))

    Args:
        qweight: [K * bits // 32, N] int32.
        qzeros: [G, N * bits // 32] int32.
        scales: [G, N], any float type; the arithmetic is in float32.
        g_idx: [K] int, the group of each input channel.
        bits: of one value.
        zero_offset: 1 for checkpoint format "gptq", which stores each zero point minus one; 0 for "gptq_v2".
    """
    groups = g_idx.long()
    zeros = unpack_columns(qzeros, bits).float() + zero_offset
    weight = (unpack_rows(qweight, bits).float() - zeros[groups]) * scales.float()[groups]
    return weight.t().contiguous()


def values_per_word(bits: int) -> int:
    """Return how many values of `bits` bits one 32-bit word holds. Raises ValueError if they do not fill it."""
    if bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"bits={bits!r}: only 1, 2, 4, 8 and 16 bits fill 32-bit words without a rest.")
    return WORD_BITS // bits
