"""What quantization costs: perplexity of SmolLM2 in bfloat16, rounded to nearest, with GPTQ, and with act-order.

    python tests/benchmark/gptq_quality.py [--model NAME] [--text FILE] [--group-size 64] [--num-samples 128]
        [--seq-len 512] [--calibration FILE] [--max-tokens N] [--symmetry both|sym|asym] [--json FILE]

Calibration text: a file, or (default) what the model itself writes, with a fixed seed, once for all variants. The
text that is measured is tests/data/persuasion.txt, in windows of 1024 tokens with stride 512; the engine runs the
checkpoints just written. SmolLM2's weights here come from a file of 4-bit blocks (GGUF Q4_1, groups of 32), whose
"bfloat16" model therefore is a 4-bit model itself: that flatters whatever rounds to 4 bits again, rounding to nearest
most of all. Prints a Markdown table last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.quantize import pipeline
from folovllm.quantize.perplexity import measure_perplexity
from folovllm.quantize.spec import QuantizationSpec

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
TEXT = ROOT / "tests" / "data" / "persuasion.txt"
WINDOW, STRIDE = 1024, 512


def measure(model: str, text: str, max_tokens: int | None) -> dict[str, Any]:
    """Return perplexity, scored tokens and seconds of `model`."""
    engine = LLMEngine.from_engine_args(EngineArgs(model=model, use_tqdm_on_load=False))
    try:
        token_ids = engine.get_tokenizer().encode(text)[:max_tokens]
        result = measure_perplexity(engine, token_ids, WINDOW, STRIDE, use_tqdm=False)
    finally:
        engine.shutdown()
    return {"perplexity": result.perplexity, "scored": result.num_scored_tokens, "eval_s": result.seconds}


def variants(group_size: int, symmetry: str) -> dict[str, QuantizationSpec]:
    """Return what to compare, by name."""
    found = {}
    for sym in (True, False):
        name = "sym" if sym else "asym"
        if symmetry not in ("both", name):
            continue
        found[f"RTN, {name}"] = QuantizationSpec(4, group_size, sym, method="rtn")
        found[f"GPTQ, {name}"] = QuantizationSpec(4, group_size, sym)
        found[f"GPTQ, {name}, act-order"] = QuantizationSpec(4, group_size, sym, desc_act=True)
    return found


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return variant -> what was measured; "bfloat16" first."""
    text = args.text.read_text(encoding="utf-8")
    engine_args = EngineArgs(model=args.model)
    calibration = pipeline.Calibration(args.calibration, args.num_samples, args.seq_len)
    started = time.perf_counter()
    samples = pipeline._samples(engine_args, engine_args.resolve_model_source(), calibration, False)
    calibration_s = time.perf_counter() - started
    print(
        f"{samples.numel()} calibration tokens in {calibration_s:.1f} s, {torch.get_num_threads()} threads", flush=True
    )
    rows = {"bfloat16": measure(args.model, text, args.max_tokens)}
    print("bfloat16", rows["bfloat16"], flush=True)
    original = pipeline._samples
    pipeline._samples = lambda *_: samples  # every variant sees the same text
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, spec in variants(args.group_size, args.symmetry).items():
                output = Path(folder) / name.replace(", ", "-")
                report = pipeline.quantize_model(engine_args, output, spec, calibration, use_tqdm=False)
                rows[name] = measure(str(output), text, args.max_tokens)
                rows[name]["quantize_s"] = report.phase_seconds["quantization"]
                rows[name]["mean_error"] = sum(report.errors.values()) / len(report.errors)
                print(name, rows[name], flush=True)
    finally:
        pipeline._samples = original
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--symmetry", choices=("both", "sym", "asym"), default="both")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = compare(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    base = rows["bfloat16"]["perplexity"]
    print("\n| Weights | Perplexity | of bfloat16 | Mean relative error | Quantizing |\n|---|---|---|---|---|")
    for name, row in rows.items():
        quantizing = f"{row['quantize_s']:.0f} s" if "quantize_s" in row else ""
        error = f"{row['mean_error']:.2e}" if "mean_error" in row else ""
        print(f"| {name} | {row['perplexity']:.2f} | {row['perplexity'] / base:.3f} | {error} | {quantizing} |")
    print(
        f"\n{rows['bfloat16']['scored']} scored tokens, window {WINDOW}, stride {STRIDE}. RTN's error is its weights'."
    )


if __name__ == "__main__":
    main()
