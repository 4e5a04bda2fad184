"""Products of 24 to 512 rows on one GPU: our kernels against cuBLAS, one product at a time and a layer at a time.

    OUT=folder python tests/benchmark/gemm_kernels.py [--models 0.6B 8B] [--budget-s 100]

Timed in CUDA graphs over distinct weights, more of them than the L2 cache holds, as in gemv_kernels.py. "norm" and
"silu_mul" products include the kernel that follows: for cuBLAS, fused_ops' with PDL. Prints which prefetch instruction
works, the best tile of every product, layers without attention, what cuBLAS's two interfaces choose, the fixed tiles of
deterministic_linear, and last the entries of batch_linear.MEASURED; all numbers go to $OUT/gemm_kernels.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from gemv_kernels import OfflineDriver, graph_us
from torch.nn import functional as F

from folovllm.model_executor.layers import batch_linear as bl
from folovllm.model_executor.layers.fused_ops import rms_norm, silu_and_mul

EPS = 1e-6
CHAIN_BYTES = 200e6  # four times the L2 cache
MUST_WIN = 0.97  # of cuBLAS's time, to be worth an entry
Config = bl.GemmConfig
BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a decoder layer; N counts outputs, half the weight rows of a gated one."""

    model: str
    name: str
    epilogue: bl.Epilogue
    n: int
    k: int

    @property
    def weight_shape(self) -> tuple[int, int]:
        """[N or 2 N, K]."""
        return (self.n * (2 if self.epilogue == "silu_mul" else 1), self.k)

    @property
    def copies(self) -> int:
        """Distinct weights of a chain, so that none is still in the L2 cache when its turn comes again."""
        return max(2, min(28, int(CHAIN_BYTES // (2 * self.weight_shape[0] * self.k)) + 1))


def products_of(model: str, hidden: int, inner: int, q_size: int, kv_size: int) -> list[Product]:
    """Return the products of one layer."""
    return [
        Product(model, "qkv", "none", q_size + 2 * kv_size, hidden),
        Product(model, "o", "norm", hidden, q_size),
        Product(model, "gate_up", "silu_mul", inner, hidden),
        Product(model, "down", "norm", hidden, inner),
    ]


MODELS = {
    "0.6B": (28, products_of("0.6B", 1024, 3072, 2048, 1024)),
    "8B": (36, products_of("8B", 4096, 12288, 4096, 1024)),
}

# (block_m, block_n, block_k, warps, stages, swap, splits of N = 1024), best guess first, by rows.
Tile = tuple[int, int, int, int, int, bool, int]
PLAIN: dict[int, list[Tile]] = {
    32: [
        (32, 32, 128, 4, 4, True, 1), (32, 64, 128, 4, 4, True, 1), (32, 32, 128, 4, 6, False, 1),
        (32, 64, 128, 4, 6, True, 1), (32, 32, 256, 4, 3, True, 1), (32, 16, 128, 4, 4, False, 1),
        (32, 64, 256, 4, 3, True, 1), (32, 64, 128, 8, 4, True, 1), (32, 128, 128, 8, 4, True, 1),
    ],
    64: [
        (64, 32, 128, 4, 4, False, 1), (64, 64, 128, 4, 4, True, 1), (64, 64, 64, 4, 6, False, 1),
        (64, 32, 128, 4, 6, False, 1), (32, 64, 128, 4, 4, True, 1), (64, 32, 256, 4, 3, False, 1),
        (64, 128, 64, 4, 4, True, 1), (64, 64, 128, 8, 3, False, 1),
    ],
    128: [
        (64, 64, 128, 4, 3, False, 1), (128, 32, 128, 4, 4, False, 1), (128, 64, 64, 4, 4, True, 1),
        (128, 64, 64, 8, 4, False, 1), (64, 64, 64, 4, 5, False, 1), (128, 64, 128, 8, 3, False, 1),
        (64, 128, 64, 4, 4, False, 1), (128, 32, 64, 4, 6, False, 1),
    ],
    256: [
        (128, 64, 64, 4, 4, False, 1), (128, 128, 64, 8, 4, False, 1), (64, 128, 64, 4, 4, False, 1),
        (128, 64, 128, 8, 3, False, 1), (256, 64, 64, 8, 4, False, 1), (128, 64, 64, 4, 4, True, 1),
        (128, 128, 128, 8, 3, False, 1), (128, 64, 64, 8, 5, False, 1), (256, 64, 64, 8, 4, True, 1),
        (64, 64, 64, 4, 5, False, 1), (256, 128, 64, 8, 3, False, 1),
    ],
    512: [
        (128, 128, 64, 8, 4, False, 1), (256, 64, 64, 8, 4, False, 1), (128, 64, 64, 4, 4, False, 1),
        (256, 128, 64, 8, 3, False, 1), (128, 256, 64, 8, 3, False, 1), (128, 128, 128, 8, 3, False, 1),
        (128, 128, 64, 4, 4, False, 1), (128, 128, 64, 8, 4, True, 1),
    ],
}  # fmt: skip
GATED: dict[int, list[Tile]] = {
    32: [
        (32, 32, 128, 4, 4, True, 1), (32, 16, 128, 4, 4, False, 1), (32, 64, 128, 4, 3, True, 1),
        (32, 32, 128, 4, 4, False, 1), (32, 64, 64, 4, 6, True, 1), (32, 32, 256, 4, 3, True, 1),
        (32, 16, 256, 4, 3, False, 1), (32, 32, 128, 8, 4, True, 1),
    ],
    64: [
        (64, 32, 128, 4, 4, False, 1), (64, 16, 128, 4, 4, False, 1), (64, 32, 64, 4, 6, False, 1),
        (64, 64, 64, 4, 4, False, 1), (32, 64, 128, 4, 3, True, 1), (64, 64, 128, 4, 3, True, 1),
        (64, 32, 128, 8, 4, False, 1),
    ],
    128: [
        (128, 32, 64, 4, 4, False, 1), (64, 64, 64, 4, 4, False, 1), (128, 32, 128, 8, 3, False, 1),
        (64, 32, 128, 4, 3, False, 1), (128, 16, 128, 4, 4, False, 1), (128, 64, 64, 8, 4, False, 1),
        (128, 32, 64, 8, 5, False, 1),
    ],
    256: [
        (128, 64, 64, 8, 4, False, 1), (128, 32, 64, 4, 4, False, 1), (64, 64, 64, 4, 4, False, 1),
        (256, 32, 64, 8, 4, False, 1), (128, 64, 128, 8, 3, False, 1), (128, 64, 64, 8, 4, True, 1),
        (128, 128, 64, 8, 3, False, 1), (128, 64, 64, 8, 5, False, 1), (256, 64, 64, 8, 3, False, 1),
    ],
    512: [
        (128, 64, 64, 8, 4, False, 1), (256, 64, 64, 8, 3, False, 1), (128, 128, 64, 8, 3, False, 1),
        (128, 64, 64, 8, 3, True, 1), (256, 32, 64, 8, 4, False, 1), (128, 128, 64, 8, 3, True, 1),
        (128, 64, 128, 8, 3, False, 1),
    ],
}  # fmt: skip
NORMED: dict[int, list[Tile]] = {
    32: [
        (32, 64, 128, 4, 3, True, 8), (32, 32, 128, 4, 4, True, 4), (32, 64, 128, 4, 4, True, 4),
        (32, 32, 128, 4, 4, True, 2), (32, 16, 128, 4, 6, False, 1), (32, 32, 128, 4, 6, False, 4),
        (32, 32, 128, 4, 6, True, 1),
    ],
    64: [
        (64, 64, 128, 4, 3, False, 8), (64, 32, 128, 4, 4, False, 4), (64, 64, 128, 4, 4, True, 4),
        (64, 32, 128, 4, 4, False, 2), (32, 64, 128, 4, 4, True, 4), (64, 16, 128, 4, 4, False, 1),
        (64, 32, 128, 4, 4, False, 1),
    ],
    128: [
        (64, 64, 128, 4, 3, False, 4), (128, 64, 64, 4, 4, False, 8), (64, 64, 128, 4, 4, False, 2),
        (128, 64, 64, 4, 4, False, 4), (64, 64, 64, 4, 5, False, 4), (64, 32, 128, 4, 4, False, 2),
        (64, 32, 128, 4, 4, False, 1), (128, 128, 64, 8, 4, False, 8),
    ],
    256: [
        (128, 64, 64, 4, 4, False, 4), (64, 64, 128, 4, 3, False, 2), (128, 128, 64, 8, 4, False, 8),
        (64, 64, 128, 4, 3, False, 1), (128, 64, 64, 4, 4, False, 2), (128, 64, 128, 8, 3, False, 4),
        (128, 128, 64, 8, 4, False, 4), (64, 64, 64, 4, 5, False, 2), (256, 64, 64, 8, 4, False, 4),
        (128, 64, 64, 4, 4, True, 4),
    ],
    512: [
        (128, 128, 64, 8, 4, False, 4), (128, 64, 64, 4, 4, False, 2), (128, 64, 64, 4, 4, False, 1),
        (128, 128, 64, 8, 4, False, 2), (64, 64, 128, 4, 3, False, 1), (128, 64, 128, 8, 3, False, 2),
        (256, 64, 64, 8, 4, False, 4),
    ],
}  # fmt: skip
TILES = {"none": PLAIN, "silu_mul": GATED, "norm": NORMED}
FIXED = [  # for deterministic_linear
    Config(64, 64, 128, 4, 3), Config(64, 64, 128, 4, 3, tma=True), Config(64, 64, 64, 4, 5, tma=True),
    Config(64, 128, 64, 4, 4, tma=True), Config(128, 64, 64, 4, 4, tma=True), Config(128, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 3, tma=True), Config(64, 32, 128, 4, 4, tma=True),
]  # fmt: skip
FIXED_ROWS = (1, 32, 256, 2048)
INTERFACE_ROWS = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 2048)


def tiles_for(product: Product, m: int) -> list[Config]:
    """Return the tiles to try, best guess first: each with and without prefetch (to the end, or 1024 columns) and TMA.

    Half of the combinations for the larger model, whose products have less to gain.
    """
    configs = []
    for *cut, splits in TILES[product.epilogue][max(32, m)]:
        splits = max(1, splits * 1024 // product.n)
        early = min(1024, product.k // splits)
        variants = [(early, True), (0, False), (early, False), (0, True)]
        for prefetch, tma in variants[: 2 if product.k * product.n > 10e6 else 4]:
            configs.append(Config(*cut, splits=splits, prefetch=prefetch, tma=tma))
    return list(dict.fromkeys(configs))


def without_pdl(tile: Config) -> Config:
    """Return the tile as it runs without PDL: nothing to prefetch before."""
    return dataclasses.replace(tile, prefetch=0)


def ours(product: Product, x: torch.Tensor, weight: torch.Tensor, extra: Any, pdl: bool, tile: Config | None) -> Any:
    """Run our kernels; `extra`: the residual and the norm's weight."""
    if product.epilogue == "norm":
        return bl.linear_norm(x, weight, None, *extra, EPS, pdl=pdl, config=tile)
    run = bl.gate_up if product.epilogue == "silu_mul" else bl.linear
    return run(x, weight, pdl=pdl, config=tile)


def cublas(product: Product, x: torch.Tensor, weight: torch.Tensor, extra: Any, pdl: bool = True) -> Any:
    """The same by cuBLAS and the kernel that follows it."""
    out = F.linear(x, weight)
    if product.epilogue == "norm":
        return rms_norm(out, extra[1], EPS, extra[0], pdl=pdl)
    return silu_and_mul(out, pdl=pdl) if product.epilogue == "silu_mul" else out


def operands(product: Product, m: int, device: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return x and `extra`."""
    tensors = [torch.empty(s, dtype=BF16, device=device) for s in ((m, product.k), (m, product.n), (product.n,))]
    for tensor in tensors if device == "cuda" else []:
        tensor.normal_()
    return tensors[0], (tensors[1], tensors[2])


def compile_one(job: tuple[Product, int, bool, Config, int]) -> str:
    """Compile into triton's disk cache, from meta tensors; return "" or what went wrong. M < 0: deterministic."""
    product, m, pdl, tile, capability = job
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(OfflineDriver(GPUTarget("cuda", capability, 32)))
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    bl.runs_on_triton = bl.takes_deterministic = lambda x: True
    try:
        x, extra = operands(product, abs(m), "meta")
        weight = torch.empty(product.weight_shape, dtype=BF16, device="meta")
        if m < 0:
            bl.deterministic_linear(x, weight, pdl=pdl, config=tile)
        else:
            ours(product, x, weight, extra, pdl, tile)
        return ""
    except Exception as error:
        return f"{product.model} {product.name} {m} {tile}: {error!r}"[:400]
    finally:
        JITFunction.run = run


def sweep_jobs(products: list[Product], batches: Sequence[int]) -> list[tuple[Product, int, bool, Config]]:
    """Return what compile_one should compile for a sweep; the kernels are the same for every M."""
    jobs: dict[Any, Any] = {}
    for product in products:
        for m in batches:
            for tile in tiles_for(product, m):
                jobs[product, tile] = (product, m, True, tile)
        for tile in FIXED if product.model == "0.6B" else []:
            jobs[product, tile, "fixed"] = (product, -64, False, tile)
    return list(jobs.values())


def precompile(jobs: list[tuple[Product, int, bool, Config]]) -> None:
    """Compile in parallel processes; what fails is reported and tried again when used."""
    major, minor = torch.cuda.get_device_capability()
    begin, workers = time.perf_counter(), max(1, (os.cpu_count() or 2) - 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for failure in filter(None, pool.map(compile_one, [(*job, major * 10 + minor) for job in jobs], chunksize=2)):
            print("compile failed:", failure, flush=True)
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)


@triton.jit
def ask_kernel(x_ptr, out_ptr, METHOD: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr):
    """Bring BLOCK bytes a program into the L2 cache: by prefetch (0), or by loads of four bytes that say 128 (1)."""
    ptrs = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // LINE) * LINE
    if METHOD == 0:
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    else:
        asm: tl.constexpr = "ld.global.L2::128B.b32 $0, [$1];"
    tl.inline_asm_elementwise(asm, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Read BLOCK words a program."""
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, axis=0))


def prefetch_probe() -> dict[str, float]:
    """Microseconds to read 16 MB after an empty L2 cache and a prefetch of them: which prefetch brings whole lines?

    From DRAM that takes 6 us or more, from the L2 cache about half. PREFETCH_LINE should be the largest that works.
    """
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    x = torch.ones(4 << 20, dtype=torch.int32, device="cuda")
    out = torch.empty(4096, dtype=torch.int32, device="cuda")
    bytes_ = x.view(torch.int8)

    def read() -> Any:
        return sum_kernel[(1024,)](x, out, 4096, num_warps=4)

    results = {}
    methods: dict[str, Callable[[], Any] | None] = {"nothing": None}
    for line in (32, 64, 128):
        methods[f"prefetch every {line}"] = lambda n=line: ask_kernel[(1024,)](bytes_, out, 0, n, 16384, num_warps=4)
    methods["load of 128"] = lambda: ask_kernel[(1024,)](bytes_, out, 1, 128, 16384, num_warps=4)
    for name, ask in methods.items():
        try:
            before = [flush.zero_] + ([] if ask is None else [ask])
            for call in (*before, read):  # compiled and loaded before a graph is captured
                call()
            times = [graph_us(calls * 10) / 10 for calls in ([*before, read], before)]
            results[name] = round(times[0] - times[1], 2)
        except Exception as error:
            results[name] = float("nan")
            print("prefetch probe failed:", name, repr(error)[:200], flush=True)
    return results


class Bench:
    """The weights of one model, and the sweep over its products."""

    def __init__(self, model: str, batches: Sequence[int]) -> None:
        """Make the weights."""
        self.layers, self.products = MODELS[model]
        self.batches = batches
        self.rows: list[dict[str, Any]] = []
        self.cublas_us: dict[tuple[str, int], float] = {}
        self.best: dict[tuple[str, int], tuple[float, Config]] = {}
        self.weights = {
            p.name: [torch.randn(p.weight_shape, dtype=BF16, device="cuda") * p.k**-0.5 for _ in range(p.copies)]
            for p in self.products
        }

    def time_one(self, product: Product, m: int, pdl: bool, tile: Config | None) -> float:
        """Time one variant (None: cuBLAS) per product, and record it; infinity if it fails or is wrong."""
        weights = self.weights[product.name]
        x, extra = operands(product, m, "cuda")
        row: dict[str, Any] = {"product": product.name, "m": m, "pdl": pdl}
        row["tile"] = None if tile is None else dataclasses.astuple(tile)
        try:
            if tile is None:
                calls = [lambda w=w: cublas(product, x, w, extra) for w in weights]
            else:
                twin = cublas(product, x, weights[0], (extra[0].clone(), extra[1])).float()
                out = ours(product, x, weights[0], (extra[0].clone(), extra[1]), pdl, tile).float()
                row["error"] = float((out - twin).abs().max() / twin.abs().max())
                if not row["error"] <= 0.03:  # also where it is NaN
                    raise ValueError(f"wrong result: {row['error']}")
                calls = [lambda w=w: ours(product, x, w, extra, pdl, tile) for w in weights]
            row["us"] = graph_us(calls) / len(calls)
        except Exception as error:
            row["failed"] = repr(error)[:300]
            print("failed:", product.name, m, tile, repr(error)[:200], flush=True)
            torch.cuda.synchronize()
        self.rows.append(row)
        return float(row.get("us", "inf"))

    def sweep(self, product: Product, deadline: float) -> None:
        """Find the best tile for each M; 24 rows try the best four of 32. The first four are tried in any case."""
        ranked: dict[int, list[Config]] = {}
        for m in sorted(self.batches, key=lambda m: m < 32):
            self.cublas_us[product.name, m] = self.time_one(product, m, False, None)
            times: dict[Config, float] = {}
            for i, tile in enumerate(ranked[32][:4] if m < 32 and 32 in ranked else tiles_for(product, m)):
                if i < 4 or time.perf_counter() < deadline:
                    times[tile] = self.time_one(product, m, True, tile)
            ranked[m] = sorted(times, key=lambda tile: times[tile])
            self.best[product.name, m] = (times[ranked[m][0]], ranked[m][0])

    def time_without_pdl(self) -> None:
        """Time the best tiles once more, without PDL."""
        jobs = [(p, m, False, without_pdl(self.best[p.name, m][1])) for p in self.products for m in self.batches]
        precompile(jobs)
        for product, m, pdl, tile in jobs:
            self.time_one(product, m, pdl, tile)

    def layers_us(self, m: int, variant: str) -> float:
        """Microseconds of all layers without attention: "cublas", "ours" (without PDL), or whichever is faster."""
        qkv, o, gate_up, down = self.products
        _, (residual, gamma) = operands(down, m, "cuda")
        hidden = torch.randn(m, qkv.k, dtype=BF16, device="cuda")
        attended = torch.randn(m, o.k, dtype=BF16, device="cuda")

        def product(p: Product, i: int, x: torch.Tensor) -> Any:
            weight = self.weights[p.name][i % p.copies]
            us, tile = self.best[p.name, m]
            if variant == "cublas, no PDL":
                return cublas(p, x, weight, (residual, gamma), pdl=False)
            if variant == "cublas" or (variant == "best" and us > MUST_WIN * self.cublas_us[p.name, m]):
                return cublas(p, x, weight, (residual, gamma))
            if variant == "ours, no PDL":
                return ours(p, x, weight, (residual, gamma), False, without_pdl(tile))
            return ours(p, x, weight, (residual, gamma), True, tile)

        def step() -> None:
            normed = hidden
            for i in range(self.layers):
                product(qkv, i, normed)
                normed = product(down, i, product(gate_up, i, product(o, i, attended)))

        return graph_us([step])

    def interfaces(self) -> dict[str, dict[int, tuple[float, float]]]:
        """Microseconds of each product by rows: by cuBLAS, and with a bias of zeros, where torch goes to cuBLASLt."""
        table: dict[str, dict[int, tuple[float, float]]] = {}
        for product in self.products:
            weights = self.weights[product.name]
            zeros = weights[0].new_zeros(weights[0].shape[0])
            for m in INTERFACE_ROWS:
                x, _ = operands(product, m, "cuda")
                calls = [[lambda w=w, x=x, b=b: F.linear(x, w, b) for w in weights] for b in (None, zeros)]
                plain, biased = (graph_us(chain) / len(chain) for chain in calls)
                table.setdefault(product.name, {})[m] = (plain, biased)
        return table

    def fixed_tiles(self) -> dict[str, dict[str, float]]:
        """Microseconds of each product with each tile of deterministic_linear, and of cuBLAS."""
        table: dict[str, dict[str, float]] = {}
        for product in self.products:
            weights = self.weights[product.name]
            for m in FIXED_ROWS:
                x, _ = operands(product, m, "cuda")
                line = table.setdefault(f"{product.name} M={m}", {})
                line["cublas"] = graph_us([lambda w=w, x=x: F.linear(x, w) for w in weights]) / len(weights)
                for tile in FIXED:
                    name = ",".join(map(str, dataclasses.astuple(tile)[:5])) + (" tma" if tile.tma else "")
                    try:
                        calls = [lambda w=w, x=x, t=tile: bl.deterministic_linear(x, w, config=t) for w in weights]
                        line[name] = graph_us(calls) / len(weights)
                    except Exception as error:
                        line[name] = float("nan")
                        print("failed: deterministic", product.name, m, name, repr(error)[:200], flush=True)
        return table


def report(bench: Bench, layers: dict[str, float]) -> None:
    """Print the best of each product, and the layers. "bare" and "tma": the best tile with PDL, but no prefetch."""
    print("product    M  cuBLAS  no PDL   bare    tma   best  floor  best tile with PDL")
    for product in bench.products:
        rows, k = product.weight_shape
        for m in bench.batches:
            us, tile = bench.best[product.name, m]
            found = {
                (r["pdl"], *r["tile"][7:]): r["us"]
                for r in bench.rows
                if (r["product"], r["m"]) == (product.name, m) and "us" in r and r["tile"]
                and r["tile"][:7] == dataclasses.astuple(tile)[:7]
            }  # fmt: skip
            keys = ((False, 0, tile.tma), (True, 0, False), (True, 0, True))
            columns = " ".join(f"{found.get(key, float('nan')):6.2f}" for key in keys)
            floor = max(2 * rows * k / 3.02e6, 2 * m * rows * k / 785e6)
            print(
                f"{product.name:8}{m:4} {bench.cublas_us[product.name, m]:7.2f}  {columns} {us:6.2f} {floor:6.2f}  "
                f"{dataclasses.astuple(tile)}"
            )
    print("us of all layers without attention:", json.dumps({k: round(v, 1) for k, v in layers.items()}))


def measured_entries(bench: Bench) -> list[str]:
    """Return the lines of batch_linear.MEASURED for what beats cuBLAS; the bucket of 32 rows also with 24 of them."""
    lines = []
    for product in bench.products:
        for m in (m for m in bench.batches if m in bl.ROW_BUCKETS):
            us, tile = bench.best[product.name, m]
            limit = MUST_WIN * bench.cublas_us[product.name, m]
            of_24 = [
                r["us"] <= bench.cublas_us[product.name, 24]
                for r in bench.rows
                if (r["product"], r["m"], r["pdl"]) == (product.name, 24, True)
                and r["tile"] == dataclasses.astuple(tile)
                and "us" in r
            ]
            if us > limit or (m == 32 and not all(of_24)):
                continue
            named = [(f.name, getattr(tile, f.name), f.default) for f in dataclasses.fields(tile)[5:]]
            cut = [*map(str, dataclasses.astuple(tile)[:5]), *(f"{f}={v}" for f, v, default in named if v != default)]
            key = f'({m}, {product.n}, {product.k}, "{product.epilogue}")'
            versus = f"  # {us:.1f}, cuBLAS {bench.cublas_us[product.name, m]:.1f}"
            lines.append(f"    {key}: GemmConfig({', '.join(cut)}),{versus}")
    return lines


def run_model(model: str, batches: Sequence[int], end: float) -> tuple[Bench, dict[str, float]]:
    """Sweep one model until `end`, sharing the time among its products, and time whole layers."""
    bench = Bench(model, batches)
    for i, product in enumerate(bench.products):
        left = end - time.perf_counter()
        bench.sweep(product, time.perf_counter() + 0.9 * left / (len(bench.products) - i))
    bench.time_without_pdl()
    layers = {}
    for m in batches:
        for variant in ("cublas", "cublas, no PDL", "ours, no PDL", "ours", "best"):
            try:
                layers[f"M={m} {variant}"] = bench.layers_us(m, variant)
            except Exception as error:
                print("layers failed:", m, variant, repr(error)[:200], flush=True)
    return bench, layers


def main() -> None:
    """Compile, sweep, time layers and fixed tiles, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budget-s", nargs="+", type=float, default=[100, 60], help="seconds of sweep, per model")
    parser.add_argument("--batches", nargs="+", type=int, default=[24, *bl.ROW_BUCKETS])
    args = parser.parse_args()
    begin = time.perf_counter()
    precompile(sweep_jobs([p for model in args.models for p in MODELS[model][1]], args.batches))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "prefetch_us": prefetch_probe()}
    entries, done = [], []
    for i, model in enumerate(args.models):
        budget = args.budget_s[min(i, len(args.budget_s) - 1)]
        bench, layers = run_model(model, args.batches, time.perf_counter() + budget)
        best = {f"{name} M={m}": (us, dataclasses.astuple(t)) for (name, m), (us, t) in bench.best.items()}
        result[model] = {"rows": bench.rows, "layers_us": layers, "best": best}
        result[model]["interfaces_us"] = bench.interfaces()
        if model == "0.6B":
            result["fixed_us"] = bench.fixed_tiles()
        entries += measured_entries(bench)
        done.append((model, bench, layers))
        bench.weights.clear()
        torch.cuda.empty_cache()
        path = Path(os.environ.get("OUT", ".")) / "gemm_kernels.json"
        path.write_text(json.dumps(result, indent=1))
        print(f"{model}: {len(bench.rows)} timings, {time.perf_counter() - begin:.0f} s", flush=True)
    print("\nus to read 16 MB after a prefetch:", result["prefetch_us"])
    print("\ndeterministic_linear, us by tile (block_m, block_n, block_k, warps, stages):")
    for name, line in result.get("fixed_us", {}).items():
        print(f"{name:14}", {k: round(v, 1) for k, v in line.items()})
    for model, bench, layers in done:
        print(f"\n{model}, us per product with what follows it; tile = fields of GemmConfig")
        report(bench, layers)
        print("us by cuBLAS, and by cuBLASLt (with a bias of zeros):")
        for name, line in result[model]["interfaces_us"].items():
            print(f"{name:8}", {m: f"{plain:.1f} {biased:.1f}" for m, (plain, biased) in line.items()})
    print("\nMEASURED entries:", *entries, sep="\n")


if __name__ == "__main__":
    main()
