"""Small-batch matrix products on one GPU: our fused kernels against cuBLAS, one product at a time and as a decode step.

    OUT=folder python tests/benchmark/gemv_kernels.py [--budget-s 110] [--models 0.6B 8B]

Everything is timed in CUDA graphs whose kernels follow one another over distinct weights, more of them than the L2
cache holds. A product's time is that of a chain of itself, so it includes the gap to the next kernel; TB/s counts
weight bytes only. Prints the best tile of every product and the sum over a step; all numbers go to
$OUT/gemv_kernels.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from folovllm.model_executor.layers import small_batch_linear as sbl
from folovllm.model_executor.layers import triton_gemv

EPS = 1e-6
CHAIN_BYTES = 200e6  # four times the L2 cache
COPY_TBPS = 3.02
Config = sbl.SmallBatchConfig
Calls = Sequence[Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a decode step: `kind` says what is fused; N counts weight rows, both halves of a gated weight."""

    model: str
    name: str
    kind: str
    n: int
    k: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of one bfloat16 weight."""
        return 2 * self.n * self.k

    @property
    def copies(self) -> int:
        """Distinct weights a chain needs so that none is still in the L2 cache when its turn comes again."""
        return max(2, min(28, int(CHAIN_BYTES // self.weight_bytes) + 1))


def products_of(model: str, hidden: int, inner: int, q_size: int, kv_size: int) -> list[Product]:
    """Return the products of one layer, and the LM head."""
    return [
        Product(model, "qkv", "norm", q_size + 2 * kv_size, hidden),
        Product(model, "o", "add", hidden, q_size),
        Product(model, "gate_up", "norm_gated", 2 * inner, hidden),
        Product(model, "down", "add", hidden, inner),
        Product(model, "lm_head", "argmax", 151936, hidden),
    ]


MODELS = {
    "0.6B": (28, products_of("0.6B", 1024, 3072, 2048, 1024)),
    "8B": (36, products_of("8B", 4096, 12288, 4096, 1024)),
}

# (weight rows of a tile, block_k, warps, row tiles, prefetch, split), by the row counts and K they make sense for.
Tile = tuple[int, int, int, int, int, int]
ONE_ROW: dict[int, list[Tile]] = {
    1024: [
        (2, 1024, 4, 1, 1, 1), (4, 1024, 4, 1, 1, 1), (8, 1024, 4, 1, 1, 1), (8, 1024, 8, 1, 1, 1),
        (16, 1024, 8, 1, 1, 1), (4, 1024, 4, 2, 2, 1), (8, 1024, 8, 2, 2, 1), (4, 256, 4, 1, 4, 1),
        (8, 256, 8, 1, 4, 1),
    ],
    2048: [
        (2, 1024, 4, 1, 2, 1), (4, 1024, 4, 1, 2, 1), (4, 2048, 8, 1, 1, 1), (2, 2048, 4, 1, 1, 1),
        (8, 2048, 8, 1, 1, 1), (4, 256, 4, 1, 8, 1), (8, 256, 8, 1, 8, 1),
    ],
    3072: [
        (1, 1024, 4, 1, 3, 1), (2, 1024, 4, 1, 3, 1), (4, 1024, 4, 1, 3, 1), (4, 1024, 8, 1, 3, 1),
        (8, 1024, 8, 1, 3, 1), (4, 512, 4, 1, 6, 1), (8, 256, 8, 1, 12, 1),
    ],
    4096: [
        (4, 1024, 4, 1, 4, 1), (2, 4096, 4, 1, 1, 1), (4, 2048, 4, 1, 2, 1), (4, 4096, 8, 1, 1, 1),
        (8, 2048, 8, 1, 2, 1), (8, 1024, 8, 1, 4, 1), (4, 2048, 8, 4, 4, 1), (4, 1024, 4, 2, 4, 1),
    ],
    12288: [
        (1, 4096, 4, 1, 3, 1), (2, 4096, 8, 1, 3, 1), (2, 2048, 4, 1, 6, 1), (4, 2048, 8, 1, 6, 1),
        (4, 1024, 4, 1, 6, 1), (4, 1024, 4, 1, 4, 1),
    ],
}  # fmt: skip
ONE_ROW_HEAD: list[Tile] = [(4, 1024, 4, 4, 4, 1), (8, 1024, 8, 4, 3, 1), (8, 1024, 4, 4, 2, 1), (4, 1024, 4, 8, 4, 1)]
SEVERAL_ROWS: dict[int, list[Tile]] = {
    1024: [
        (16, 1024, 4, 1, 1, 4), (8, 1024, 4, 1, 1, 4), (16, 512, 4, 1, 2, 4), (8, 512, 8, 1, 2, 8),
        (16, 1024, 8, 1, 1, 8), (16, 512, 8, 1, 2, 8), (32, 256, 8, 1, 4, 8), (32, 512, 8, 1, 2, 8),
    ],
    2048: [(8, 512, 4, 1, 4, 4), (8, 512, 8, 1, 4, 8), (8, 1024, 8, 1, 2, 8), (16, 512, 8, 1, 4, 8)],
    3072: [(8, 512, 4, 1, 6, 4), (8, 512, 8, 1, 6, 8), (8, 1024, 8, 1, 3, 8), (16, 512, 8, 1, 4, 8)],
    4096: [(16, 512, 4, 1, 4, 4), (16, 512, 8, 1, 4, 8), (32, 256, 8, 1, 4, 8), (32, 512, 8, 1, 2, 8)],
    12288: [(16, 512, 8, 1, 4, 8), (16, 1024, 8, 1, 2, 8), (32, 256, 8, 1, 4, 8)],
}  # fmt: skip


def tiles_for(product: Product, m: int) -> list[Config]:
    """Return the tiles to try, best guess first; gated products have half as many outputs as weight rows."""
    tiles = (ONE_ROW if m == 1 else SEVERAL_ROWS)[product.k]
    if product.name == "lm_head":
        tiles = (ONE_ROW_HEAD if m == 1 else []) + tiles[:5]
    outputs = 2 if product.kind == "norm_gated" else 1
    configs = [sbl.default_config(m, product.n // outputs, product.k, outputs == 2)]
    for rows, block_k, warps, row_tiles, prefetch, split in tiles:
        if rows >= outputs:
            configs.append(Config(rows // outputs, block_k, warps, row_tiles, prefetch, split))
    return list(dict.fromkeys(configs))


def fused(
    product: Product, x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, pdl: bool, tile: Config | None
) -> Any:
    """Run our kernel. `other`: the norm's weight [K], or the residual [M, N]."""
    if product.kind == "norm":
        return sbl.norm_linear(x, None, other, EPS, weight, pdl=pdl, config=tile)[0]
    if product.kind == "norm_gated":
        return sbl.norm_gate_up(x, None, other, EPS, weight, pdl=pdl, config=tile)[0]
    if product.kind == "add":
        return sbl.linear(x, weight, residual=other, pdl=pdl, config=tile)
    return sbl.greedy_ids(x, weight, pdl=pdl, config=tile)


def unfused(product: Product, x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> Any:
    """The same with cuBLAS and one kernel for each neighbour."""
    if product.kind == "norm":
        return F.linear(F.rms_norm(x, other.shape, other, EPS), weight)
    if product.kind == "norm_gated":
        return silu_mul(F.linear(F.rms_norm(x, other.shape, other, EPS), weight))
    if product.kind == "add":
        return F.linear(x, weight) + other
    return F.linear(x, weight).argmax(-1)


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Out [M, N] = silu(gate) * up for gate | up [M, 2 N]."""
    row, col = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * N + col, mask=col < N).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + col, mask=col < N).to(tl.float32)
    tl.store(out_ptr + row * N + col, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=col < N)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """One kernel for SiLU and product, so that cuBLAS's side is not charged for two."""
    m, n = x.shape[0], x.shape[1] // 2
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    silu_mul_kernel[(triton.cdiv(n, 512), m)](x, out, n, 512)
    return out


@triton.jit
def tick_kernel(x_ptr, PDL: tl.constexpr):
    """The least a dependent kernel can do: x += 1."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ptr = x_ptr + tl.program_id(0)
    tl.store(ptr, tl.load(ptr) + 1)


def graph_us(calls: Calls) -> float:
    """Microseconds of one replay of a graph of `calls`: the median of five timings of about 2 ms each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:1]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay_us(reps: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(reps):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / reps

    replay_us(2)
    reps = max(3, min(200, int(2000 / replay_us(2))))
    return statistics.median(replay_us(reps) for _ in range(5))


def launch_floor() -> dict[str, float]:
    """Microseconds per kernel of a chain of 200 kernels that do nothing, by programs and PDL."""
    x = torch.zeros(4096, dtype=torch.int32, device="cuda")
    out = {}
    for programs in (1, 132, 1056):
        for pdl in (False, True):
            extra = {"launch_pdl": True} if pdl else {}
            call = lambda p=programs, d=pdl, e=extra: tick_kernel[(p,)](x, d, num_warps=4, **e)  # noqa: E731
            try:
                out[f"{programs} programs, {'pdl' if pdl else 'no pdl'}"] = graph_us([call] * 200) / 200
            except Exception as error:
                out[f"{programs} programs, {'pdl' if pdl else 'no pdl'}"] = float("nan")
                print("launch floor failed:", repr(error)[:200])
    return out


class OfflineDriver:
    """Stands in for triton's driver where kernels are only compiled: no CUDA context in fourteen processes."""

    def __init__(self, target: Any) -> None:
        """`target`: the GPUTarget to compile for."""
        self.target = target

    def get_current_target(self) -> Any:
        """The target."""
        return self.target

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def compile_one(job: tuple[Product, int, bool, Config, int]) -> str:
    """Compile one kernel into triton's disk cache, from meta tensors; return "" or what went wrong."""
    product, m, pdl, tile, capability = job
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(OfflineDriver(GPUTarget("cuda", capability, 32)))
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    sbl.runs_on_triton = lambda x: True
    try:
        x, weight, other = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes(product, m))
        fused(product, x, weight, other, pdl, tile)
        return ""
    except Exception as error:
        return f"{product.name} {m} {tile}: {error!r}"[:400]
    finally:
        JITFunction.run = run


def shapes(product: Product, m: int) -> list[tuple[int, ...]]:
    """Shapes of x, weight and `other` (see fused)."""
    other = (m, product.n) if product.kind == "add" else (product.k,)
    return [(m, product.k), (product.n, product.k), other]


def precompile(products: list[Product]) -> None:
    """Compile every kernel of the sweep in parallel processes; what fails is reported and tried again when used."""
    capability = torch.cuda.get_device_capability()
    jobs = [
        (product, m, pdl, tile, capability[0] * 10 + capability[1])
        for product in products
        for m in (1, 16)  # one kernel serves all of 2 to 16 rows
        for tile in tiles_for(product, m)
        for pdl in (True, False)
    ]
    jobs.sort(key=lambda job: -job[0].k * (job[1] > 1))  # the slow ones first
    workers = max(1, (os.cpu_count() or 2) - 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for failure in filter(None, pool.map(compile_one, jobs)):
            print("compile failed:", failure, flush=True)
    print(f"{len(jobs)} kernels compiled by {workers} processes", flush=True)


class Bench:
    """The weights of one model, and the sweep over its products."""

    def __init__(self, model: str, deadline: float) -> None:
        """`deadline`: time.perf_counter() after which no more tiles are tried."""
        self.layers, self.products = MODELS[model]
        self.deadline = deadline
        self.rows: list[dict[str, Any]] = []
        self.best: dict[tuple[str, int], Config] = {}
        self.weights = {
            p.name: [torch.randn(p.n, p.k, dtype=torch.bfloat16, device="cuda") * p.k**-0.5 for _ in range(p.copies)]
            for p in self.products
        }

    def time_one(self, product: Product, m: int, pdl: bool, tile: Config | None, kind: str) -> float:
        """Time one variant per kernel and record it; NaN if it fails or computes something else than `unfused`."""
        weights = self.weights[product.name]
        x, _, other = (torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shapes(product, m))
        row: dict[str, Any] = {"model": product.model, "product": product.name, "m": m, "variant": kind, "pdl": pdl}
        row["tile"] = None if tile is None else dataclasses.asdict(tile)
        try:
            if kind == "fused":
                row["error"] = relative_error(
                    product, x, weights[0], other, fused(product, x, weights[0], other, pdl, tile)
                )
                calls = [lambda w=w: fused(product, x, w, other, pdl, tile) for w in weights]
            elif kind == "unfused":
                calls = [lambda w=w: unfused(product, x, w, other) for w in weights]
            else:
                calls = [lambda w=w: F.linear(x, w) for w in weights]
            row["us"] = graph_us(calls) / len(calls)
            row["tbps"] = product.weight_bytes / row["us"] / 1e6
            if not row.get("error", 0.0) <= 0.03:  # also where it is NaN
                print("WRONG", row, flush=True)
                row["wrong"] = True
        except Exception as error:
            row["failed"] = repr(error)[:300]
            print("failed:", product.name, m, tile, repr(error)[:200], flush=True)
            torch.cuda.synchronize()
        self.rows.append(row)
        return float("inf") if "failed" in row or "wrong" in row else float(row["us"])

    def sweep(self, product: Product, batches: Sequence[int]) -> None:
        """Find the best tile for each M: all tiles at 1, 4 and 16 rows, the best three of a neighbour at 2 and 8."""
        ranked: dict[int, list[Config]] = {}
        for m in sorted(batches, key=lambda m: m not in (1, 4, 16)):
            neighbour = {2: 4, 8: 16}.get(m)
            tiles = ranked[neighbour][:3] if neighbour in ranked else tiles_for(product, m)
            times = {}
            for tile in tiles:
                if times and time.perf_counter() > self.deadline:
                    break
                times[tile] = self.time_one(product, m, True, tile, "fused")
            ranked[m] = sorted(times, key=lambda tile: times[tile])
            self.best[product.name, m] = ranked[m][0]
            self.time_one(product, m, False, ranked[m][0], "fused")
            self.time_one(product, m, False, None, "unfused")
            self.time_one(product, m, False, None, "cublas")

    def step_us(self, m: int, variant: str) -> float:
        """Microseconds of a decode step without attention; `variant` is "unfused", "fused" or "fused pdl"."""
        qkv, o, gate_up, down, head = self.products
        x, attended = (torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for k in (qkv.k, o.k))
        gamma = torch.ones(qkv.k, dtype=torch.bfloat16, device="cuda")

        def product(p: Product, i: int, x: torch.Tensor, other: torch.Tensor) -> Any:
            weight = self.weights[p.name][i % p.copies]
            if variant == "unfused":
                return unfused(p, x, weight, other)
            return fused(p, x, weight, other, variant == "fused pdl", self.best.get((p.name, m)))

        def step() -> None:
            hidden = x
            for i in range(self.layers):
                product(qkv, i, hidden, gamma)
                hidden = product(o, i, attended, hidden)
                hidden = product(down, i, product(gate_up, i, hidden, gamma), hidden)
            product(head, 0, F.rms_norm(hidden, gamma.shape, gamma, EPS), gamma)

        return graph_us([step])


def relative_error(
    product: Product, x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, out: torch.Tensor
) -> float:
    """Largest difference from `unfused`, in units of its largest value; for ids, of the logits they point at."""
    if product.kind == "argmax":
        logits = F.linear(x, weight).float()
        return float(((logits.amax(-1) - logits.gather(1, out[:, None])[:, 0]) / logits.amax(-1)).max())
    expected = unfused(product, x, weight, other).float()
    return float((out.float() - expected).abs().max() / expected.abs().max())


def report(bench: Bench, steps: dict[str, float], batches: Sequence[int]) -> None:
    """Print the best of each product, and the step."""
    print(f"{'product':9}{'M':>3} {'cuBLAS':>7} {'unfused':>8} {'fused':>7} {'+PDL':>7} {'TB/s':>5} {'floor':>6}  tile")
    for product in bench.products:
        for m in batches:
            rows = [r for r in bench.rows if r["product"] == product.name and r["m"] == m and "us" in r]
            tile = bench.best.get((product.name, m))
            chosen = None if tile is None else dataclasses.asdict(tile)

            def us(variant: str, pdl: bool, rows: list[dict[str, Any]] = rows, chosen: Any = chosen) -> float:
                found = [r["us"] for r in rows if r["variant"] == variant and r["pdl"] == pdl]
                if variant == "fused":
                    found = [
                        r["us"] for r in rows if r["variant"] == variant and r["pdl"] == pdl and r["tile"] == chosen
                    ]
                return found[0] if found else float("nan")

            best = us("fused", True)
            times = f"{us('cublas', False):7.2f} {us('unfused', False):8.2f} {us('fused', False):7.2f} {best:7.2f}"
            megabytes = product.weight_bytes / 1e6
            cut = "" if tile is None else dataclasses.astuple(tile)
            print(f"{product.name:9}{m:3} {times} {megabytes / best:5.2f} {megabytes / COPY_TBPS:6.2f}  {cut}")
    layer_bytes = sum(p.weight_bytes for p in bench.products[:4])
    floor = (bench.layers * layer_bytes + bench.products[4].weight_bytes) / COPY_TBPS / 1e6
    print(f"step without attention (floor {floor:.0f} us):", json.dumps({k: round(v, 1) for k, v in steps.items()}))


def main() -> None:
    """Compile, sweep, time whole steps, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget-s", type=float, default=110)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    assert triton_gemv.PADDED_ROWS.value >= max(args.batches)
    begin = time.perf_counter()
    precompile([p for model in args.models for p in MODELS[model][1]])
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "launch_us": launch_floor()}
    done = []
    for i, model in enumerate(args.models):
        left = begin + args.budget_s - time.perf_counter()
        bench = Bench(model, time.perf_counter() + 0.85 * left / (len(args.models) - i))
        for product in bench.products:
            bench.sweep(product, args.batches)
        steps = {}
        for m in args.batches:
            for variant in ("unfused", "fused", "fused pdl"):
                try:
                    steps[f"M={m} {variant}"] = bench.step_us(m, variant)
                except Exception as error:
                    print("step failed:", m, variant, repr(error)[:200], flush=True)
        bench.weights.clear()
        torch.cuda.empty_cache()
        best = {f"{name} M={m}": dataclasses.astuple(tile) for (name, m), tile in bench.best.items()}
        result[model] = {"rows": bench.rows, "step_us": steps, "best": best}
        path = Path(os.environ.get("OUT", ".")) / "gemv_kernels.json"
        path.write_text(json.dumps(result, indent=1))
        done.append((model, bench, steps))
        print(f"{model}: {len(bench.rows)} timings, {time.perf_counter() - begin:.0f} s", flush=True)
    print("\nus per kernel that does nothing:", {k: round(v, 2) for k, v in result["launch_us"].items()})
    for model, bench, steps in done:
        print(f"\n{model}, us per product; tile = (block_n, block_k, warps, row_tiles, prefetch, split)")
        report(bench, steps, args.batches)


if __name__ == "__main__":
    main()
