"""GPTQ on the CPU: one stream of the built-in model quantized and not, in one run; and products of its layers' shapes.

    python tests/benchmark/gptq_cpu.py [--bits 4] [--group-size 64] [--act-order] [--pairs 5] [--json FILE]
    python tests/benchmark/gptq_cpu.py --products [--dtype bfloat16]

The first makes a checkpoint of SmolLM2-135M-Instruct, rounded to nearest (speed does not depend on how well weights
were chosen), and runs it and the plain model in turns (A B A B ...): 128 random tokens in, 128 out, greedy. Medians,
and the ratio pair by pair. The second times, for all layers of the model in turn so that no weight stays in a cache,
torch's int4 kernel, blocks of plain weights, and the plain product: KERNEL_MAX_ROWS of gptq_cpu.py is read off there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from folovllm import LLM, SamplingParams
from folovllm.model_executor.layers.quantization import gptq_cpu, packing
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.utils import cpu_kernels

MODEL = "smollm2-135m-instruct"
INPUT_LEN, OUTPUT_LEN = 128, 128
NUM_LAYERS = 30
SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
ROWS = (1, 4, 16, 24, 32, 48, 64, 128, 512)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int, act_order: bool) -> dict[str, torch.Tensor]:
    """Return a symmetric GPTQ checkpoint's tensors for a weight [N, K]."""
    num_outputs, num_inputs = weight.shape
    size = num_inputs if group_size == -1 else group_size
    g_idx = torch.arange(num_inputs, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(0))]
    order = torch.argsort(g_idx, stable=True)
    middle = 2 ** (bits - 1)
    grouped = weight.float()[:, order].view(num_outputs, -1, size)
    scales = (grouped.abs().amax(-1) / (middle - 0.5)).clamp_min(1e-6).half()  # [N, G]
    values = (grouped / scales[..., None]).round() + middle
    inverse = torch.argsort(order)
    rows = values.clamp_(0, 2 * middle - 1).view(num_outputs, num_inputs)[:, inverse].t().to(torch.uint8)
    zeros = torch.full(scales.t().shape, middle - 1)
    return {
        "qweight": packing.pack_rows(rows, bits),
        "qzeros": packing.pack_columns(zeros, bits),
        "scales": scales.t().contiguous(),
        "g_idx": g_idx,
    }


def save_quantized(folder: Path, bits: int, group_size: int, act_order: bool) -> None:
    """Write the built-in model, quantized, to `folder`."""
    source = resolve_model_source(MODEL)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.weights(torch.bfloat16):
        module, _, last = name.rpartition(".")
        if last == "weight" and module.endswith("_proj"):
            packed = round_to_nearest(tensor, bits, group_size, act_order)
            tensors |= {f"{module}.{key}": value for key, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True}
    config = source.hf_config() | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def run(llm: LLM, prompt: list[int]) -> dict[str, float]:
    """Generate from `prompt`; return what it took."""
    engine = llm.llm_engine
    engine.reset_prefix_cache()
    start, first = time.perf_counter(), 0.0
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False)
    engine.add_request("bench", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        if engine.step():
            first = first or time.perf_counter()
    end = time.perf_counter()
    return {"ttft_ms": (first - start) * 1e3, "decode_tok_s": (OUTPUT_LEN - 1) / (end - first)}


def compare_streams(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians of both, and the median ratio."""
    options: dict[str, Any] = {"dtype": args.dtype, "max_num_seqs": 1, "max_model_len": 2048}
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(Path(folder), args.bits, args.group_size, args.act_order)
        quantized = LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False, **options)
    plain = LLM(MODEL, use_tqdm_on_load=False, **options)
    generator = torch.Generator().manual_seed(0)
    results: dict[str, list[dict[str, float]]] = {"plain": [], "quantized": []}
    for pair in range(args.pairs + 1):
        prompt = torch.randint(100, 40000, (INPUT_LEN,), generator=generator).tolist()
        for name, llm in (("plain", plain), ("quantized", quantized)):
            figures = run(llm, prompt)
            if pair:  # the first warms up
                results[name].append(figures)
    summary: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size, "act_order": args.act_order}
    summary |= {"dtype": args.dtype, "threads": torch.get_num_threads(), "pairs": args.pairs}
    for key in ("decode_tok_s", "ttft_ms"):
        for name, runs in results.items():
            summary[f"{name}_{key}"] = statistics.median(r[key] for r in runs)
        pairs = zip(results["quantized"], results["plain"], strict=True)
        summary[f"ratio_{key}"] = statistics.median(a[key] / b[key] for a, b in pairs)
    return summary


def median_ms(function: Callable[[], None], repeats: int) -> float:
    """Return the median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def compare_products(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return ms for one pass over all layers' products: kernel, blocks, plain."""
    dtype = getattr(torch, args.dtype)
    cpu_kernels.available()
    weights: list[tuple[gptq_cpu.Int4KernelWeight, torch.Tensor]] = []
    for _ in range(NUM_LAYERS):
        for num_outputs, num_inputs in SHAPES.values():
            size = num_inputs if args.group_size == -1 else args.group_size
            values = torch.randint(0, 2**args.bits, (num_inputs, num_outputs), dtype=torch.uint8)
            scales = torch.rand(num_inputs // size, num_outputs).to(dtype)
            zeros = torch.full(scales.shape, 2 ** (args.bits - 1), dtype=torch.int16)
            packed = gptq_cpu.Int4KernelWeight(values, scales, zeros, args.bits)
            weights.append((packed, torch.randn(num_outputs, num_inputs, dtype=dtype)))
    ours = cpu_kernels.multiplies(weights[0][1])
    result: dict[str, Any] = {}
    print(f"{'rows':>6} {'kernel':>9} {'blocks':>9} {'plain':>9}   ms for {len(weights)} products")
    for rows in ROWS:
        inputs = {k: torch.randn(rows, k, dtype=dtype) for k in {shape[1] for shape in SHAPES.values()}}

        def packed_product(max_rows: int, inputs: dict[int, torch.Tensor] = inputs) -> None:
            for packed, _ in weights:
                packed.max_kernel_rows = max_rows
                packed.multiply(inputs[packed.num_inputs])

        def plain_product(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for _, weight in weights:
                (cpu_kernels.linear if ours else F.linear)(inputs[weight.shape[1]], weight)

        repeats = args.pairs if rows < 64 else 2
        kernel = median_ms(lambda: packed_product(1 << 30), repeats) if rows <= 128 else float("nan")
        times = (kernel, median_ms(lambda: packed_product(-1), repeats), median_ms(plain_product, repeats))
        result[str(rows)] = times
        print(f"{rows:>6} {times[0]:>9.2f} {times[1]:>9.2f} {times[2]:>9.2f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        result = compare_products(args) if args.products else compare_streams(args)
    if not args.products:
        for key, value in result.items():
            print(f"{key:28} {round(value, 2) if isinstance(value, float) else value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
