"""How the GPTQ kernels' work is cut into tiles: measured where the shape was, else by rule.

vLLM keeps such tables in JSON files beside its kernels. The numbers are those of an H100, 4 bits in groups of 128,
found by tests/benchmark/gptq_kernels.py.

Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from folovllm.utils.common import power_of_2_at_least

MAX_ROWS = 256
"""Above, unless measured, dequantizing once and multiplying with cuBLAS is faster."""


@dataclass(frozen=True)
class GemvConfig:
    """How one row's product is cut into programs and steps. All are powers of two, but row_tiles and prefetch."""

    block_n: int
    """Outputs of a row tile."""
    step_blocks: int
    """Blocks of inputs (256 each at 4 bits, 128 at 8) of a step."""
    num_warps: int
    row_tiles: int = 1
    """Row tiles that one program computes one after another, normalising its input once."""
    prefetch: int = 2
    """Steps loaded ahead; capped at the program's number of steps."""


@dataclass(frozen=True)
class PackedGemmConfig:
    """How a product of several rows is cut into programs; its steps are blocks of inputs."""

    block_m: int
    """Rows of a tile; a power of two, at least 16."""
    block_n: int
    """Outputs of a tile; a power of two, at least 16; from 64 on Hopper's own tensor-core instructions are used."""
    num_warps: int
    num_stages: int
    """Steps in shared memory at once, block_m * 512 + block_n * 128 bytes each at 4 bits."""
    splits: int = 1
    """Parts of K, each summed by programs of its own; only where nothing but a sum or a norm follows."""
    prefetch: int = 4
    """Blocks whose weights are asked for in the L2 cache before the wait (with `pdl`); 0 or a power of two."""
    tma: bool = False
    """Load x with Hopper's copy engine; needs rows of a multiple of 16 bytes, and is not done for others."""
    fuses_silu: bool = True
    """Gated only: a program computes gates and ups of its outputs; else SiLU-mul is a kernel of its own."""


MEASURED_GEMV: dict[tuple[int, int, bool], GemvConfig] = {
    (6144, 4096, False): GemvConfig(8, 16, 4, row_tiles=2, prefetch=1),  # 6.8 us, bfloat16 weights 17.6
    (4096, 4096, False): GemvConfig(8, 8, 2, prefetch=2),  # 5.2, 11.4
    (12288, 4096, True): GemvConfig(8, 16, 4, row_tiles=2, prefetch=1),  # 23.3, 65.6
    (4096, 12288, False): GemvConfig(4, 16, 4, prefetch=1),  # 13.6, 34.4
}
"""(N, K, gated): the fastest tile of one row and 4 bits on an H100, tests/benchmark/gptq_kernels.py"""
MEASURED_GEMM: dict[tuple[int, int, int, bool], PackedGemmConfig] = {
    (16, 6144, 4096, False): PackedGemmConfig(16, 128, 4, 3, splits=4),  # 9.4, 21.2
    (16, 4096, 4096, False): PackedGemmConfig(16, 128, 4, 6, splits=4),  # 7.4, 16.7
    (16, 12288, 4096, True): PackedGemmConfig(16, 64, 4, 3, fuses_silu=False),  # 25.7, 76.2
    (16, 4096, 12288, False): PackedGemmConfig(16, 128, 4, 6, splits=4),  # 14.6, 40.3
    (32, 6144, 4096, False): PackedGemmConfig(32, 128, 4, 3, splits=2),  # 10.3, 21.5
    (32, 4096, 4096, False): PackedGemmConfig(32, 64, 4, 6, splits=2),  # 8.4, 14.7
    (32, 12288, 4096, True): PackedGemmConfig(32, 64, 4, 3, fuses_silu=False),  # 27.9, 77.2
    (32, 4096, 12288, False): PackedGemmConfig(32, 128, 4, 6, splits=4),  # 16.0, 41.3
    (64, 6144, 4096, False): PackedGemmConfig(64, 128, 4, 3, splits=2, tma=True),  # 12.8, 21.1
    (64, 4096, 4096, False): PackedGemmConfig(64, 128, 4, 3, splits=4, tma=True),  # 10.2, 14.9
    (64, 12288, 4096, True): PackedGemmConfig(64, 128, 4, 4, tma=True, fuses_silu=False),  # 42.3, 79.5
    (64, 4096, 12288, False): PackedGemmConfig(64, 128, 4, 4, splits=4, tma=True),  # 19.8, 42.7
    (96, 6144, 4096, False): PackedGemmConfig(64, 128, 4, 3, tma=True),  # 19.3 at 128 rows
    (96, 4096, 4096, False): PackedGemmConfig(64, 128, 4, 3, splits=2, tma=True),  # 13.3 at 128
    (96, 12288, 4096, True): PackedGemmConfig(64, 128, 4, 3, tma=True, fuses_silu=False),  # 60.8 at 128
    (96, 4096, 12288, False): PackedGemmConfig(64, 128, 4, 3, splits=2, tma=True),  # 30.4 at 128
    (128, 6144, 4096, False): PackedGemmConfig(128, 64, 4, 3, tma=True),  # 15.6, 21.9
    (128, 4096, 4096, False): PackedGemmConfig(128, 64, 4, 3, splits=2, tma=True),  # 11.8, 15.1
    (128, 12288, 4096, True): PackedGemmConfig(128, 64, 4, 3, tma=True, fuses_silu=False),  # 49.4, 82.8
    (128, 4096, 12288, False): PackedGemmConfig(128, 64, 4, 3, splits=2, tma=True),  # 25.3, 40.6
    (192, 6144, 4096, False): PackedGemmConfig(64, 128, 4, 3, splits=2, tma=True),  # 34.7, 23.2
    (192, 4096, 4096, False): PackedGemmConfig(64, 128, 4, 3, tma=True),  # 18.7, 16.5
    (192, 12288, 4096, True): PackedGemmConfig(64, 128, 4, 3, tma=True, fuses_silu=False),  # 97.0, 87.5
    (192, 4096, 12288, False): PackedGemmConfig(64, 128, 4, 3, splits=4, tma=True),  # 50.3, 49.9
    (240, 6144, 4096, False): PackedGemmConfig(64, 128, 4, 2, tma=True),  # 35.6 at 256 rows
    (240, 4096, 4096, False): PackedGemmConfig(64, 128, 4, 3, tma=True),  # 19.1 at 256
    (240, 12288, 4096, True): PackedGemmConfig(64, 128, 4, 2, tma=True, fuses_silu=False),  # 111.3 at 256
    (240, 4096, 12288, False): PackedGemmConfig(64, 128, 4, 3, tma=True),  # 51.7 at 256
    (256, 6144, 4096, False): PackedGemmConfig(128, 64, 4, 3, tma=True),  # 29.2, 24.4
    (256, 4096, 4096, False): PackedGemmConfig(128, 64, 4, 3, tma=True),  # 15.3, 18.1
    (256, 12288, 4096, True): PackedGemmConfig(128, 64, 4, 3, tma=True, fuses_silu=False),  # 95.0, 92.3
    (256, 4096, 12288, False): PackedGemmConfig(128, 64, 4, 3, tma=True),  # 41.7, 49.5
    (512, 6144, 4096, False): PackedGemmConfig(64, 128, 4, 3, tma=True),  # 55.5, 36.5
    (512, 4096, 4096, False): PackedGemmConfig(64, 256, 8, 3, tma=True),  # 35.0, 24.7
    (512, 12288, 4096, True): PackedGemmConfig(128, 128, 8, 2, tma=True),  # 180.7, 147.8
    (512, 4096, 12288, False): PackedGemmConfig(64, 256, 8, 3, tma=True),  # 97.7, 68.6
    (1024, 12288, 4096, True): PackedGemmConfig(128, 128, 8, 2, tma=True),  # 351.1, 288.1
}
"""(row bucket, N, K, gated): the same for several rows. Microseconds follow, and those of bfloat16 weights."""
ROW_BUCKETS = (16, 32, 64, 96, 128, 192, 240, 256, 512, 1024)
"""A tile is chosen for the smallest of these that is at least M. Tiles of 64 outputs, the fastest ones when they are
full, are up to twice as slow filled in part (gate and up of 160 rows: 204 us, of 256: 95); those of 128 are not."""


def default_config(m: int, n: int, k: int, gated: bool) -> GemvConfig | PackedGemmConfig | None:
    """Return the tile for M rows, N outputs (of two weight rows each where gated) and K inputs; None: dequantize.

    Measured where the shape was; else tiles that give 132 SMs about two programs each, or as many as outputs allow.
    """
    if m == 1:
        measured_gemv = MEASURED_GEMV.get((n, k, gated))
        if measured_gemv is not None:
            return measured_gemv
        # Steps of several chunks of K are unrolled: with more outputs they need more registers than there are.
        step_blocks = min(16, power_of_2_at_least(-(-k // 256)))
        return GemvConfig(4, step_blocks, 4, prefetch=3) if k > 4096 else GemvConfig(8, step_blocks, 4)
    bucket = next((bucket for bucket in ROW_BUCKETS if m <= bucket), None)
    measured = None if bucket is None else MEASURED_GEMM.get((bucket, n, k, gated))
    if measured is not None:
        return measured
    if bucket is None or m > MAX_ROWS:
        return None
    block_m, block_n = min(bucket, 64), 128 if bucket > 64 else 64
    programs = -(-bucket // block_m) * -(-n // block_n)
    splits = 1 if gated else max(1, min(4, 256 // programs, k // 1024))
    return PackedGemmConfig(block_m, block_n, 4, 3, splits=splits, tma=block_m == 64, fuses_silu=False)
