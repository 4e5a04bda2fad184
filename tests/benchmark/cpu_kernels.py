"""Each CPU kernel beside the torch operators that it replaces, on SmolLM2-135M's shapes.

Weights and caches of 30 layers are used in turn, so that they come from memory as in a model, not from a cache:

    python -m tests.benchmark.cpu_kernels [--threads 2] [--rows 1 16 64 256]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from folovllm.model_executor.layers import fused_ops
from folovllm.model_executor.layers.linear import cpu_can_pack, linear_packed, pack_linear_weight
from folovllm.utils import cpu_kernels

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 576, 1536, 9, 3, 64, 16
DTYPE = torch.bfloat16


def microseconds(call: Callable[[int], object], repeats: int = 7) -> float:
    """Return the median time of call(layer) over rounds of all layers."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for layer in range(LAYERS):
            call(layer)
        times.append((time.perf_counter() - start) / LAYERS)
    return statistics.median(times) * 1e6


def report(name: str, ours: float, theirs: dict[str, float], num_bytes: int) -> None:
    """Print a line of the table."""
    others = ", ".join(f"{what} {value:.0f}" for what, value in theirs.items())
    print(f"{name:34s} {ours:9.1f} us {num_bytes / ours / 1e3:6.1f} GB/s   {others}", flush=True)


def linears(rows: int) -> None:
    """The four products of a layer; the third with its activation."""
    x_of = {k: torch.randn(rows, k).to(DTYPE) for k in (HIDDEN, INNER)}
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    for name, k, n in (
        ("qkv", HIDDEN, qkv),
        ("o", HIDDEN, HIDDEN),
        ("gate_up", HIDDEN, 2 * INNER),
        ("down", INNER, HIDDEN),
    ):
        weights = [(torch.randn(n, k) * 0.02).to(DTYPE) for _ in range(LAYERS)]
        x = x_of[k]
        theirs = {"F.linear": microseconds(lambda i, w=weights, x=x: F.linear(x, w[i]))}  # type: ignore[misc]
        if cpu_can_pack(weights[0]):
            packed = [pack_linear_weight(w) for w in weights]
            theirs["packed"] = microseconds(lambda i, w=packed, x=x: linear_packed(x, w[i], None))  # type: ignore[misc]
        ours = microseconds(lambda i, w=weights, x=x: cpu_kernels.linear(x, w[i]))  # type: ignore[misc]
        report(f"linear {name} [{rows}, {k}] -> {n}", ours, theirs, 2 * n * k)
        if name == "gate_up":
            gate_up = F.linear(x, weights[0])
            activation = microseconds(lambda _, y=gate_up: fused_ops.silu_and_mul_torch(y))  # type: ignore[misc]
            theirs = {"linear, then torch's": ours + activation}
            ours = microseconds(lambda i, w=weights, x=x: cpu_kernels.linear_silu_and_mul(x, w[i]))  # type: ignore[misc]
            report("  with silu_and_mul", ours, theirs, 2 * n * k)


def elementwise(rows: int) -> None:
    """Norm, activation, rotation with the write into the cache."""
    x, residual, weight = (
        torch.randn(rows, HIDDEN).to(DTYPE),
        torch.randn(rows, HIDDEN).to(DTYPE),
        torch.ones(HIDDEN).to(DTYPE),
    )
    gate_up = torch.randn(rows, 2 * INNER).to(DTYPE)
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE).to(DTYPE)
    table, positions = torch.randn(2, 4096, HEAD_SIZE).to(DTYPE), torch.arange(rows)
    cache = torch.zeros(2, rows // BLOCK_SIZE + 1, BLOCK_SIZE, KV_HEADS, HEAD_SIZE, dtype=DTYPE)
    arguments = (qkv, positions, table, None, None, 0.0, cache, positions, HEADS, KV_HEADS)
    report(
        f"rms_norm + residual [{rows}]",
        microseconds(lambda _: cpu_kernels.rms_norm(x, weight, 1e-5, residual)),
        {"torch": microseconds(lambda _: fused_ops.rms_norm_torch(x, weight, 1e-5, residual))},
        8 * x.numel(),
    )
    report(
        f"silu_and_mul [{rows}]",
        microseconds(lambda _: cpu_kernels.silu_and_mul(gate_up)),
        {"torch": microseconds(lambda _: fused_ops.silu_and_mul_torch(gate_up))},
        3 * gate_up.numel(),
    )
    report(
        f"rope, KV write [{rows}]",
        microseconds(lambda _: cpu_kernels.qk_norm_rope_write_kv(*arguments)),
        {"torch": microseconds(lambda _: fused_ops.qk_norm_rope_write_kv_torch(*arguments))},
        4 * qkv.numel(),
    )


def decode(num_reqs: int, context: int) -> None:
    """Attention from the pages; torch is given what the kernel does without: keys and values gathered beforehand."""
    blocks = -(-context // BLOCK_SIZE)
    shape = (2, num_reqs * blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
    caches = [torch.randn(shape).to(DTYPE) for _ in range(LAYERS)]
    table = torch.randperm(num_reqs * blocks).int().view(num_reqs, blocks)
    seq_lens = torch.full((num_reqs,), context, dtype=torch.int32)
    query = torch.randn(num_reqs, HEADS, HEAD_SIZE).to(DTYPE)
    out = torch.empty_like(query)

    def by_torch(layer: int) -> None:
        keys, values = (
            pages.index_select(0, table.view(-1)).view(num_reqs, -1, KV_HEADS, HEAD_SIZE)[:, :context].transpose(1, 2)
            for pages in caches[layer]
        )
        packed = query.view(num_reqs, KV_HEADS, -1, HEAD_SIZE)
        F.scaled_dot_product_attention(packed, keys, values)

    ours = microseconds(lambda i: cpu_kernels.paged_decode(query, caches[i], table, seq_lens, out, HEAD_SIZE**-0.5))
    num_bytes = 4 * num_reqs * context * KV_HEADS * HEAD_SIZE
    report(f"paged_decode {num_reqs} x {context}", ours, {"gather + SDPA": microseconds(by_torch)}, num_bytes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    usable, reason = cpu_kernels.available()
    print(f"{options.threads} threads; kernels: {reason}; features {cpu_kernels.features()}")
    if not usable:
        return
    with torch.inference_mode():
        for rows in options.rows:
            linears(rows)
            elementwise(rows)
        for num_reqs, context in ((1, 128), (1, 1024), (1, 4096), (16, 160), (16, 173), (32, 300)):
            decode(num_reqs, context)


if __name__ == "__main__":
    main()
