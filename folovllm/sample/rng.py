"""Noise as a pure function of (request seed, position, token id) (vLLM: `v1/worker/gpu/sample/gumbel.py`).

A generator that is advanced draw by draw gives other tokens as soon as anything changes the order of draws:
the batch, the chunks, a preemption. A counter-based one cannot: every number is computed from its name alone,
so it is the same in any batch, after a recompute, on any device, and for a few candidates as for the whole
vocabulary.

How: seed * A + position * B (odd 64-bit constants) goes through splitmix64's finalizer, which gives two
32-bit keys per row; each token id then goes through a 32-bit finalizer (multiply and xor-shift, three rounds)
with one key at its entry and the other in its middle. What that gives and what not:

- Within a row the map from token id to 32 bits is a bijection (no two tokens share a number before the top
  bit is dropped): draws without replacement, which 2**32 values hide from any test on a vocabulary.
- Two rows have the same noise only if seed * A + position * B agree modulo 2**64: never where neither their
  seeds nor their positions are 2**31 apart (no shorter vector is in that lattice), else by chance, once in
  2**64.
- It is a statistical hash, not a cryptographic one: seeds cannot be kept secret behind it.

Cost of a row, V = 49152, two CPU threads: 95 us for the integers, 150 us for the exponentials. Philox4x32-10
in the same torch operations took 500 us for the integers alone, torch's own `exponential_` 800 us.
Integers are identical on every device; exponentials agree to the last bits of the device's log1p.
"""

from __future__ import annotations

import torch

_SEED64 = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as int64
_POSITION64 = -0x2917014799A6026D  # another odd one (L'Ecuyer), as int64
_MIX64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers, as int64
_SPREAD32 = -0x61C88647  # 2**32 / golden ratio, odd, as int32
_MIX32 = (0x7FEB352D, -0x7B935975)  # Wellons' "lowbias32" multipliers, as int32
# 2**-31, one step smaller: the largest 31-bit integer rounds up to 2**31 as a float, and u must stay below 1.
_SCALE = 2.0**-31 * (1 - 2.0**-24)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer, a bijection of int64, in place; the masks make the shifts logical ones."""
    x ^= (x >> 30) & 0x3FFFFFFFF
    x *= _MIX64[0]
    x ^= (x >> 27) & 0x1FFFFFFFFF
    x *= _MIX64[1]
    x ^= (x >> 31) & 0x1FFFFFFFF
    return x


def _keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return two int32 keys per row, [B, 2]."""
    return _mix64(seeds * _SEED64 + positions * _POSITION64).unsqueeze(1).view(torch.int32)


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return 31 random bits for each (row, token id) as int32 in [0, 2**31).

    Args:
        seeds: [B] int64, any value.
        positions: [B] int64, index of the token being drawn.
        token_ids: [B, n] or [1, n] integers.

    Returns:
        [B, n] int32.
    """
    keys = _keys(seeds, positions)
    # Products wrap around modulo 2**32 on every device.
    x = token_ids.to(torch.int32).mul(_SPREAD32) + keys[:, :1]
    shifted = torch.empty_like(x)
    x ^= torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    x *= _MIX32[0]
    x += keys[:, 1:]
    x ^= torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x *= _MIX32[1]
    # Arithmetic here: it only inverts upper bits by the sign, which is dropped next.
    x ^= torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_and_(0x7FFFFFFF)


def uniform_noise(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    device: torch.device | str,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return float32 uniform noise strictly between 0 and 1, with steps of 2**-31 near 0.

    Args:
        seeds: [B] int64.
        positions: [B] int64, index of the token being drawn.
        vocab_size: V; the columns are token ids 0 to V - 1 unless `token_ids` names others.
        device: where to compute; seeds and positions must lie there.
        token_ids: [B, n]: the ids to give noise for.

    Returns:
        [B, V] or [B, n] float32.
    """
    if token_ids is None:
        token_ids = torch.arange(vocab_size, dtype=torch.int32, device=device).unsqueeze(0)
    bits = random_bits(seeds, positions, token_ids)
    return bits.to(torch.float32).add_(0.5).mul_(_SCALE)


def exponential_noise(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    device: torch.device | str,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return float32 unit exponential noise, finite and above 0; arguments as uniform_noise.

    argmax(probs / noise) is a draw from probs: of independent exponential clocks with these rates the first
    to ring. Written as -log(1 - u), small values, which decide draws, come from small u, where floats are
    dense.
    """
    uniform = uniform_noise(seeds, positions, vocab_size, device, token_ids)
    return uniform.neg_().log1p_().neg_()
