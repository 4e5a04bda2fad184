"""Our Triton attention kernels on one GPU: checked, then timed in CUDA graphs over a sweep of tiles and splits.

    OUT=folder python tests/benchmark/attention_kernels.py [--seconds 120] [--rows decode] [--smoke]

Shapes: 16 query heads, 8 KV heads, head size 128, bfloat16, pages of 16 tokens. Contexts lie in shuffled pages; rows
whose keys and values fit the L2 cache rotate through several sets of them, as the layers of a model do. Prints, per
row, the best tile, the default one and reference numbers: the libraries', and our own from when a second kernel
combined the splits. Writes everything to $OUT/attention_kernels.json.
Variants are compiled beforehand by a pool of processes that share Triton's cache. `--rows`: only rows whose names
contain one of these words, separated by commas; "workload": also the contexts of gpu_workloads' A as it goes on.
"+-30%": contexts drawn evenly from that range. `--smoke`: tiny shapes, any device (without CUDA through Triton's
interpreter), no meaningful times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from folovllm.attention.backends.flash_attn import PROVIDERS, VarlenBatch
from folovllm.attention.triton_decode import DecodeConfig, choose_decode_config, paged_decode
from folovllm.attention.triton_prefill import PrefillConfig, build_tiles, choose_prefill_config, paged_prefill
from tests.benchmark.gpu_workloads import draw_lengths
from tests.triton_interpreter import index_scalars

H, HKV, D, PAGE = 16, 8, 128, 16
KV_BYTES = 2 * HKV * D * 2  # of a token, bfloat16
L2_BYTES = 50 << 20
REFERENCE_US = {
    "decode 256 x 800": {"ours before": 280.5, "plain Triton": 286, "FlashInfer": 291, "FA3": 307, "FA4": 358},
    "decode 1 x 2048": {
        "ours before": 10.4,
        "with pdl": 9.3,
        "plain Triton": 9.1,
        "FlashInfer": 10.6,
        "FA3": 12.6,
        "FA4": 31,
    },
    "decode 1 x 2048 in L2": {"ours before": 8.5, "plain Triton": 9.1, "FlashInfer": 10.6, "FA3": 12.6, "FA4": 31},
    "decode 32 x 512": {"ours before": 26.8, "plain Triton": 28.5, "FlashInfer": 31.5, "FA3": 31.3, "FA4": 34},
    "decode 256 x 192": {"ours before": 72.9, "plain Triton": 74.9, "FlashInfer": 74.8, "FA3": 98, "FA4": 174},
    "decode 256 x 100..1500": {"ours before": 270.1, "its best tile": 262.9, "target": 310},
    "prefill 16 x 1024": {"FA3": 184, "FlashInfer": 189, "FA4": 194, "60% of FA3": 307},
    "prefill 1 x 2048": {"FA3": 39, "FA4": 39, "FlashInfer": 57, "60% of FA3": 65},
}
COPY_TBPS = 3.02  # an H100's, see gemv_kernels.py
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float16


@dataclass
class Row:
    """A row of the table: contexts, and several sets of pages that hold them."""

    name: str
    seq_lens: list[int]
    caches: list[torch.Tensor]
    table: torch.Tensor
    query: torch.Tensor
    out: torch.Tensor
    seq_lens_tensor: torch.Tensor

    @property
    def work(self) -> float:
        """Bytes of keys and values of a decode, or floating point operations of a prefill."""
        if self.name.startswith("decode"):
            return float(sum(self.seq_lens) * KV_BYTES)
        return float(sum(n * (n + 1) // 2 for n in self.seq_lens) * 4 * H * D)


def make_row(name: str, seq_lens: list[int], sets: int, cache_dtype: torch.dtype | None = None) -> Row:
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-n // PAGE) for n in seq_lens]
    width = -(-max(blocks) // 16) * 16
    table = torch.zeros((len(seq_lens), width), dtype=torch.int32)
    order = (torch.randperm(sum(blocks), generator=generator) + 1).int()
    for b, part in enumerate(order.split(blocks)):
        table[b, : blocks[b]] = part
    shape = (2, sum(blocks) + 1, PAGE, HKV, D)
    caches = [torch.randn(shape, device=device, dtype=dtype).to(cache_dtype or dtype) for _ in range(sets)]
    rows = len(seq_lens) if name.startswith("decode") else sum(seq_lens)
    query = torch.randn((rows, H, D), device=device, dtype=dtype)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return Row(name, seq_lens, caches, table.to(device), query, torch.empty_like(query), lens)


def draw(low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def around(tokens: int, count: int) -> list[int]:
    return draw(tokens * 7 // 10, tokens * 13 // 10, count)


def contexts_of_workload_a(num_steps: int) -> list[int]:
    """The contexts of gpu_workloads' A that still decode after so many steps."""
    input_lens, output_lens = draw_lengths(256, 100, 1024)
    return [n + num_steps for n, m in zip(input_lens, output_lens, strict=True) if m > num_steps]


def make_rows(smoke: bool, words: list[str]) -> list[Row]:
    rows: dict[str, tuple[list[int], int]] = {
        "decode 256 x 800": ([800] * 256, 1),
        "decode 256 x 100..1500": (draw(100, 1500, 256), 1),
        "decode 256 x 192": ([192] * 256, 2),
        "decode 112 x 1150 +-30%": (around(1150, 112), 1),
        "decode 48 x 1300 +-30%": (around(1300, 48), 1),
        "decode 16 x 1500 +-30%": (around(1500, 16), 2),
        "decode 8 x 2048 +-30%": (around(2048, 8), 4),
        "decode 32 x 512": ([512] * 32, 4),
        "decode 32 x 192 +-30%": (around(192, 32), 6),
        "decode 1 x 2048": ([2048], 24),
        "decode 1 x 2048 in L2": ([2048], 1),
        "prefill 16 x 1024": ([1024] * 16, 2),
        "prefill 1 x 2048": ([2048], 8),
    }
    if any("workload" in word for word in words):  # not without being asked for: ten more rows take minutes
        rows |= {f"decode workload A, step {n}": (contexts_of_workload_a(n), 1) for n in (5, *range(100, 1000, 100))}
    if smoke:
        rows = {"decode 32 x 512": ([290, 20], 2), "prefill 1 x 2048": ([33], 1)}
    return [make_row(name, *row) for name, row in rows.items() if any(word in name for word in words)]


def time_us(calls: list[Callable[[], None]]) -> float:
    """Median microseconds of a call, launched from a CUDA graph that holds each of `calls` several times."""
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e6
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    calls[0]()
    torch.cuda.synchronize()
    start_event.record()
    calls[0]()
    end_event.record()
    torch.cuda.synchronize()
    count = max(len(calls), min(48, int(4000 / max(1.0, start_event.elapsed_time(end_event) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    for _ in range(4):
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        times.append(start_event.elapsed_time(end_event) * 1e3 / count)
    return statistics.median(times[1:])


def decode_calls(row: Row, config: DecodeConfig, order: torch.Tensor | None = None) -> list[Callable[[], None]]:
    """Return a call for each set of pages; `order` [B] int32: the requests in the order in which to start on them."""

    def call(cache: torch.Tensor) -> None:
        lens, scale = row.seq_lens_tensor, D**-0.5
        paged_decode(row.query, cache, row.table, lens, row.out, scale, config, rows=order, reqs=order)

    return [lambda cache=cache: call(cache) for cache in row.caches]  # type: ignore[misc]


def prefill_calls(row: Row, config: PrefillConfig) -> list[Callable[[], None]]:
    starts = [0, *itertools.accumulate(row.seq_lens)]
    tiles = build_tiles(starts, row.seq_lens, range(len(row.seq_lens)), config.tile_tokens(H // HKV))
    on_device = torch.from_numpy(tiles).to(device)

    def call(cache: torch.Tensor) -> None:
        paged_prefill(row.query, cache, row.table, on_device, row.out, D**-0.5, config)

    return [lambda cache=cache: call(cache) for cache in row.caches]  # type: ignore[misc]


def calls_of(row: Row, config: Any) -> list[Callable[[], None]]:
    return decode_calls(row, config) if isinstance(config, DecodeConfig) else prefill_calls(row, config)


def expected(row: Row, b: int) -> torch.Tensor:
    """Attention of request b over the first set, in float32 by its definition."""
    n = row.seq_lens[b]
    pages = row.caches[0][:, row.table[b, : -(-n // PAGE)].long()].flatten(1, 2)[:, :n].float()
    keys, values = pages.repeat_interleave(H // HKV, dim=2)
    decode = row.name.startswith("decode")
    start = b if decode else sum(row.seq_lens[:b])
    query = row.query[start : start + (1 if decode else n)].float()
    scores = torch.einsum("qhd,shd->hqs", query, keys) * D**-0.5
    if not decode:
        scores = scores.masked_fill(torch.ones(n, n, device=device, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), values)


def error_of(row: Row, calls: list[Callable[[], None]], reference: dict[int, torch.Tensor]) -> float:
    """Largest difference of the first call's output from the definition, over the requests in `reference`."""
    row.out.fill_(float("nan"))
    calls[0]()
    worst = 0.0
    for b, want in reference.items():
        start = b if row.name.startswith("decode") else sum(row.seq_lens[:b])
        difference = (row.out[start : start + want.shape[0]].float() - want).abs().max()
        worst = max(worst, float(difference.nan_to_num(nan=1e9)))
    return 1e9 if bool(row.out.isnan().any()) else worst


def default_config(row: Row) -> DecodeConfig | PrefillConfig:
    if row.name.startswith("decode"):
        return choose_decode_config(len(row.seq_lens), HKV, max(row.seq_lens))
    return choose_prefill_config(H // HKV)


def decode_tiles() -> list[DecodeConfig]:
    shapes = [(64, 2), (32, 2), (64, 4), (128, 4), (32, 1)]
    pipelines = [(3, False), (3, True), (4, True)]
    return [DecodeConfig(n, w, s, table_ahead=a) for (s, a), (n, w) in itertools.product(pipelines, shapes)]


def cuts(row: Row) -> list[tuple[int, int]]:
    """(num_splits, split_tokens) to try: whole, then least tokens of a split and programs of a launch."""
    whole = len(row.seq_lens) * HKV
    pairs = [(tokens, 2048) for tokens in (256, 128, 512, 64)]
    pairs += [(256, 4096), (256, 1024), (256, 8192), (1024, 4096)]
    found = {(min(32, -(-programs // whole)), tokens): None for tokens, programs in pairs}
    return [(1, 256), *(cut for cut in found if cut[0] > 1 and cut[1] < max(row.seq_lens))]


def prefill_tiles() -> list[PrefillConfig]:
    shapes = [(m, n, w) for m, w in ((64, 4), (128, 8)) for n in (32, 64, 128)] + [(128, 64, 4)]
    pipelines = [(1, True), (2, True), (3, True), (4, True), (2, False), (3, False)]
    return [PrefillConfig(m, n, w, s, a) for (m, n, w), (s, a) in itertools.product(shapes, pipelines)]


def variants(row: Row, smoke: bool) -> list[Any]:
    if row.name.startswith("prefill"):
        return prefill_tiles()[:2] if smoke else prefill_tiles()
    tiles = decode_tiles()[:2] if smoke else decode_tiles()
    return [replace(tile, num_splits=n, split_tokens=m) for tile in tiles for n, m in cuts(row)]


def warm(config: Any) -> str:
    """Compile one variant in a process of the pool; the main process finds it in Triton's cache."""
    try:
        name = "decode w" if isinstance(config, DecodeConfig) else "prefill w"
        calls_of(make_row(name, [20, 40], 1), config)[0]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return ""
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:200]}"


def warm_all(rows: list[Row]) -> list[str]:
    configs: list[Any] = []
    if any(row.name.startswith("decode") for row in rows):
        configs += [replace(t, num_splits=s) for t in decode_tiles() for s in (1, 2)]
    if any(row.name.startswith("prefill") for row in rows):
        configs += prefill_tiles()
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return [problem for problem in pool.imap_unordered(warm, configs, chunksize=4) if problem]


def sweep(row: Row, deadline: float, smoke: bool) -> dict[str, Any]:
    longest = sorted(range(len(row.seq_lens)), key=row.seq_lens.__getitem__)
    reference = {b: expected(row, b) for b in {longest[0], longest[-1], 0}}
    results: list[dict[str, Any]] = []
    default = default_config(row)
    for config in [default, *variants(row, smoke)]:
        if time.monotonic() > deadline:
            results.append({"config": asdict(config), "problem": "no time left"})
            continue
        try:
            calls = calls_of(row, config)
            error = error_of(row, calls, reference)
            result = {"config": asdict(config), "error": error}
            result |= {"us": time_us(calls)} if error < 5e-2 else {"problem": f"wrong by {error}"}
        except Exception as problem:
            result = {"config": asdict(config), "problem": f"{type(problem).__name__}: {str(problem)[:160]}"}
        results.append(result)
    timed = sorted((r for r in results if "us" in r), key=lambda r: r["us"])
    return {"default": results[0], "best": timed[:5], "all": results, "reference_us": REFERENCE_US.get(row.name, {})}


def extras(row: Row, best: dict[str, Any]) -> dict[str, Any]:
    """The default tile in another order, with programmatic launch, deterministic, over fp8; libraries for a prefill."""
    found: dict[str, Any] = {}

    def measure(name: str, make: Callable[[], list[Callable[[], None]]]) -> None:
        try:
            found[name] = time_us(make())
        except Exception as problem:
            found[name] = f"{type(problem).__name__}: {str(problem)[:160]}"

    if row.name.startswith("decode"):
        default = default_config(row)
        assert isinstance(default, DecodeConfig)
        fixed = choose_decode_config(len(row.seq_lens), HKV, 2048, deterministic=True)
        longest_first = row.seq_lens_tensor.argsort(descending=True).int()
        measure("longest first", lambda: decode_calls(row, default, longest_first))
        measure("pdl", lambda: decode_calls(row, replace(default, pdl=True)))
        measure("pdl, best", lambda: decode_calls(row, DecodeConfig(**best | {"pdl": True})))
        measure("deterministic", lambda: decode_calls(row, fixed))
        measure("fp8 (rate as if bfloat16)", lambda: decode_calls(
            make_row(row.name, row.seq_lens, 2 * len(row.caches), torch.float8_e4m3fn), default))  # fmt: skip
        return found
    starts = torch.tensor([0, *itertools.accumulate(row.seq_lens)], dtype=torch.int32, device=device)
    longest = max(row.seq_lens)
    batch = VarlenBatch(None, starts, starts, row.seq_lens_tensor, row.table, longest, longest)
    for provider in PROVIDERS:
        reasons = provider.unsupported_reasons(device, dtype, D, PAGE)
        if reasons:
            found[provider.name] = "; ".join(reasons)[:160]
            continue

        def calls(provider: Any = provider) -> list[Callable[[], None]]:
            return [lambda c=c: provider.call(row.query, c, batch, D**-0.5) for c in row.caches]  # type: ignore[misc]

        measure(provider.name, calls)
    return found


def describe(config: dict[str, Any]) -> str:
    short = {"block_m": "M", "block_n": "N", "num_warps": "w", "num_stages": "s", "num_splits": "splits"}
    if config.get("num_splits", 1) > 1:
        short["split_tokens"] = "of"
    parts = [f"{short[k]}{v}" for k, v in config.items() if k in short]
    return " ".join(parts) + (" ahead" if config["table_ahead"] else "")


def report(row: Row, result: dict[str, Any]) -> None:
    label = "TB/s" if row.name.startswith("decode") else "TFLOP/s"

    def rate(us: float) -> str:
        return f"{us:8.1f} us {row.work / us / 1e6:7.2f} {label}"

    bound = f"   {row.work / COPY_TBPS / 1e6:.1f} us at a copy's speed" if label == "TB/s" else ""
    print(f"\n{row.name}{bound}   reference us: {result['reference_us']}")
    default = result["default"]
    print(
        f"  default {describe(default['config']):32} {rate(default['us']) if 'us' in default else default['problem']}"
    )
    for found in result["best"][:3]:
        print(f"  best    {describe(found['config']):32} {rate(found['us'])}")
    for name, us in result.get("extras", {}).items():
        print(f"  {name:40} {rate(us) if isinstance(us, float) else us}")
    problems = [r for r in result["all"] if "problem" in r]
    if problems:
        print(
            f"  {len(problems)} variants failed, the first: {describe(problems[0]['config'])} {problems[0]['problem']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="stop starting new variants after this")
    parser.add_argument("--rows", default="decode,prefill", help="words, separated by commas")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    results: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type != "cuda":
        index_scalars()
    else:
        results["device"] = torch.cuda.get_device_name()
    rows = make_rows(args.smoke, args.rows.split(","))
    if not args.smoke:
        results["compile_problems"] = warm_all(rows)
        results["compile_s"] = round(time.monotonic() - start, 1)
        print(f"compiled in {results['compile_s']} s; problems: {results['compile_problems'][:3]}", flush=True)
    for i, row in enumerate(rows):  # each row gets its share of what is left
        now = time.monotonic()
        deadline = now + (start + args.seconds - now) / (len(rows) - i)
        result = sweep(row, deadline, args.smoke)
        result["extras"] = extras(row, (result["best"] or [result["default"]])[0]["config"])
        results[row.name] = result
        row.caches.clear()
    for row in rows:
        report(row, results[row.name])
    print(f"\n{time.monotonic() - start:.0f} s")
    folder = Path(os.environ.get("OUT", "."))
    (folder / "attention_kernels.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
