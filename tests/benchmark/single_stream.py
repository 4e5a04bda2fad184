"""One request on the CPU, 128 tokens in, 128 out: FoloVLLM beside transformers' generate, in one run and one dtype.

    python tests/benchmark/single_stream.py [--pairs 5] [--dtype bfloat16] [--json FILE]

The two alternate (A B A B ...), because machines drift; medians and the ratio pair by pair are printed. Decode speed
counts output tokens after the first over the time after the first; prompts are random token ids, greedy, end-of-
sequence ignored. Both use the same weights (SmolLM2-135M-Instruct, dequantized) and all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from folovllm import LLM, SamplingParams
from folovllm.model_executor.model_loader.named import fetch_named_model

MODEL = "smollm2-135m-instruct"
INPUT_LEN, OUTPUT_LEN = 128, 128


class FirstTokenTimer(BaseStreamer):
    """Notes when transformers' generate hands over its first new token (the first call brings the prompt)."""

    def __init__(self) -> None:
        self.calls = 0
        self.first_token_time = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first_token_time = time.perf_counter()

    def end(self) -> None:
        pass


def run_ours(llm: LLM, prompt: list[int]) -> dict[str, Any]:
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False)
    engine.reset_prefix_cache()
    start = time.perf_counter()
    engine.add_request("bench", {"prompt_token_ids": prompt}, params)
    first = 0.0
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.perf_counter()
            tokens = list(output.outputs[0].token_ids)
    return figures(start, first, time.perf_counter(), tokens)


@torch.inference_mode()
def run_transformers(model: torch.nn.Module, prompt: list[int]) -> dict[str, Any]:
    timer = FirstTokenTimer()
    start = time.perf_counter()
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=OUTPUT_LEN,
        min_new_tokens=OUTPUT_LEN,
        do_sample=False,
        pad_token_id=2,
        streamer=timer,
    )
    return figures(start, timer.first_token_time, time.perf_counter(), out[0, len(prompt) :].tolist())


def figures(start: float, first: float, end: float, tokens: list[int]) -> dict[str, Any]:
    assert len(tokens) == OUTPUT_LEN, len(tokens)
    return {"ttft_ms": (first - start) * 1e3, "decode_tok_s": (OUTPUT_LEN - 1) / (end - first), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    llm = LLM(MODEL, dtype=args.dtype, block_size=args.block_size, max_num_seqs=1, max_model_len=2048)
    path = fetch_named_model(MODEL)
    dtype = getattr(torch, args.dtype)
    reference = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for pair in range(args.pairs + 1):
        prompt = torch.randint(100, 40000, (INPUT_LEN,), generator=generator).tolist()
        a, b = run_ours(llm, prompt), run_transformers(reference, prompt)
        same = sum(x == y for x, y in zip(a.pop("tokens"), b.pop("tokens"), strict=True))
        print(f"pair {pair}{' (warm-up)' if pair == 0 else ''}: ours {a}, transformers {b}, same tokens {same}")
        if pair:
            ours.append(a)
            theirs.append(b)
    result: dict[str, Any] = {"dtype": args.dtype, "threads": torch.get_num_threads(), "pairs": args.pairs}
    for key in ("decode_tok_s", "ttft_ms"):
        result[f"ours_{key}"] = statistics.median(r[key] for r in ours)
        result[f"transformers_{key}"] = statistics.median(r[key] for r in theirs)
        result[f"ratio_{key}"] = statistics.median(x[key] / y[key] for x, y in zip(ours, theirs, strict=True))
    for key, value in result.items():
        print(f"{key:28} {value if isinstance(value, (str, int)) else round(value, 2)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
