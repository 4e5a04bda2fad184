"""GPTQ products on one GPU: checked, then timed against bfloat16 weights, one product at a time and a model at a time.

    OUT=folder python tests/benchmark/gptq_kernels.py [--budget-s 150] [--rows 1 16 ...] [--no-check]

Shapes are Qwen3-8B's, 4 bits in groups of 128, symmetric; 8 bits are checked, not timed. Timed in CUDA graphs over
distinct weights, more of them than the L2 cache holds, as in gemv_kernels.py; "bf16" is what the engine runs now
without quantization: our fused kernels at one row, cuBLAS above. Prints what was wrong, tables, and last the entries of
triton_gptq_tiles.MEASURED_...; all numbers go to $OUT/gptq_kernels.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gemv_kernels import OfflineDriver, graph_us
from torch.nn import functional as F

from folovllm.model_executor.layers import small_batch_linear as sbl
from folovllm.model_executor.layers.fused_ops import rms_norm, silu_and_mul
from folovllm.model_executor.layers.quantization import packing
from folovllm.model_executor.layers.quantization import triton_gptq as tg

EPS = 1e-6
CHAIN_BYTES = 200e6
LAYERS = 36
COPY_TBPS = 3.02
BF16 = torch.bfloat16
Tile = tg.GemvConfig | tg.PackedGemmConfig | str
V, G = tg.GemvConfig, tg.PackedGemmConfig


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a layer. kind: "norm" before, "add" or "norm_gated"; n: weight rows, both halves of gated ones."""

    name: str
    kind: str
    n: int
    k: int

    @property
    def outputs(self) -> int:
        """N."""
        return self.n // 2 if self.kind == "norm_gated" else self.n


PRODUCTS = [
    Product("qkv", "norm", 6144, 4096),
    Product("o", "add", 4096, 4096),
    Product("gate_up", "norm_gated", 24576, 4096),
    Product("down", "add", 4096, 12288),
]
# (block_n, step_blocks, warps, row_tiles, prefetch)
ONE_ROW = {
    4096: [(n, 16, 4, tiles, prefetch) for n in (4, 8, 16) for tiles in (1, 2) for prefetch in (1, 2, 3)]
    + [(4, 16, 4, 4, 3), (8, 8, 4, 1, 2), (8, 8, 2, 1, 2), (8, 16, 8, 1, 2)],
    12288: [(n, 16, 4, 1, prefetch) for n in (2, 4, 8) for prefetch in (1, 2, 3)]
    + [(4, 8, 2, 1, 3), (4, 8, 4, 1, 3), (4, 32, 8, 1, 2), (8, 8, 4, 1, 3)],
}
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BLOCKS_M = {16: [16], 32: [32], 64: [64], 128: [128, 64], 256: [128, 64], 512: [128, 64], 1024: [128], 2048: [128]}
DEQUANTIZE = "dequantize"


def tiles_for(product: Product, m: int) -> list[Tile]:
    """Return the tiles to try for one of the rows of BLOCKS_M, or one row."""
    gated = product.kind == "norm_gated"
    if m == 1:
        return [V(n, blocks, w, t, p) for n, blocks, w, t, p in ONE_ROW[product.k]]
    tiles: list[Tile] = [DEQUANTIZE] if m >= 256 else []
    for block_m, (block_n, warps), stages, splits, fuses_silu in itertools.product(
        BLOCKS_M[m], [(64, 4), (128, 4), (128, 8), (256, 8)], (2, 3, 4, 6), (1, 2, 4, 8), (True, False)
    ):
        halves = 2 if gated and fuses_silu else 1
        programs = -(-m // block_m) * (product.n // halves // block_n)
        shared = stages * block_m * 512 + max(1, stages - 1) * block_n * 128 * halves
        registers = (block_m * block_n * halves + block_n * 128) // (32 * warps)
        if (
            (gated and fuses_silu and splits > 1)
            or (not gated and not fuses_silu)
            or shared > 225_000
            or registers > 200
            or (splits > 1 and (programs > 200 or programs * splits > 600 or product.k // splits < 1024))
            or programs * splits < 60
            or (m <= 64 and stages == 2)
            or (m >= 128 and programs * splits < 96)
            or (m >= 512 and (splits > 1 or block_n < 128))
        ):
            continue
        tiles.append(G(block_m, block_n, warps, stages, splits, 4, block_m >= 64, fuses_silu))
    return tiles


def random_weight(n: int, k: int, bits: int, device: str = "cuda") -> tg.PackedWeight:
    """Return random bits as a symmetric weight with scales about right for rows of x of order 1."""
    blocks, groups = k * bits // 1024, max(1, 8 // bits)
    info = torch.iinfo(torch.int32)
    scale = torch.full((blocks, (groups + 1) // 2, n, 2), 2.0 ** (2 - bits) * k**-0.5, dtype=BF16, device=device)
    words = torch.empty(blocks, n, tg.WORDS, dtype=torch.int32, device=device)
    if device != "meta":
        words.random_(info.min, info.max)
    return tg.PackedWeight(words, scale.view(torch.int32).squeeze(-1), None, bits, k, groups, BF16)


def ours(
    p: Product, x: torch.Tensor, weight: tg.PackedWeight, other: torch.Tensor, tile: Tile, pdl: bool = True
) -> Any:
    """Run our product. `other`: the norm's weight [K], or the residual [M, N]."""
    if isinstance(tile, str):
        out = tg._multiply_dequantized(x, weight)
        return out.add_(other) if p.kind == "add" else silu_and_mul(out) if p.kind == "norm_gated" else out
    if p.kind == "add":
        return tg.linear(x, weight, residual=other, pdl=pdl, config=tile)
    if x.shape[0] > 1:  # the norm's kernel is the same on both sides
        return (tg.gate_up if p.kind == "norm_gated" else tg.linear)(x, weight, pdl=pdl, config=tile)
    if isinstance(tile, G):
        x = rms_norm(x, other, EPS, pdl=pdl)
        return (tg.gate_up if p.kind == "norm_gated" else tg.linear)(x, weight, pdl=pdl, config=tile)
    return (tg.norm_gate_up if p.kind == "norm_gated" else tg.norm_linear)(x, other, EPS, weight, pdl=pdl, config=tile)


def bf16(p: Product, x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> Any:
    """What the engine runs with bfloat16 weights [n, K]."""
    if x.shape[0] == 1:
        if p.kind == "add":
            return sbl.linear(x, weight, residual=other, pdl=True)
        product = sbl.norm_gate_up if p.kind == "norm_gated" else sbl.norm_linear
        return product(x, None, other, EPS, weight, pdl=True)[0]
    out = torch.mm(x, weight.t())
    return silu_and_mul(out, pdl=True) if p.kind == "norm_gated" else out


def expected(p: Product, x: torch.Tensor, weight: tg.PackedWeight, other: torch.Tensor) -> torch.Tensor:
    """The same in float32 on the dequantized weight."""
    wide = x.float()
    if x.shape[0] == 1 and p.kind != "add":
        wide = F.rms_norm(wide, other.shape, other.float(), EPS)
    out = wide @ tg.dequantize_torch(weight).float().T
    if p.kind == "add":
        return out + other.float()
    return F.silu(out[:, : p.outputs]) * out[:, p.outputs :] if p.kind == "norm_gated" else out


def compile_one(job: tuple[Product, int, Tile, bool, int]) -> str:
    """Compile one product's kernels into triton's disk cache from meta tensors; return "" or what went wrong."""
    product, m, tile, pdl, capability = job
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from folovllm.utils.triton_launch import FastKernel

    # A launch seen before would skip the compiler and need a GPU.
    FastKernel._launch = lambda self, grid, *args, **options: self.kernel[grid](*args, **options)
    driver.set_active(OfflineDriver(GPUTarget("cuda", capability, 32)))
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    tg.runs_on_triton = lambda x: True
    tg._runs_ptx = lambda weight: True
    try:
        x = torch.empty(m, product.k, dtype=BF16, device="meta")
        other = torch.empty((m, product.n) if product.kind == "add" else (product.k,), dtype=BF16, device="meta")
        ours(product, x, random_weight(product.n, product.k, 4, "meta"), other, tile, pdl)
        return ""
    except Exception as error:
        return f"{product.name} {m} {tile}: {error!r}"[:300]
    finally:
        JITFunction.run = run


def precompile(rows: Sequence[int]) -> None:
    """Compile the sweep in parallel processes; what fails here is tried again when used."""
    major, minor = torch.cuda.get_device_capability()
    jobs = {
        (p, 1 if m == 1 else 16, tile, True, 10 * major + minor)
        for p in PRODUCTS
        for m in (1, *BLOCKS_M)
        if m in rows
        for tile in tiles_for(p, m)
        if not isinstance(tile, str)
    }
    workers = max(1, (os.cpu_count() or 2) - 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        failures = [failure for failure in pool.map(compile_one, jobs) if failure]
    print(f"{len(jobs)} products compiled by {workers} processes, {len(failures)} failed", *failures[:2], flush=True)


def check() -> list[str]:
    """Compare every format and kind of kernel with float32; return what is wrong."""
    wrong = []
    formats = [(4, 128, True), (4, 32, False), (4, 64, True), (4, -1, False), (8, 128, False), (8, 32, True)]
    for dtype in (BF16, torch.float16):
        for bits, group_size, sym in formats:
            n, k = 1032, 1152
            size = k if group_size == -1 else group_size
            values = torch.randint(0, 2**bits, (k, n), device="cuda")
            scales = (torch.rand(k // size, n, device="cuda") + 0.5).to(dtype) * (2.0 ** (1 - bits) / k**0.5)
            zeros = torch.randint(0, 2**bits + 1, (k // size, n), device="cuda")
            zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
            index = torch.arange(k, device="cuda") // size
            weight = ((values - zeros[index]).float() * scales.float()[index]).T
            packed = tg.repack_for_triton(packing.pack_rows(values, bits), scales, zeros, bits, group_size)
            if not torch.equal(tg.dequantize_packed(packed), weight.to(dtype)):
                wrong.append(f"dequantize {dtype} {bits} {group_size}")
            for m in (1, 3, 16, 64, 200, 300):
                x = torch.randn(m, k, device="cuda").to(dtype)
                gamma = torch.rand(k, device="cuda").to(dtype)
                out = x.float() @ weight.T
                normed = F.rms_norm(x.float(), (k,), gamma.float(), EPS).to(dtype).float() @ weight.T
                act = F.silu(out[:, : n // 2]) * out[:, n // 2 :]
                calls: list[tuple[str, Callable[[], torch.Tensor], torch.Tensor]] = [
                    ("linear", lambda x=x, w=packed: tg.linear(x, w, pdl=True), out),
                    ("gate_up", lambda x=x, w=packed: tg.gate_up(x, w, pdl=True), act),
                    ("norm", lambda x=x, w=packed, g=gamma: tg.norm_linear(x, g, EPS, w, pdl=True), normed),
                ]
                if m == 3:
                    tile = G(16, 64, 4, 3, 3)
                    calls.append(("split", lambda x=x, w=packed, t=tile: tg.linear(x, w, pdl=True, config=t), out))
                for name, call, reference in calls:
                    try:
                        error = float((call().float() - reference).abs().max() / reference.abs().max())
                    except Exception as failure:
                        wrong.append(f"{name} {dtype} {bits} {group_size} M={m}: {failure!r}"[:200])
                        continue
                    if not error < 0.02:
                        wrong.append(f"{name} {dtype} {bits} {group_size} M={m}: error {error:.3g}")
    return wrong


class Bench:
    """The weights, the sweep and its results."""

    def __init__(self, num_rows: Sequence[int], deadline: float) -> None:
        """`num_rows`: some of ROWS; `deadline`: time.perf_counter() after which no more tiles are tried."""
        self.num_rows, self.deadline = num_rows, deadline
        self.rows: list[dict[str, Any]] = []
        self.best: dict[tuple[str, int], Tile] = {}
        self.us: dict[str, float] = {}
        copies = {p: max(2, int(CHAIN_BYTES // (p.n * p.k // 2)) + 1) for p in PRODUCTS}
        self.packed = {p: [random_weight(p.n, p.k, 4) for _ in range(copies[p])] for p in PRODUCTS}
        plain = {p: max(2, int(CHAIN_BYTES // (2 * p.n * p.k)) + 1) for p in PRODUCTS}
        self.plain = {
            p: [torch.randn(p.n, p.k, dtype=BF16, device="cuda") * p.k**-0.5 for _ in range(plain[p])] for p in PRODUCTS
        }

    def inputs(self, p: Product, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and `other`; see `ours`."""
        x = torch.randn(m, p.k, dtype=BF16, device="cuda")
        return x, torch.randn((m, p.n) if p.kind == "add" else (p.k,), dtype=BF16, device="cuda")

    def time_tile(self, p: Product, m: int, tile: Tile) -> float:
        """Return microseconds per product, infinity where it fails or is wrong; record either."""
        x, other = self.inputs(p, m)
        row: dict[str, Any] = {"product": p.name, "m": m, "tile": repr(tile)}
        self.rows.append(row)
        try:
            out, reference = (
                ours(p, x, self.packed[p][0], other, tile).float(),
                expected(p, x, self.packed[p][0], other),
            )
            row["error"] = float((out - reference).abs().max() / reference.abs().max())
            if not row["error"] <= 0.02:
                print("WRONG", row, flush=True)
                return float("inf")
            row["us"] = graph_us([lambda w=w: ours(p, x, w, other, tile) for w in self.packed[p]]) / len(self.packed[p])
            return float(row["us"])
        except Exception as error:
            row["failed"] = repr(error)[:200]
            print("failed:", p.name, m, tile, repr(error)[:120], flush=True)
            return float("inf")

    def sweep(self) -> None:
        """Time every tile; of 8 rows the best three of 16."""
        ranked: dict[tuple[Product, int], list[Tile]] = {}
        for m in sorted(self.num_rows, key=lambda m: m == 8):
            for p in PRODUCTS:
                tiles = ranked[p, 16][:3] if m == 8 else tiles_for(p, m)
                times: dict[Tile, float] = {}
                for tile in tiles:
                    if not times or time.perf_counter() < self.deadline:
                        times[tile] = self.time_tile(p, m, tile)
                ranked[p, m] = sorted(times, key=lambda tile: times[tile])
                self.best[p.name, m] = ranked[p, m][0]
                x, other = self.inputs(p, m)
                plain = graph_us([lambda w=w, x=x, o=other, p=p: bf16(p, x, w, o) for w in self.plain[p]])
                self.us[f"{p.name} {m} bf16"] = plain / len(self.plain[p])
                self.us[f"{p.name} {m}"] = times[ranked[p, m][0]]
                if DEQUANTIZE in times:
                    self.us[f"{p.name} {m} dequantized"] = times[DEQUANTIZE]

    def layers_us(self, m: int, quantized: bool) -> float:
        """Return microseconds of the products and norms of all layers, in one graph."""
        hidden, gamma = torch.randn(m, 4096, dtype=BF16, device="cuda"), torch.ones(4096, dtype=BF16, device="cuda")

        def product(i: int, x: torch.Tensor, layer: int, other: torch.Tensor) -> Any:
            p = PRODUCTS[i]
            if quantized:
                return ours(p, x, self.packed[p][layer % len(self.packed[p])], other, self.best[p.name, m])
            out = bf16(p, x, self.plain[p][layer % len(self.plain[p])], other)
            return out.add_(other) if p.kind == "add" and m > 1 else out

        def norm(x: torch.Tensor) -> torch.Tensor:
            return x if m == 1 else rms_norm(x, gamma, EPS, pdl=True)

        def step() -> None:
            x = hidden
            for layer in range(LAYERS):
                qkv = product(0, norm(x), layer, gamma)
                x = product(1, qkv[:, :4096].contiguous() if m > 1 else qkv.view(-1)[:4096].view(1, -1), layer, x)
                x = product(3, product(2, norm(x), layer, gamma), layer, x)

        return graph_us([step])


def report(bench: Bench) -> None:
    """Print the best of each product."""
    print(f"{'product':8}{'M':>4} {'bf16':>7} {'4 bits':>7} {'ratio':>6} {'TB/s':>5} {'unpack':>7}  tile")
    for m in bench.num_rows:
        for p in PRODUCTS:
            plain, us = bench.us.get(f"{p.name} {m} bf16"), bench.us.get(f"{p.name} {m}")
            if plain and us:
                tbps = p.n * p.k * (0.5 + 2 / 128) / us / 1e6
                unpacked = bench.us.get(f"{p.name} {m} dequantized", 0)
                print(
                    f"{p.name:8}{m:4} {plain:7.1f} {us:7.1f} {us / plain:6.2f} {tbps:5.2f} {unpacked:7.1f}  "
                    f"{bench.best[p.name, m]}"
                )


def main() -> None:
    """Check, compile, sweep, time layers, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="formats against float32")
    args = parser.parse_args()
    begin = time.perf_counter()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    path = Path(os.environ.get("OUT", ".")) / "gptq_kernels.json"
    precompile(args.rows)
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    result["wrong"] = check() if args.check else []
    print(
        f"checked after {time.perf_counter() - begin:.0f} s; wrong: {len(result['wrong'])}",
        *result["wrong"][:12],
        sep="\n",
    )
    bench = Bench(args.rows, begin + args.budget_s)
    try:
        bench.sweep()
    finally:
        result |= {
            "rows": bench.rows,
            "us": bench.us,
            "best": {f"{n} {m}": repr(t) for (n, m), t in bench.best.items()},
        }
        path.write_text(json.dumps(result, indent=1))
    print(f"swept after {time.perf_counter() - begin:.0f} s", flush=True)
    result["layers_ms"] = {}
    for m in args.rows:
        for quantized in (False, True):
            try:
                ms = bench.layers_us(m, quantized) / 1e3
                result["layers_ms"][f"M={m} {'4 bits' if quantized else 'bf16'}"] = round(ms, 3)
            except Exception as error:
                print("layers failed:", m, quantized, repr(error)[:200], flush=True)
    path.write_text(json.dumps(result, indent=1))
    report(bench)
    print("36 layers without attention, ms:", json.dumps(result["layers_ms"]))
    for p in PRODUCTS:
        for m in args.rows:
            key = (p.outputs, p.k, p.kind == "norm_gated")
            print("   ", key if m == 1 else (m, *key), ":", bench.best.get((p.name, m)))
    print(f"{time.perf_counter() - begin:.0f} s; wrong: {len(result['wrong'])}")


if __name__ == "__main__":
    main()
