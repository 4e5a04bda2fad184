"""The fused kernels on one GPU: checked against their twins, then timed inside CUDA graphs, with variants swept.

    python tests/benchmark/fused_kernels.py [--seconds 55]

Prints microseconds and TB/s of every variant, a table of the best last; writes fused_kernels.json under $OUT if that is
set. `--seconds` bounds the sweep: variants that come later are skipped, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from folovllm.model_executor.layers import fused_ops, triton_kernels
from folovllm.sample.ops import fused_sampler, triton_sampler

MODELS = {"0.6B": (1024, 3072, 16, 8), "8B": (4096, 12288, 32, 8)}
"""Qwen3: hidden size, inner size, heads, KV heads; head size 128."""
TOKENS = (1, 8, 32, 256, 2048, 16384)
VOCAB = 151936
EPS = 1e-6
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


class Bench:
    """Times calls, survives those that fail, and keeps all results."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.perf_counter() + seconds
        self.rows: list[dict[str, Any]] = []

    def graph_us(self, call: Callable[[], object], repeats: int) -> float:
        """Microseconds of one call out of `repeats` in a graph: median of five replays."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        graph.replay()
        return self.event_us(graph.replay, 5) / repeats

    @staticmethod
    def event_us(call: Callable[[], object], repeats: int) -> float:
        """Median microseconds of a call."""
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return sorted(times)[len(times) // 2]

    def add(
        self, op: str, size: str, variant: str, num_bytes: int, call: Callable[[], object], graph: bool = True
    ) -> None:
        """Time `call`, which moves `num_bytes` at least, and print the result."""
        row: dict[str, Any] = {"op": op, "size": size, "variant": variant}
        self.rows.append(row)
        if time.perf_counter() > self.deadline:
            row["error"] = "skipped: out of time"
            return
        try:
            repeats = 20 if num_bytes < 1 << 26 else 4
            us = self.graph_us(call, repeats) if graph else (call(), self.event_us(call, 3))[1]
            row |= {"us": round(us, 2), "tb_s": round(num_bytes / us / 1e6, 3)}
        except Exception as error:  # one variant that cannot run must not end the sweep
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(
            f"{op:22} {size:14} {variant:26} {row.get('us', '-'):>9} us {row.get('tb_s', ''):>6}", row.get("error", "")
        )


def qkv_problem(model: str, num_tokens: int, cache_dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of qk_norm_rope_write_kv for random inputs."""
    _, _, heads, kv_heads = MODELS[model]
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * 128, device="cuda").to(BF16)
    positions = torch.randint(0, 4096, (num_tokens,), device="cuda")
    angles = torch.outer(torch.arange(4096.0), 1e6 ** (-torch.arange(64) / 64))
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1))).to("cuda", BF16)
    num_blocks = num_tokens // 16 + 64
    cache = torch.zeros(2, num_blocks, 16, kv_heads, 128, device="cuda").to(cache_dtype)
    slots = torch.randperm(num_blocks * 16, device="cuda")[:num_tokens]
    q_weight, k_weight = (torch.rand(128, device="cuda").to(BF16) for _ in range(2))
    return qkv, positions, table, q_weight, k_weight, EPS, cache, slots, heads, kv_heads


def check() -> dict[str, Any]:
    """Largest differences from the twins, and how many of 256 tokens are the twin's."""
    result: dict[str, Any] = {}
    x, weight, residual = (torch.randn(n, 1024, device="cuda").to(BF16) for n in (300, 1, 300))
    twin = residual.clone()
    ours = fused_ops.rms_norm(x, weight[0], EPS, residual)
    result["rms_norm"] = (ours - fused_ops.rms_norm_torch(x, weight[0], EPS, twin)).abs().max().item()
    gate_up = torch.randn(300, 6144, device="cuda").to(BF16)
    difference = fused_ops.silu_and_mul(gate_up) - fused_ops.silu_and_mul_torch(gate_up)
    result["silu_and_mul"] = difference.abs().max().item()
    for cache_dtype in (BF16, FP8):
        args = qkv_problem("0.6B", 300, cache_dtype)
        twins = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        query = fused_ops.qk_norm_rope_write_kv(*args)
        expected = fused_ops.qk_norm_rope_write_kv_torch(*twins)
        cache = (args[6].float() - twins[6].float()).abs().max().item()
        result[f"qk_norm_rope_write_kv {cache_dtype}"] = ((query - expected).abs().max().item(), cache)
    for dtype in (torch.float32, BF16):
        logits = (2 * torch.randn(256, VOCAB, device="cuda")).to(dtype)
        for name, (temperature, k, p) in SAMPLING.items():
            args = sampling_args(256, temperature, k, p)
            same = fused_sampler.sample_tokens(logits, *args) == fused_sampler.sample_tokens_torch(logits, *args)
            result[f"sample {name} {dtype}"] = f"{int(same.sum())} of 256 equal"
    return result


SAMPLING = {
    "greedy": (0.0, None, None),
    "temperature": (0.6, None, None),
    "top-k 50": (0.6, 50, None),
    "top-p 0.9": (0.6, None, 0.9),
    "top-k 20, top-p 0.95": (0.6, 20, 0.95),
}


def sampling_args(batch: int, temperature: float, k: int | None, p: float | None) -> tuple[torch.Tensor | None, ...]:
    """Arguments of sample_tokens behind the logits."""
    return (
        torch.full((batch,), temperature, device="cuda"),
        None if k is None else torch.full((batch,), k, dtype=torch.int32, device="cuda"),
        None if p is None else torch.full((batch,), p, device="cuda"),
        torch.randint(0, 2**62, (batch,), device="cuda"),
        torch.randint(0, 4096, (batch,), device="cuda"),
    )


def sweep_norm(bench: Bench) -> None:
    """RMSNorm with residual; the plain one at 256 tokens."""
    for model, (hidden, *_) in MODELS.items():
        weight = torch.rand(hidden, device="cuda").to(BF16)
        for tokens in TOKENS:
            x, residual = (torch.randn(tokens, hidden, device="cuda").to(BF16) for _ in range(2))
            out, size = torch.empty_like(x), f"{model} T={tokens}"
            bytes_each = x.nbytes

            def run(_x: Any = x, _r: Any = residual, _o: Any = out, _w: Any = weight, **kw: Any) -> object:
                return triton_kernels.rms_norm(_x, _w, EPS, _r, _o, **kw)

            for pdl in (False, True):
                for warps in (None, 1, 2, 4, 8, 16):
                    if pdl and warps is not None:
                        continue
                    bench.add(
                        "add+rms_norm",
                        size,
                        f"warps={warps} pdl={pdl:d}",
                        4 * bytes_each,
                        lambda w=warps, d=pdl, run=run: run(num_warps=w, pdl=d),
                    )
            bench.add(
                "add+rms_norm",
                size,
                "torch",
                4 * bytes_each,
                lambda x=x, r=residual, o=out, w=weight: fused_ops.rms_norm_torch(x, w, EPS, r, o),
            )
            if tokens in (1, 256):
                plain = lambda x=x, o=out, w=weight: triton_kernels.rms_norm(x, w, EPS, None, o)  # noqa: E731
                bench.add("rms_norm", size, "default", 2 * bytes_each, plain)


def sweep_silu(bench: Bench) -> None:
    """SiLU and product."""
    for model, (_, inner, *_) in MODELS.items():
        for tokens in TOKENS:
            x = torch.randn(tokens, 2 * inner, device="cuda").to(BF16)
            size, num_bytes = f"{model} T={tokens}", 3 * tokens * inner * 2
            variants = [(1024, 4, False), (1024, 4, True), (256, 1, False), (512, 2, False), (1024, 2, False)]
            for block, warps, pdl in [*variants, (2048, 4, False), (2048, 8, False), (4096, 8, False)]:
                bench.add(
                    "silu_and_mul",
                    size,
                    f"{block}x{warps} pdl={pdl:d}",
                    num_bytes,
                    lambda x=x, b=block, w=warps, d=pdl: triton_kernels.silu_and_mul(x, block=b, num_warps=w, pdl=d),
                )
            bench.add("silu_and_mul", size, "torch", num_bytes, lambda x=x: fused_ops.silu_and_mul_torch(x))


def sweep_qkv(bench: Bench) -> None:
    """QK-norm, rotation and cache write."""
    for cache_dtype in (BF16, FP8):
        for model, (_, _, heads, kv_heads) in MODELS.items():
            for tokens in TOKENS:
                args = qkv_problem(model, tokens, cache_dtype)
                size = f"{model} T={tokens}" + (" fp8" if cache_dtype is FP8 else "")
                kv_bytes = 2 * kv_heads * 128 * (2 + args[6].element_size())
                num_bytes = tokens * (heads * 128 * 4 + kv_bytes)
                shapes = [(4, 1, False), (4, 1, True)]
                if cache_dtype is BF16:
                    shapes += [(w[0], w[1], False) for w in ((1, 1), (2, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 4))]
                for group, warps, pdl in shapes:
                    bench.add(
                        "qk_norm_rope_write_kv",
                        size,
                        f"heads={group} warps={warps} pdl={pdl:d}",
                        num_bytes,
                        lambda a=args, g=group, w=warps, d=pdl: triton_kernels.qk_norm_rope_write_kv(
                            *a, heads_per_program=g, num_warps=w, pdl=d
                        ),
                    )
                if cache_dtype is BF16:
                    twin = lambda a=args: fused_ops.qk_norm_rope_write_kv_torch(*a)  # noqa: E731
                    bench.add("qk_norm_rope_write_kv", size, "torch, eager", num_bytes, twin, graph=False)


RACE_VARIANTS: list[dict[str, Any]] = [
    {},
    {"pdl": True},
    {"block": 1024},
    {"block": 1024, "num_warps": 2},
    {"block": 2048, "num_warps": 8},
    {"block": 4096, "num_warps": 8},
    {"block": 512, "num_warps": 1},
    {"num_splits": 8},
    {"num_splits": 16},
]
ROW_VARIANTS: list[dict[str, Any]] = [
    {},
    {"pdl": True},
    {"row_block": 2048, "row_warps": 8},
    {"row_block": 4096, "row_warps": 8},
    {"row_block": 8192, "row_warps": 16},
    {"row_block": 4096, "row_warps": 32},
]


def sweep_sampler(bench: Bench, defaults: bool) -> None:
    """Sampling from whole vocabularies; `defaults`: the default variants alone, and the twins."""
    for dtype in (BF16, torch.float32):
        for batch in (256, 32, 1):
            logits = (2 * torch.randn(batch, VOCAB, device="cuda")).to(dtype)
            size = f"B={batch} {'bf16' if dtype is BF16 else 'f32'}"
            for name, setting in SAMPLING.items():
                args = sampling_args(batch, *setting)
                restricted = setting[1] is not None or setting[2] is not None
                variants = ROW_VARIANTS if restricted else RACE_VARIANTS
                for options in variants[:1] if defaults else variants[1:]:
                    bench.add(
                        f"sample {name}",
                        size,
                        " ".join(f"{key}={value}" for key, value in options.items()) or "default",
                        logits.nbytes,
                        lambda x=logits, a=args, o=options: triton_sampler.sample_tokens(x, *a, **o),
                    )
                if defaults and dtype is torch.float32:
                    twin = lambda x=logits, a=args: fused_sampler.sample_tokens_torch(x, *a)  # noqa: E731
                    bench.add(f"sample {name}", size, "torch, eager", logits.nbytes, twin, graph=False)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The best variant of each size beside the first one (the default) and torch's."""
    print(f"\n{'operation':22} {'size':14} {'default':>9} {'best':>9} {'TB/s':>6} {'torch':>9}  best variant")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["size"]), []).append(row)
    for (op, size), members in groups.items():
        ours = [row for row in members if "us" in row and not row["variant"].startswith("torch")]
        torchs = [row["us"] for row in members if "us" in row and row["variant"].startswith("torch")]
        if ours:
            best = min(ours, key=lambda row: row["us"])
            print(
                f"{op:22} {size:14} {members[0].get('us', '-'):>9} {best['us']:>9} {best['tb_s']:>6} "
                f"{torchs[0] if torchs else '-':>9}  {best['variant']}"
            )
    failed = [row for row in rows if "error" in row and "skipped" not in row["error"]]
    print(
        f"{len(rows)} variants, {sum('skipped' in row.get('error', '') for row in rows)} skipped, {len(failed)} failed"
    )
    for row in failed[:8]:
        print("FAILED", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=55.0, help="stop sweeping after this long")
    args = parser.parse_args()
    bench = Bench(args.seconds)
    torch.manual_seed(0)
    try:
        checks = check()
    except Exception as error:  # the timings are still worth having
        checks = {"error": f"{type(error).__name__}: {error}"[:1000]}
    print(torch.cuda.get_device_name(), torch.__version__, json.dumps(checks, indent=1))
    sweep_sampler(bench, defaults=True)
    for sweep in (sweep_qkv, sweep_norm, sweep_silu):
        sweep(bench)
    sweep_sampler(bench, defaults=False)
    print_table(bench.rows)
    if os.environ.get("OUT"):
        result = {"gpu": torch.cuda.get_device_name(), "checks": checks, "rows": bench.rows}
        Path(os.environ["OUT"], "fused_kernels.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
